// The register tile of every GEMM kernel, over whichever Vec the including file chose.
#pragma once

#include <utility>

#include "kernels/gemm/short_chains.h"
#include "simd/activation.h"

namespace mnv4 {
namespace {

// An image's 3 x 3 window, row by row: three taps of one channel, or of all three of an image's, of which fewer are
// zeros where pairs are multiplied.
template <class In>
constexpr int image_channels() {
  return Operand<In>::kGroup == 1 ? 1 : 3;
}
template <class In>
constexpr int image_segment() {
  return static_cast<int>(round_up(3 * image_channels<In>(), Operand<In>::kGroup));
}

// Where there are few registers, hardly an instruction may come between multiply-adds: none fetches, and the length of
// a plane's segments is compiled too.
constexpr bool kFetches = Vec::kWidth != kPanel / 2;

// Values of K in a segment of a variant; 0: any.
template <class In>
constexpr int segment_length(int variant) {
  return variant == kImageRow ? image_segment<In>() : variant == kAnyRow || kFetches ? 0 : kPanel;
}

template <class In>
constexpr ptrdiff_t row_stride(int variant) {
  constexpr ptrdiff_t strides[kRowVariants] = {0, 2 * image_channels<In>(), kPanel, 2 * kPanel};
  return strides[variant];
}

// Rows of a pair of panels whose factor each of its two multiply-adds loads: an instruction a row fewer, for cores that
// do another's work at the same time; of all rows, the loads would be too many.
constexpr int kLoadedTwice = 6;

// A tile of MR rows by NP panels. Sums run over K in order, one fused multiply-add each, so that every tile shape gives
// the same bits. With a compiled row stride all rows are displacements of one pointer; else one pointer serves three
// rows, base + {0, 1, 2} * row: x86 can scale an index by 2, and there are registers for them all.
template <class In, class Out, int MR, int NP, RowVariant VARIANT, int TURN>
MNV4_INLINE void gemm_tile_once(const GemmTile& t, const In* a, Out* c, const Out* residual, float* partial) {
  using A = Operand<In>;
  using C = simd::Stored<Out>;
  constexpr int kVectors = kPanel / Vec::kWidth * NP;
  constexpr ptrdiff_t kRow = row_stride<In>(VARIANT);
  constexpr int kRowsPerBase = kRow ? MR : 3;
  constexpr int kBases = (MR + kRowsPerBase - 1) / kRowsPerBase;
  Vec acc[MR][kVectors];
#pragma GCC unroll 64
  for (int v = 0; v < kVectors; ++v) {
    const Vec start = t.first ? Vec::load(t.bias + v * Vec::kWidth) : Vec::zero();
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) acc[r][v] = start;
  }
  const ptrdiff_t row = kRow ? kRow : t.a_row;
  constexpr int kPointers = kFetches ? 1 : NP;
  const In* b[kPointers];
  const ptrdiff_t b_panel = NP > 1 ? t.b_panel : 0;
#pragma GCC unroll 4
  for (int p = 0; p < kPointers; ++p) b[p] = static_cast<const In*>(t.b) + p * b_panel;
  [[maybe_unused]] const ptrdiff_t fetch[] = {t.ahead[0], t.ahead[1]};
  // where a vector's columns begin
  const auto column = [](int v, ptrdiff_t panel) {
    constexpr int kPerPanel = kPanel / Vec::kWidth;
    return NP > 1 ? (v / kPerPanel) * panel + (v % kPerPanel) * Vec::kWidth : v * Vec::kWidth;
  };
  constexpr int kSegment = segment_length<In>(VARIANT);
  const ptrdiff_t* const segment = t.segment;
  const int64_t segments = t.segments;
  const int64_t length = kSegment ? kSegment : t.segment_length;
  for (int64_t s = 0; s < segments; ++s) {
    const In* base[kBases];
#pragma GCC unroll 16
    for (int i = 0; i < kBases; ++i) {
      base[i] = a + segment[s] + row * (kRowsPerBase * i);
      // keeps the compiler from deriving every row's address anew from one base
      asm volatile("" : "+r"(base[i]));
    }
    // nothing of the next value of K is loaded before: there are no registers for it
    const auto hold = []() __attribute__((always_inline)) { asm volatile("" ::: "memory"); };
    // the factors `ahead` values of K behind base
    const auto multiply = [&](int ahead) __attribute__((always_inline)) {
      const auto vector = [&](int v) __attribute__((always_inline)) {
        constexpr int kPerPanel = kPanel / Vec::kWidth;
        const int panel = v / kPerPanel;
        const In* from = kPointers > 1 ? b[panel] : b[0] + panel * b_panel;
        return from + ahead * kPanel + (v % kPerPanel) * Vec::kWidth * A::kGroup;
      };
      if constexpr (!kFetches && NP == 2) {
        Vec x[MR];
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) x[r] = A::broadcast(base[r / kRowsPerBase] + (r % kRowsPerBase) * row + ahead);
#pragma GCC unroll 64
        for (int v = 0; v < kVectors; ++v) {
          if constexpr (MR == 1) multiply_add(x[0], vector(v), acc[0][v]);
          if constexpr (MR == 2) multiply_add(x[0], x[1], vector(v), acc[0][v], acc[1][v]);
          if constexpr (MR == 3) multiply_add(x[0], x[1], x[2], vector(v), acc[0][v], acc[1][v], acc[2][v]);
        }
      } else {
        typename A::Packed w[kVectors];
#pragma GCC unroll 64
        for (int v = 0; v < kVectors; ++v) w[v] = A::load(vector(v));
        if constexpr (kFetches) {
          const In* weights = vector(0);
#pragma GCC unroll 4
          for (int p = 0; p < NP; ++p) __builtin_prefetch(weights + p * b_panel + 16 * kPanel * A::kGroup);
          __builtin_prefetch(reinterpret_cast<const char*>(weights) + fetch[0], 0, 2);
          if constexpr (NP == 2) __builtin_prefetch(reinterpret_cast<const char*>(weights) + fetch[1], 0, 2);
        }
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) {
          const In* factor = base[r / kRowsPerBase] + (r % kRowsPerBase) * row + ahead;
          if constexpr (NP == 2) {
            if (kRow && r < kLoadedTwice) {
#pragma GCC unroll 64
              for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(factor, w[v], acc[r][v]);
              continue;
            }
          }
          if constexpr (TURN > 1 && kVectors == 2) {
            multiply_add(factor, w, acc[r]);
            continue;
          }
          const auto x = A::broadcast(factor);
#pragma GCC unroll 64
          for (int v = 0; v < kVectors; ++v) acc[r][v] = A::multiply_add(x, w[v], acc[r][v]);
        }
      }
      if constexpr (!kFetches) hold();
    };
    const auto advance = [&](int by) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int p = 0; p < kPointers; ++p) b[p] += by * kPanel;
#pragma GCC unroll 16
      for (int i = 0; i < kBases; ++i) base[i] += by;
    };
    if constexpr (TURN == 3) {
      multiply(0);
      multiply(1);
      multiply(2);
      advance(TURN);
    } else if constexpr (VARIANT == kImageRow && A::kGroup == 1) {
      // as many as the loop below would make
#pragma GCC unroll 4
      for (int k = 0; k < kSegment; k += A::kGroup) {
        multiply(0);
        advance(A::kGroup);
      }
    } else if constexpr (TURN == 4) {
      const In* const end = base[0] + length;
#pragma GCC unroll 1
      do {
        multiply(0);
        multiply(1);
        multiply(2);
        multiply(3);
        advance(TURN);
      } while (base[0] < end);
    } else {
      // GCC spills accumulators, or operands that rows share, when it unrolls this loop
#pragma GCC unroll 1
      for (int64_t k = 0; k < length; k += A::kGroup) {
        multiply(0);
        advance(A::kGroup);
      }
    }
  }
  if (!t.first) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 64
      for (int v = 0; v < kVectors; ++v) acc[r][v] = acc[r][v] + Vec::load(partial + (r * kVectors + v) * Vec::kWidth);
    }
  }
  if (!t.last) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 64
      for (int v = 0; v < kVectors; ++v) acc[r][v].store(partial + (r * kVectors + v) * Vec::kWidth);
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
    simd::activate_pixels(t.act, buffer, Vec::kWidth, MR * kVectors, Vec::kWidth);
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
    if (residual) {
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 64
        for (int v = 0; v < kVectors; ++v) {
          acc[r][v] = acc[r][v] + C::load(residual + r * t.residual_row + column(v, t.residual_panel));
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 64
      for (int v = 0; v < kVectors; ++v) C::store(c + r * t.c_row + column(v, t.c_panel), acc[r][v]);
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
      if (residual) acc[r][v] = acc[r][v] + C::load(residual + r * t.residual_row + column(v, t.residual_panel), valid);
      C::store(c + r * t.c_row + column(v, t.c_panel), acc[r][v], valid);
    }
  }
}

// As many tiles as are wanted, one below the other.
template <class In, class Out, int MR, int NP, RowVariant VARIANT, int TURN>
void gemm_tile_by(const GemmTile& t) {
  const auto* a = static_cast<const In*>(t.a);
  auto* c = static_cast<Out*>(t.c);
  const auto* residual = static_cast<const Out*>(t.residual);
  float* partial = t.partial;
  if constexpr (kFetches) return gemm_tile_once<In, Out, MR, NP, VARIANT, TURN>(t, a, c, residual, partial);
  for (int64_t i = t.repeat; i > 0; --i) {
    gemm_tile_once<In, Out, MR, NP, VARIANT, TURN>(t, a, c, residual, partial);
    a += MR * t.a_row;
    c += MR * t.c_row;
    if (residual) residual += MR * t.residual_row;
    partial += MR * NP * kPanel;
  }
}

// Processors with 16 registers have the fewest multiply-adds for each other instruction: a turn of their loop is four
// values of K, or an image's whole segment.
template <class In, class Out, int MR, int NP, RowVariant VARIANT = kAnyRow>
void gemm_tile(const GemmTile& t) {
  if constexpr (!kFetches) {
    constexpr int kTurn = VARIANT == kImageRow ? segment_length<In>(VARIANT) : 4;
    if (VARIANT != kAnyRow || t.segment_length % kTurn == 0) return gemm_tile_by<In, Out, MR, NP, VARIANT, kTurn>(t);
  }
  gemm_tile_by<In, Out, MR, NP, VARIANT, 1>(t);
}

// A kernel's table: tiles of 1 to MAX rows for each compiled stride, tiles of 1 to PAIR rows by two panels, and short
// chains of MR rows by NP panels.
template <class In, class Out, RowVariant VARIANT, int... MR>
constexpr void fill_tiles(GemmKernel& kernel, std::integer_sequence<int, MR...>) {
  ((kernel.tile[VARIANT][MR + 1] = gemm_tile<In, Out, MR + 1, 1, VARIANT>), ...);
  kernel.row_stride[VARIANT] = row_stride<In>(VARIANT);
  kernel.segment_length[VARIANT] = segment_length<In>(VARIANT);
}
template <class In, class Out, RowVariant VARIANT, int... MR>
constexpr void fill_pairs(GemmKernel& kernel, std::integer_sequence<int, MR...>) {
  ((kernel.pair[VARIANT][MR + 1] = gemm_tile<In, Out, MR + 1, 2, VARIANT>), ...);
}
template <class In, class Out, int MAX, int MR, int NP, int PAIR = 0>
constexpr GemmKernel make_gemm_kernel(const char* name) {
  GemmKernel kernel{};
  kernel.name = name;
  kernel.input = Operand<In>::kStorage;
  kernel.output = simd::Stored<Out>::kStorage;
  kernel.max_rows = MAX;
  kernel.fetches = kFetches;
  const auto rows = std::make_integer_sequence<int, MAX>{};
  static_assert(kRowVariants == 4, "one fill for each variant");
  fill_tiles<In, Out, kAnyRow>(kernel, rows);
  fill_tiles<In, Out, kImageRow>(kernel, rows);
  fill_tiles<In, Out, kPlaneRow>(kernel, rows);
  fill_tiles<In, Out, kStridedPlaneRow>(kernel, rows);
  if constexpr (PAIR > 0) {
    const auto pair_rows = std::make_integer_sequence<int, PAIR>{};
    kernel.pair_rows = PAIR;
    fill_pairs<In, Out, kAnyRow>(kernel, pair_rows);
    fill_pairs<In, Out, kImageRow>(kernel, pair_rows);
    fill_pairs<In, Out, kPlaneRow>(kernel, pair_rows);
    fill_pairs<In, Out, kStridedPlaneRow>(kernel, pair_rows);
  }
  kernel.short_chains = short_chains<In, MR, NP>;
  return kernel;
}

}  // namespace
}  // namespace mnv4
