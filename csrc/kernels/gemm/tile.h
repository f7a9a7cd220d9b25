// The register tile of every GEMM kernel, over whichever Vec the including file chose.
#pragma once

#include "kernels/gemm/gemm.h"
#include "simd/activation.h"

namespace mnv4 {
namespace {

using simd::Vec;

// MR rows by NP panels. Sums run over K in order, one fused multiply-add each, so that every tile shape gives the
// same bits. Rows are addressed from one pointer per three, base + {0, 1, 2} * row: x86 can scale an index by 2, and
// fewer pointers than rows leaves registers for them all.
template <int MR, int NP>
void gemm_tile(const GemmTile& t) {
  constexpr int kVectors = kPanel / Vec::kWidth * NP;
  constexpr int kBases = (MR + 2) / 3;
  Vec acc[MR][kVectors];
#pragma GCC unroll 64
  for (int v = 0; v < kVectors; ++v) {
    const Vec bias = Vec::load(t.bias + v * Vec::kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) acc[r][v] = bias;
  }
  const ptrdiff_t row = t.a_row;
  const float* b = t.b;
  const ptrdiff_t b_panel = NP > 1 ? t.b_panel : 0;
  for (int64_t s = 0; s < t.segments; ++s) {
    const float* base[kBases];
#pragma GCC unroll 8
    for (int i = 0; i < kBases; ++i) {
      base[i] = t.a + t.segment[s] + row * (3 * i);
      // keeps the compiler from deriving every row's address anew from one base
      asm volatile("" : "+r"(base[i]));
    }
    // GCC spills accumulators when it unrolls this loop
#pragma GCC unroll 1
    for (int64_t k = 0; k < t.segment_length; ++k) {
      Vec w[kVectors];
#pragma GCC unroll 64
      for (int v = 0; v < kVectors; ++v) {
        constexpr int kPerPanel = kPanel / Vec::kWidth;
        w[v] = Vec::load(b + (v / kPerPanel) * b_panel + (v % kPerPanel) * Vec::kWidth);
      }
#pragma GCC unroll 4
      for (int p = 0; p < NP; ++p) __builtin_prefetch(b + p * b_panel + 16 * kPanel);
      b += kPanel;
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const Vec x = Vec::broadcast(base[r / 3][(r % 3) * row]);
#pragma GCC unroll 64
        for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(x, w[v], acc[r][v]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kBases; ++i) ++base[i];
    }
  }
  if (t.act == Activation::kRelu) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 64
      for (int v = 0; v < kVectors; ++v) acc[r][v] = max(Vec::zero(), acc[r][v]);
    }
  } else if (t.act != Activation::kNone) {
    // through memory: one copy of the transcendental code instead of one per register
    alignas(64) float buffer[MR * kVectors * Vec::kWidth];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 64
      for (int v = 0; v < kVectors; ++v) acc[r][v].store(buffer + (r * kVectors + v) * Vec::kWidth);
    }
#pragma GCC unroll 1
    for (int i = 0; i < MR * kVectors; ++i) {
      simd::activate(t.act, Vec::load(buffer + i * Vec::kWidth)).store(buffer + i * Vec::kWidth);
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 64
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Vec::load(buffer + (r * kVectors + v) * Vec::kWidth);
    }
  }
  if (t.gamma) {
#pragma GCC unroll 64
    for (int v = 0; v < kVectors; ++v) {
      const Vec gamma = Vec::load(t.gamma + v * Vec::kWidth);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) acc[r][v] = acc[r][v] * gamma;
    }
  }
  if (t.columns == kPanel) {
    if (t.residual) {
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 64
        for (int v = 0; v < kVectors; ++v) {
          acc[r][v] = acc[r][v] + Vec::load(t.residual + r * t.residual_row + v * Vec::kWidth);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 64
      for (int v = 0; v < kVectors; ++v) acc[r][v].store(t.c + r * t.c_row + v * Vec::kWidth);
    }
    return;
  }
#pragma GCC unroll 64
  for (int v = 0; v < kVectors; ++v) {
    const int left = t.columns + (NP - 1) * kPanel - v * Vec::kWidth;
    const int valid = left < Vec::kWidth ? left : Vec::kWidth;
    if (valid <= 0) continue;
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      if (t.residual) acc[r][v] = acc[r][v] + Vec::load(t.residual + r * t.residual_row + v * Vec::kWidth, valid);
      acc[r][v].store(t.c + r * t.c_row + v * Vec::kWidth, valid);
    }
  }
}

}  // namespace
}  // namespace mnv4
