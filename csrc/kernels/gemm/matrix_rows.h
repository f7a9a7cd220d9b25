// Rows of a left operand in the order in which a matrix unit reads them.
//
// Included after simd/vec_avx512.h, by files compiled for AMX.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels/gemm/matrix_runs.h"

namespace mnv4 {
namespace {

MNV4_INLINE __mmask32 first_values(int64_t n) { return n >= kMatrixDepth ? ~__mmask32{0} : (__mmask32{1} << n) - 1; }

void pack_pairs_of_rows(const GemmArgs& args, int64_t row_begin, int64_t row_end, void* to, int64_t pitch) {
  const auto* a = static_cast<const Bf16*>(args.a);
  auto* packed = static_cast<Bf16*>(to);
  int64_t k = 0;
  // runs that two segments of 16 fill, as planes have them
  int64_t s = 0;
  if (args.segment_length == kPanel) {
    for (; s + 1 < args.segments; s += 2, k += kMatrixDepth) {
      const Bf16* low = a + args.segment[s] + row_begin * args.a_row;
      const Bf16* high = a + args.segment[s + 1] + row_begin * args.a_row;
      Bf16* out = packed + k * pitch;
      for (int64_t r = row_begin; r < row_end; ++r, low += args.a_row, high += args.a_row, out += kMatrixDepth) {
        const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
        const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high));
        _mm512_storeu_si512(out, _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
      }
    }
  }
  for (; s < args.segments; ++s) {
    for (int64_t i = 0; i < args.segment_length;) {
      const int64_t at = k % kMatrixDepth;
      const int64_t count = std::min(args.segment_length - i, kMatrixDepth - at);
      const Bf16* in = a + args.segment[s] + i + row_begin * args.a_row;
      Bf16* out = packed + (k - at) * pitch + at;
      const __mmask32 mask = first_values(count);
      // what is behind this run's last value so far is zeros
      const __mmask32 behind = first_values(kMatrixDepth - at);
      for (int64_t r = row_begin; r < row_end; ++r, in += args.a_row, out += kMatrixDepth) {
        _mm512_mask_storeu_epi16(out, behind, _mm512_maskz_loadu_epi16(mask, in));
      }
      i += count;
      k += count;
    }
  }
}

// 16 values of K and 16 more as pairs, in three terms. They lie side by side: with blocks of each term, 256 rows of
// K = 640 are multiplied a third slower.
MNV4_INLINE void split_values(__m512 low, __m512 high, char* to) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const auto store = [&](__m512i l, __m512i h, ptrdiff_t t) __attribute__((always_inline)) {
    // l >> 16 | (h & upper)
    _mm512_storeu_si512(to + t * kTileRow, _mm512_ternarylogic_epi32(_mm512_srli_epi32(l, 16), h, upper, 0xf8));
  };
#pragma GCC unroll 2
  for (ptrdiff_t t = 0; t + 1 < kTerms; ++t) {
    const __m512i l = _mm512_add_epi32(_mm512_castps_si512(low), half);
    const __m512i h = _mm512_add_epi32(_mm512_castps_si512(high), half);
    store(l, h, t);
    low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_and_si512(l, upper)));
    high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_and_si512(h, upper)));
  }
  store(_mm512_castps_si512(low), _mm512_castps_si512(high), kTerms - 1);
}

MNV4_INLINE __mmask16 first_floats(int64_t n) {
  return n >= kPanel ? __mmask16{0xffff} : n <= 0 ? __mmask16{0} : static_cast<__mmask16>((1 << n) - 1);
}

// Where values `at` and on of K lie in a row, whose segments are whole panels, or a single one.
MNV4_INLINE ptrdiff_t place_of(const GemmArgs& args, int64_t at) {
  return args.segment[at / args.segment_length] + at % args.segment_length;
}

// As PackedRows of terms.
void split_rows(const GemmArgs& args, int64_t row_begin, int64_t row_end, void* to, int64_t pitch) {
  constexpr ptrdiff_t kRow = kTerms * kTileRow;
  const int64_t k = args.segments * args.segment_length;
  const float* a = static_cast<const float*>(args.a) + row_begin * args.a_row;
  char* out = static_cast<char*>(to);
  for (int64_t at = 0; at < k; at += kMatrixDepth, out += pitch * kRow) {
    const __mmask16 low_mask = first_floats(k - at);
    const __mmask16 high_mask = first_floats(k - at - kPanel);
    const float* low = a + place_of(args, at);
    const float* high = high_mask ? a + place_of(args, at + kPanel) : low;
    char* row = out;
    for (int64_t r = row_begin; r < row_end; ++r, low += args.a_row, high += args.a_row, row += kRow) {
      split_values(_mm512_maskz_loadu_ps(low_mask, low), _mm512_maskz_loadu_ps(high_mask, high), row);
    }
  }
}

// Panels of float32 weights to tiles of terms: [run][term] of each panel, `runs` after each other.
template <int PANELS>
class Splitter {
 public:
  Splitter(const float* const* panel, int64_t k, char* to) : k_(k), runs_(div_up(k, kMatrixDepth)), to_(to) {
    for (int p = 0; p < PANELS; ++p) panel_[p] = panel[p];
    for (int i = 0; i < kLead; ++i) step();
  }

  // Some of the next run's rows.
  MNV4_INLINE void step() {
    if (run_ == runs_) return;
    const bool whole = left_ >= kMatrixDepth;
#pragma GCC unroll 1
    for (const int64_t stop = std::min(row_ + kPace, int64_t{kPanel}); row_ < stop; ++row_) {
      const bool lower = whole || row_ < left_;
      const bool upper = whole || row_ + kPanel < left_;
#pragma GCC unroll 2
      for (int p = 0; p < PANELS; ++p) {
        const float* from = panel_[p] + row_ * kPanel;
        const __m512 low = lower ? _mm512_loadu_ps(from) : _mm512_setzero_ps();
        const __m512 high = upper ? _mm512_loadu_ps(from + kPanel * kPanel) : _mm512_setzero_ps();
        split_values(low, high, to_ + p * runs_ * kRunBytes + row_ * kTerms * kTileRow);
      }
    }
    if (row_ < kPanel) return;
    row_ = 0;
    ++run_;
    left_ -= kMatrixDepth;
    to_ += kRunBytes;
    for (int p = 0; p < PANELS; ++p) panel_[p] += kMatrixDepth * kPanel;
  }

 private:
  static constexpr int64_t kPace = (kPanel + Terms::kSteps - 1) / Terms::kSteps;
  // A tile's load waits until all that it reads has left the store buffer, which is after the products before it: half
  // a run between the two.
  static constexpr int kLead = 3 * Terms::kSteps / 2;
  static constexpr ptrdiff_t kRunBytes = kTerms * kTileBytes;

  const float* panel_[PANELS];
  int64_t k_;
  int64_t runs_;
  char* to_;
  int64_t run_ = 0;
  int64_t row_ = 0;
  int64_t left_ = k_;
};

template <class Operands>
void pack_rows(const GemmArgs& args, int64_t row_begin, int64_t row_end, void* to, int64_t pitch) {
  if constexpr (Operands::kStorage == Storage::kFloat32) {
    split_rows(args, row_begin, row_end, to, pitch);
  } else {
    pack_pairs_of_rows(args, row_begin, row_end, to, pitch);
  }
}

// Rows that are packed at a time where the caller has not done it: half of an L1 for a few hundred values of K, in
// terms a part of L2.
constexpr int64_t kRowsAtATime = 8 * kMatrixRows;

// A thread's memory of `bytes` at a line's begin, one for each USE.
enum class Use { kRows, kWeights };
template <Use USE>
char* buffer_for(int64_t bytes) {
  static thread_local std::vector<char> buffer;
  const auto size = static_cast<size_t>(bytes + kTileRow);
  if (buffer.size() < size) buffer.resize(size);
  const auto address = reinterpret_cast<uintptr_t>(buffer.data());
  return buffer.data() + (kTileRow - address % kTileRow) % kTileRow;
}

constexpr ptrdiff_t kWholeRow = 0;

template <class Operands>
Rows packed_rows(const char* data, int64_t pitch, int64_t k) {
  constexpr ptrdiff_t kRow = Operands::kTiles * kTileRow;
  return {data, kRow, &kWholeRow, 1, div_up(k, kMatrixDepth), pitch * kRow};
}

}  // namespace
}  // namespace mnv4
