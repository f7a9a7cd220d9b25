// Dense k x k convolution as a product over segments: the stem and EdgeResidual's 3x3.
//
// A worker keeps the padded input rows that an output row needs in a ring, so that no tap is out of bounds and nothing
// is multiplied by padding that is not zero anyway; each input row is copied once per worker. The rows may come from
// another convolution, which then leaves no map behind.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/gemm/gemm.h"

namespace mnv4 {

// What decides how weights are packed and rows are kept.
struct ConvShape {
  int64_t channels;
  int kernel_h;
  int kernel_w;
  bool dilated;  // along the width
  // Every run of K is rounded up to an even length, as products of bfloat16 need; the weights there are zeros.
  bool pairs;
  // Weights are packed by pack_winograd (kernels/winograd), not by pack_conv.
  bool winograd = false;
};

// Strides are in elements. NHWC and planes of 16 channels differ only in x_block and x_pixel, y_panel and y_pixel.
// x is of the kernel's input type or float32, the weights are of the kernel's input type, y of its output type.
struct ConvArgs {
  const void* x;
  Storage x_type;
  ptrdiff_t x_channel;  // planar input
  ptrdiff_t x_block;    // else: from 16 channels to the next 16, or where they lie in pairs, from 32 to the next 32
  ptrdiff_t x_row;
  ptrdiff_t x_pixel;
  int64_t channels;
  int64_t height;
  int64_t width;
  const void* weight;  // packed [ceil(K / 16)][conv_depth][16] by pack_conv
  const float* bias;   // [ceil(K / 16) * 16]
  void* y;
  ptrdiff_t y_row;
  ptrdiff_t y_pixel;
  ptrdiff_t y_panel;
  int64_t out_channels;
  int64_t out_height;
  int64_t out_width;
  int kernel_h;
  int kernel_w;
  int stride_h;
  int stride_w;
  int pad_top;
  int pad_left;
  int dilation_h;
  int dilation_w;
  Activation act;
  bool pairs = false;
  bool winograd = false;
  bool x_paired = false;
  bool y_paired = false;     // as GemmArgs::paired
  Stream* stream = nullptr;  // or what to fetch meanwhile

  ConvShape shape() const { return {channels, kernel_h, kernel_w, dilation_w != 1, pairs, winograd}; }
};

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
  ptrdiff_t* segment_;
  GemmArgs product_{};
};

// Output rows [row_begin, row_end), all output channels.
void conv(const GemmKernel& kernel, const ConvArgs& args, int64_t row_begin, int64_t row_end, float* scratch);

}  // namespace mnv4
