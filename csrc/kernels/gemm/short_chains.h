// Reductions in short chains, over whichever Vec the including file chose.
#pragma once

#include "kernels/gemm/operand.h"

namespace mnv4 {
namespace {

// A chain of MR rows by NP panels, added to total[MR][NP * kPanel] or, the last of a reduction, with it written to
// sums[NP][...][kPanel].
template <class In, int MR, int NP>
MNV4_INLINE void short_chain(const In* a, ptrdiff_t a_row, const In* b, ptrdiff_t b_panel, int64_t length,
                             const float* bias, double* total, float* sums, ptrdiff_t sums_panel) {
  using A = Operand<In>;
  constexpr int kWidth = Vec::kWidth;
  constexpr int kPerPanel = kPanel / kWidth;
  constexpr int kVectors = kPerPanel * NP;
  Vec acc[MR][kVectors];
#pragma GCC unroll 64
  for (int v = 0; v < kVectors; ++v) {
    const Vec start = bias ? Vec::load(bias + v * kWidth) : Vec::zero();
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r) acc[r][v] = start;
  }
#pragma GCC unroll 1
  for (int64_t k = 0; k < length; k += A::kGroup) {
    decltype(A::broadcast(a)) x[MR];
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r) x[r] = A::broadcast(a + r * a_row + k);
#pragma GCC unroll 64
    for (int v = 0; v < kVectors; ++v) {
      const auto w = A::load(b + v / kPerPanel * b_panel + v % kPerPanel * kWidth * A::kGroup);
#pragma GCC unroll 4
      for (int r = 0; r < MR; ++r) acc[r][v] = A::multiply_add(x[r], w, acc[r][v]);
    }
    b += A::kGroup * kPanel;
  }
#pragma GCC unroll 4
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 64
    for (int v = 0; v < kVectors; ++v) {
      double* const before = total + (r * kVectors + v) * kWidth;
      if (sums) {
        alignas(64) float values[kWidth];
        for (int i = 0; i < kWidth; ++i) values[i] = static_cast<float>(before[i]);
        float* const to = sums + v / kPerPanel * sums_panel + r * kPanel + v % kPerPanel * kWidth;
        (acc[r][v] + Vec::load(values)).store(to);
      } else {
        acc[r][v].add_to(before);
      }
    }
  }
}

// NP panels, which pass by once for all rows.
template <class In, int MR, int NP>
void short_chains_of(const GemmTile& t, int64_t rows) {
  static_assert(MR <= 3, "the rows that remain are told apart below");
  alignas(64) double memory[kFewRows * NP * kPanel];
  double* total = memory;
  // keeps the compiler from taking the sums apart into more registers than there are
  asm volatile("" : "+r"(total) : : "memory");
  for (int64_t i = 0; i < rows * NP * kPanel; ++i) total[i] = 0.0;
  const auto* b = static_cast<const In*>(t.b);
  const float* bias = t.bias;
  for (int64_t s = 0; s < t.segments; ++s) {
    for (int64_t k = 0; k < t.segment_length; k += kShortChain) {
      const int64_t length = t.segment_length - k < kShortChain ? t.segment_length - k : kShortChain;
      const bool last = s + 1 == t.segments && k + length == t.segment_length;
      const In* const a = static_cast<const In*>(t.a) + t.segment[s] + k;
      int64_t row = 0;
      const auto take = [&]<int COUNT>() {
        short_chain<In, COUNT, NP>(a + row * t.a_row, t.a_row, b, t.b_panel, length, bias, total + row * NP * kPanel,
                                   last ? t.partial + row * kPanel : nullptr, rows * kPanel);
        row += COUNT;
      };
      while (rows - row >= MR) take.template operator()<MR>();
      if (MR > 2 && rows - row == 2) take.template operator()<2>();
      if (MR > 1 && rows - row == 1) take.template operator()<1>();
      b += length * kPanel;
      bias = nullptr;
    }
  }
}

template <class In, int MR, int NP>
void short_chains_by(GemmTile& t, int64_t rows, int64_t panels) {
  for (; panels >= NP; panels -= NP) {
    short_chains_of<In, MR, NP>(t, rows);
    t.b = static_cast<const In*>(t.b) + NP * t.b_panel;
    t.bias += NP * kPanel;
    t.partial += NP * rows * kPanel;
  }
  if constexpr (NP > 1) short_chains_by<In, MR, NP / 2>(t, rows, panels);
}

// As many streams of weights as there may be where there is one row: what they cost is their way from memory.
template <class In, int MR, int NP>
void short_chains(const GemmTile& tile, int64_t rows, int64_t panels) {
  GemmTile t = tile;
  if (rows == 1) return short_chains_by<In, 1, kFewPanels>(t, rows, panels);
  short_chains_by<In, MR, NP>(t, rows, panels);
}

}  // namespace
}  // namespace mnv4
