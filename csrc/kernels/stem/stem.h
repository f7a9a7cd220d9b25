// The first convolution of a network on a matrix unit: 3 x 3 of stride 2 over an image of three channels in float32.
//
// Its products have channels for rows and pixels for columns, unlike all others: then an image's rows are operands as
// they lie, since two pixels that are neighbours in memory are the pair that such a unit multiplies. Only what the
// result's epilogue writes is transposed. An input row of three channels becomes five rows of pairs: of each channel
// two taps of every window, and the third taps of channels 0 and 1, and of 2 beside a zero. Three input rows make 15 of
// the 16 pairs that a tile takes; the last one is the bias.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/conv/args.h"

namespace mnv4 {

struct StemKernel;

inline constexpr int kStemRows = 3;   // input rows that a window spans
inline constexpr int kStemPairs = 5;  // rows of pairs that an input row becomes
inline constexpr int kStemRun = 32;   // pixels that become pairs at a time
inline constexpr int64_t kStemTile = kMatrixRows * kMatrixDepth * 2;

// One worker's way down an image.
class StemRows {
 public:
  // Whether the tier in use computes `args` so, with `kernel` for its type.
  static bool takes(const GemmKernel& kernel, const ConvArgs& args);
  // Floats of scratch, on any tier.
  static int64_t floats(const ConvArgs& args);
  StemRows(const GemmKernel& kernel, const ConvArgs& args, float* scratch);

  // Output row `oy` to where `out` says, by c, c_row, c_panel, paired, n and act.
  void row(int64_t oy, const GemmArgs& out);

 private:
  char* pairs(int64_t oy) const;

  const StemKernel& kernel_;
  const MatrixUnit& unit_;
  const ConvArgs args_;
  const int64_t pitch_;  // bytes of a row of pairs
  char* pairs_;          // [2][16][pitch_], for this output row and the coming one
  char* weights_;        // [panel pair * 2][16 channels][16 pairs]
  int64_t ready_ = -1;   // the output row whose pairs are there
};

// 16 rows of pairs: of input row iy + ky rows 5 ky on, and one for the bias. All distances are in bytes.
struct StemPairs {
  // What lies before the image's first pixel in each row: zeros for the pairs beside it.
  static constexpr ptrdiff_t kBefore = 64;
  // Where the pair of output pixel 0 lies: windows begin with the first of two pixels or the second, by the padding.
  static ptrdiff_t begin(const ConvArgs& args) { return kBefore - args.pad_left / 2 * 4; }
  char* rows;
  int64_t pitch;
  int64_t iy;
};

// What depends on the instruction set.
struct StemKernel {
  const char* name;
  // Weights as pack_conv and pack_pairs leave them to tiles.
  void (*pack)(const ConvArgs& args, void* weights);
  // Pixels [x, x + kStemRun) of three input rows, of which the first is the last one of the rows of pairs `before`, if
  // there are such; what lies outside of the image gives zeros.
  void (*fill)(const ConvArgs& args, const StemPairs& to, int64_t x, const char* before);
  // One output row, and meanwhile the pairs of the next one if it has rows.
  void (*row)(const ConvArgs& args, const GemmArgs& out, const StemPairs& from, const void* weights,
              const StemPairs& next);
};

}  // namespace mnv4
