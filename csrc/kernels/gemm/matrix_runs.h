// The inner loop of products on AMX's tiles: runs of 32 values of K, two by two tiles of sums.
//
// Included after simd/vec_avx512.h, by files compiled for AMX.
#pragma once

#include "kernels/gemm/amx.h"
#include "simd/stored.h"

namespace mnv4 {
namespace {

using simd::Bf16;

constexpr ptrdiff_t kTileRow = 64;
constexpr ptrdiff_t kTileBytes = kMatrixRows * kTileRow;

// Rows that the tiles of this thread are configured for, 0 for none, and how many sessions keep them so.
thread_local int64_t configured_rows = 0;
thread_local int64_t sessions = 0;

// Sums and left operands have `rows` rows; fewer than 16 take less time.
void configure(int64_t rows) {
  if (configured_rows == rows) return;
  TileShapes shapes;
  for (int t = 0; t < 8; ++t) {
    shapes.row_bytes[t] = kTileRow;
    shapes.rows[t] = static_cast<uint8_t>(t < 6 ? rows : kMatrixRows);
  }
  load_shapes(shapes);
  configured_rows = rows;
}

void begin() { ++sessions; }
void end() {
  if (--sessions > 0) return;
  release_tiles();
  configured_rows = 0;
}

struct Session {
  Session() { begin(); }
  ~Session() { end(); }
};

// Left operands where they lie: row r, run i of segment s at data + r * row + segment[s] * 2 + i * run bytes, terms
// side by side.
struct Rows {
  const char* data;
  ptrdiff_t row;
  const ptrdiff_t* segment;
  int64_t segments;
  int64_t runs;  // of each segment
  ptrdiff_t run;
};

// Which of the operands passes L1 by, so that it keeps the other one for the next block.
enum class Passing { kRows, kWeights, kBoth };

// One block: 16 or 32 rows by 1, 2 or 4 panels.
struct Block {
  const Rows* a;
  const char* a_first;
  const char* b[4];
  // weights of the last run where K ends within it, filled up with zeros; else null
  const char* b_tail[4];
  Passing passing;
  // where the last block's sums, of as many tiles, are to go first, or null
  float* stored;
};

// What a run of K is in either operand, and its products. Sums are tiles 0 to 3, left operands 4 and 5, weights 6
// and 7.
struct Pairs {
  static constexpr Storage kStorage = Storage::kBfloat16;
  static constexpr ptrdiff_t kTiles = 1;
  static constexpr int64_t kSteps = 1;

  template <int MB, int NB, bool ROWS_ONCE, bool WEIGHTS_ONCE, class Meanwhile>
  static MNV4_INLINE void multiply_run(const Rows& rows, const char* a, const char* const* b, ptrdiff_t b_at,
                                       Meanwhile& meanwhile) {
    load_tile<6, WEIGHTS_ONCE>(b[0] + b_at, kTileRow);
    load_tile<4, ROWS_ONCE>(a, rows.row);
    multiply_tiles<0, 4, 6>();
    if constexpr (MB == 2) {
      load_tile<5, ROWS_ONCE>(a + kMatrixRows * rows.row, rows.row);
      multiply_tiles<NB, 5, 6>();
    }
    if constexpr (NB >= 2) {
      load_tile<7, WEIGHTS_ONCE>(b[1] + b_at, kTileRow);
      multiply_tiles<1, 4, 7>();
      if constexpr (MB == 2) multiply_tiles<3, 5, 7>();
    }
    if constexpr (NB == 4) {
      load_tile<6, WEIGHTS_ONCE>(b[2] + b_at, kTileRow);
      multiply_tiles<2, 4, 6>();
      load_tile<7, WEIGHTS_ONCE>(b[3] + b_at, kTileRow);
      multiply_tiles<3, 4, 7>();
    }
    meanwhile.step();
  }
};

// float32 as the sum of three bfloat16 on either side: of the nine products the six that may exceed 2^-25 of the whole,
// in an order in which each needs only one operand anew.
struct Terms {
  static constexpr Storage kStorage = Storage::kFloat32;
  static constexpr ptrdiff_t kTiles = kTerms;
  static constexpr int64_t kSteps = kTermProducts;

  template <int MB, int NB, bool ROWS_ONCE, bool WEIGHTS_ONCE, class Meanwhile>
  static MNV4_INLINE void multiply_run(const Rows& rows, const char* a, const char* const* b, ptrdiff_t b_at,
                                       Meanwhile& meanwhile) {
    static_assert(NB <= 2, "weights have two tiles");
    const auto take_rows = [&](int term) __attribute__((always_inline)) {
      const char* at = a + term * kTileRow;
      load_tile<4, ROWS_ONCE>(at, rows.row);
      if constexpr (MB == 2) load_tile<5, ROWS_ONCE>(at + kMatrixRows * rows.row, rows.row);
    };
    const auto take_weights = [&](int term) __attribute__((always_inline)) {
      load_tile<6, WEIGHTS_ONCE>(b[0] + b_at + term * kTileRow, kTerms * kTileRow);
      if constexpr (NB == 2) load_tile<7, WEIGHTS_ONCE>(b[1] + b_at + term * kTileRow, kTerms * kTileRow);
    };
    const auto multiply = [&]() __attribute__((always_inline)) {
      multiply_tiles<0, 4, 6>();
      if constexpr (MB == 2) multiply_tiles<NB, 5, 6>();
      if constexpr (NB == 2) multiply_tiles<1, 4, 7>();
      if constexpr (MB == 2 && NB == 2) multiply_tiles<3, 5, 7>();
      meanwhile.step();
    };
    take_rows(0);
    take_weights(2);
    multiply();
    take_weights(1);
    multiply();
    take_rows(1);
    multiply();
    take_weights(0);
    multiply();
    take_rows(2);
    multiply();
    take_rows(0);
    multiply();
  }
};

constexpr ptrdiff_t kSums = kMatrixRows * kPanel;

// What the tile held is stored at once, so that it is free again while the other ones still multiply.
template <int T>
MNV4_INLINE void begin_sums(float* stored) {
  if (stored) store_tile<T>(stored + T * kSums, kTileRow);
  clear_tile<T>();
}

// What is done between the products of a block, kSteps times a run: nothing, or two things.
struct Idle {
  MNV4_INLINE void step() {}
};
template <class First, class Second>
struct Both {
  First first;
  Second second;
  MNV4_INLINE void step() {
    first.step();
    second.step();
  }
};

// Sums stay in tiles 0 to 3.
template <class Operands, int MB, int NB, Passing PASSING, class Meanwhile>
void multiply_passing(const Block& t, Meanwhile& meanwhile) {
  static_assert(MB * NB <= 4, "as many sums as there are tiles for them");
  // in the order in which the last block's products end
  begin_sums<0>(t.stored);
  if constexpr (MB == 2) begin_sums<NB>(t.stored);
  if constexpr (NB >= 2) begin_sums<1>(t.stored);
  if constexpr (MB == 2 && NB == 2) begin_sums<3>(t.stored);
  if constexpr (NB == 4) begin_sums<2>(t.stored);
  if constexpr (NB == 4) begin_sums<3>(t.stored);
  constexpr bool kRowsOnce = PASSING != Passing::kWeights;
  constexpr bool kWeightsOnce = PASSING != Passing::kRows;
  constexpr ptrdiff_t kRun = Operands::kTiles * kTileBytes;
  const Rows& rows = *t.a;
  ptrdiff_t b_at = 0;
  for (int64_t s = 0; s < rows.segments; ++s) {
    const char* a = t.a_first + rows.segment[s] * static_cast<ptrdiff_t>(sizeof(Bf16));
    const int64_t runs = t.b_tail[0] ? rows.runs - 1 : rows.runs;
    for (int64_t i = 0; i < runs; ++i, a += rows.run, b_at += kRun) {
      Operands::template multiply_run<MB, NB, kRowsOnce, kWeightsOnce>(rows, a, t.b, b_at, meanwhile);
    }
    if (t.b_tail[0]) {
      Operands::template multiply_run<MB, NB, kRowsOnce, kWeightsOnce>(rows, a, t.b_tail, 0, meanwhile);
    }
  }
}

template <class Operands, int MB, int NB, class Meanwhile>
void multiply(const Block& t, Meanwhile meanwhile) {
  if (t.passing == Passing::kRows) return multiply_passing<Operands, MB, NB, Passing::kRows>(t, meanwhile);
  if (t.passing == Passing::kWeights) return multiply_passing<Operands, MB, NB, Passing::kWeights>(t, meanwhile);
  multiply_passing<Operands, MB, NB, Passing::kBoth>(t, meanwhile);
}

}  // namespace
}  // namespace mnv4
