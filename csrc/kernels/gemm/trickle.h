// Epilogues of a matrix unit's sums that run while it multiplies.
//
// Included after simd/vec_avx512.h, by files compiled for AMX.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels/gemm/matrix_runs.h"
#include "simd/activation.h"
#include "simd/stored.h"

namespace mnv4 {
namespace {

using simd::Vec;

// The epilogue of two panels' sums, a few rows at a time: between the runs of the next block it costs next to nothing,
// behind them all that it takes, since a processor doesn't look past that many tiles. Results of two panels lie side by
// side (in bfloat16) or each for itself (in float32).
template <class Out, bool RESIDUAL, bool PLAIN>
class Trickle {
  using C = simd::Stored<Out>;

 public:
  // `rows` rows, the first of which is number `pixel` of image `image`, in steps of `pace`.
  Trickle(const GemmArgs& args, const float* sums, int64_t panel, int64_t image, int64_t pixel, int64_t rows,
          int64_t pace)
      : values_(sums),
        end_(rows),
        pace_(pace),
        left_(args.image_rows ? args.image_rows - pixel : rows),
        image_rows_(args.image_rows),
        c_row_(args.c_row),
        c_skip_(args.c_image - args.image_rows * args.c_row),
        beside_(args.c_at(panel + 1) - args.c_at(panel)),
        c_(static_cast<Out*>(args.c) + image * args.c_image + pixel * args.c_row + args.c_at(panel)),
        first_(Vec::load(args.bias + panel * kPanel)),
        second_(Vec::load(args.bias + (panel + 1) * kPanel)),
        least_(Vec::broadcast(args.act == Activation::kRelu ? 0.0f : -__builtin_inff())),
        act_(args.act) {
    if (!PLAIN && args.gamma) {
      gamma_ = Vec::load(args.gamma + panel * kPanel);
      second_gamma_ = Vec::load(args.gamma + (panel + 1) * kPanel);
    }
    if constexpr (RESIDUAL) {
      residual_row_ = args.residual_row;
      residual_skip_ = args.residual_image - args.image_rows * args.residual_row;
      residual_ = static_cast<const Out*>(args.residual) + image * args.residual_image + pixel * args.residual_row +
                  args.residual_at(panel);
      residual_beside_ = args.residual_at(panel + 1) - args.residual_at(panel);
    }
  }

  MNV4_INLINE void step() {
    const int64_t stop = std::min(end_, row_ + pace_);
    for (; row_ < stop; ++row_) {
      if (row_ == kMatrixRows) values_ += kSums;
      Vec y = Vec::load(values_) + first_;
      Vec beside = Vec::load(values_ + kSums) + second_;
      values_ += kPanel;
      if constexpr (PLAIN) {
        y = max(least_, y);
        beside = max(least_, beside);
      } else {
        y = simd::activate(act_, y) * gamma_;
        beside = simd::activate(act_, beside) * second_gamma_;
      }
      if constexpr (RESIDUAL) {
        y = y + C::load(residual_);
        beside = beside + C::load(residual_ + residual_beside_);
        residual_ += residual_row_;
      }
      if constexpr (std::is_same_v<Out, Bf16>) {
        Vec::store_bf16_pair(c_, y, beside);
      } else {
        C::store(c_, y);
        C::store(c_ + beside_, beside);
      }
      c_ += c_row_;
      if (--left_ == 0) {
        left_ = image_rows_;
        c_ += c_skip_;
        if constexpr (RESIDUAL) residual_ += residual_skip_;
      }
    }
  }

 private:
  const float* values_;
  int64_t row_ = 0;
  int64_t end_;
  int64_t pace_;
  int64_t left_;  // rows of this image
  int64_t image_rows_;
  ptrdiff_t c_row_;
  ptrdiff_t c_skip_;
  ptrdiff_t beside_;
  Out* c_;
  ptrdiff_t residual_row_ = 0;
  ptrdiff_t residual_skip_ = 0;
  ptrdiff_t residual_beside_ = 0;
  const Out* residual_ = nullptr;
  // of both panels, as is gamma
  Vec first_;
  Vec second_;
  Vec least_;
  Activation act_;
  Vec gamma_ = Vec::broadcast(1.0f);
  Vec second_gamma_ = Vec::broadcast(1.0f);
};

}  // namespace
}  // namespace mnv4
