// Dense k x k convolution as a product over segments: the stem and EdgeResidual's 3x3.
//
// A worker keeps the padded input rows that an output row needs in a ring, so that no tap is out of bounds and nothing
// is multiplied by padding that is not zero anyway; each input row is copied once per worker. The rows may come from
// another convolution, which then leaves no map behind.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "kernels/conv/args.h"
#include "kernels/stem/stem.h"

namespace mnv4 {

// Few input channels, an image's: rows are kept channel by channel and the reduction runs over (c, ky, kx), unless
// pairs are multiplied, of which that order wastes more. Else in blocks of 16 channels, or in one block where 16 does
// not divide them, and over (ky, block, kx, c).
inline constexpr bool conv_is_planar(int64_t channels) { return channels < kPanel; }

// Length of the packed reduction.
int64_t conv_depth(const ConvShape& shape);

// OIHW weights to [ceil(K / 16)][conv_depth][16].
void pack_conv(const float* weight, int64_t out_channels, const ConvShape& shape, float* packed);

// The inverse.
void unpack_conv(const float* packed, int64_t out_channels, const ConvShape& shape, float* weight);

// Floats of scratch that one worker needs, whatever the kernel's input type.
int64_t conv_scratch(const ConvArgs& args);

// How the ring of padded rows is laid out: [slot][plane][width][plane_channels].
struct ConvRing {
  explicit ConvRing(const ConvArgs& args);
  int64_t slot_of(int64_t row) const;

  bool planar;
  int64_t slots;  // input rows that one output row spans
  int64_t width;  // padded pixels of a row
  int64_t planes;
  int64_t plane_channels;
  int64_t plane;     // elements of a plane's row
  int64_t slot;      // elements of a row
  int64_t segments;  // runs of consecutive K
  int64_t length;
};

class ConvRows;

// The padded input rows around one worker's way down an image.
class PaddedRows {
 public:
  // `scratch` holds floats() floats. With a `source` its output rows are x; args.x is not read.
  PaddedRows(const GemmKernel& kernel, const ConvArgs& args, float* scratch, ConvRows* source);
  PaddedRows(const PaddedRows&) = delete;
  PaddedRows& operator=(const PaddedRows&) = delete;
  static int64_t floats(const ConvArgs& args);

  // Input rows [first, first + slots), what lies outside of the image being zeros; `first` never falls.
  void advance_to(int64_t first);
  const ConvRing& ring() const { return ring_; }
  void* data() const { return ring_rows_; }
  // The padded row of input row `iy`.
  void* at(int64_t iy) const { return advance(static_cast<void*>(ring_rows_), kernel_.input, ring_.slot_of(iy)); }

 private:
  template <class T>
  void fill(int64_t iy, T* row);
  template <class T>
  void copy(int64_t iy, T* row) const;
  bool narrows() const;
  void narrow(int64_t iy, uint16_t* row) const;

  const GemmKernel& kernel_;
  const ConvArgs args_;
  const ConvRing ring_;
  float* ring_rows_;
  float* wide_row_;  // a row of float32 on its way to bfloat16
  ConvRows* source_;
  int64_t filled_;
};

// One worker's way down an image.
class ConvRows {
 public:
  // `scratch` holds conv_scratch(args) floats; `source` as for PaddedRows.
  ConvRows(const GemmKernel& kernel, const ConvArgs& args, float* scratch, ConvRows* source = nullptr);

  static constexpr int64_t kRows = 1;
  // Output row `oy` to y[0]; rows come in ascending order.
  void rows(int64_t oy, void* const* y) { row(oy, y[0]); }
  void row(int64_t oy, void* y);
  // Writes rows into `ring`, for `channels` channels, from now on.
  void feed(const ConvRing& ring, int64_t channels);

 private:
  void fill_segments(int64_t iy);

  const GemmKernel& kernel_;
  const ConvArgs args_;
  PaddedRows rows_;
  // instead of all else, where a kernel of its own is there for it
  std::optional<StemRows> stem_;
  ptrdiff_t* segment_;
  GemmArgs product_{};
};

// Output rows [row_begin, row_end), all output channels.
void conv(const GemmKernel& kernel, const ConvArgs& args, int64_t row_begin, int64_t row_end, float* scratch);

}  // namespace mnv4
