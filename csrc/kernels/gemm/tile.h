// The register tile of every GEMM kernel, over whichever Vec the including file chose.
#pragma once

#include "kernels/gemm/gemm.h"
#include "simd/activation.h"

namespace mnv4 {
namespace {

using simd::Vec;

// MR rows by NP panels. Sums run over K in order, one fused multiply-add each, so that every tile shape gives the
// same bits. With a compiled row stride all rows are displacements of one pointer; else (ROW = 0) one pointer serves
// three rows, base + {0, 1, 2} * row: x86 can scale an index by 2, and there are registers for them all.
template <int MR, int NP, int ROW = 0>
void gemm_tile(const GemmTile& t) {
  constexpr int kVectors = kPanel / Vec::kWidth * NP;
  constexpr int kRowsPerBase = ROW ? MR : 3;
  constexpr int kBases = (MR + kRowsPerBase - 1) / kRowsPerBase;
  Vec acc[MR][kVectors];
#pragma GCC unroll 64
  for (int v = 0; v < kVectors; ++v) {
    const Vec start = t.first ? Vec::load(t.bias + v * Vec::kWidth) : Vec::zero();
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) acc[r][v] = start;
  }
  const ptrdiff_t row = ROW ? ROW : t.a_row;
  const float* b = t.b;
  const ptrdiff_t b_panel = NP > 1 ? t.b_panel : 0;
  for (int64_t s = 0; s < t.segments; ++s) {
    const float* base[kBases];
#pragma GCC unroll 16
    for (int i = 0; i < kBases; ++i) {
      base[i] = t.a + t.segment[s] + row * (kRowsPerBase * i);
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
        const Vec x = Vec::broadcast(base[r / kRowsPerBase][(r % kRowsPerBase) * row]);
#pragma GCC unroll 64
        for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(x, w[v], acc[r][v]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kBases; ++i) ++base[i];
    }
  }
  if (!t.first) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 64
      for (int v = 0; v < kVectors; ++v) acc[r][v] = acc[r][v] + Vec::load(t.partial + (r * kVectors + v) * Vec::kWidth);
    }
  }
  if (!t.last) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 64
      for (int v = 0; v < kVectors; ++v) acc[r][v].store(t.partial + (r * kVectors + v) * Vec::kWidth);
    }
    return;
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

// One row of a kernel's table: tiles of 1 to MR rows for each compiled stride.
#define MNV4_GEMM_TILES_1(ROW) nullptr, gemm_tile<1, 1, ROW>
#define MNV4_GEMM_TILES_2(ROW) MNV4_GEMM_TILES_1(ROW), gemm_tile<2, 1, ROW>
#define MNV4_GEMM_TILES_6(ROW) \
  MNV4_GEMM_TILES_2(ROW), gemm_tile<3, 1, ROW>, gemm_tile<4, 1, ROW>, gemm_tile<5, 1, ROW>, gemm_tile<6, 1, ROW>
#define MNV4_GEMM_TILES_14(ROW)                                                                    \
  MNV4_GEMM_TILES_6(ROW), gemm_tile<7, 1, ROW>, gemm_tile<8, 1, ROW>, gemm_tile<9, 1, ROW>,        \
      gemm_tile<10, 1, ROW>, gemm_tile<11, 1, ROW>, gemm_tile<12, 1, ROW>, gemm_tile<13, 1, ROW>, \
      gemm_tile<14, 1, ROW>
#define MNV4_GEMM_TABLE(TILES)                                                                    \
  {                                                                                               \
    {TILES(kRowStrides[0])}, {TILES(kRowStrides[1])}, {TILES(kRowStrides[2])}, {TILES(kRowStrides[3])} \
  }

}  // namespace
}  // namespace mnv4
