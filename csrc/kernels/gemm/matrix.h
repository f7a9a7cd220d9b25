// Products of bfloat16 on AMX's tiles: 16 rows by 16 columns by 32 values of K in 16 cycles, two by two tiles of sums.
// Weights are packed as for vdpbf16ps: 32 values of K of a panel are a tile as they lie.
//
// Included after simd/vec_avx512.h, by files compiled for AMX.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels/gemm/amx.h"
#include "simd/activation.h"
#include "simd/stored.h"

namespace mnv4 {
namespace {

using simd::Bf16;
using simd::Vec;

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

// Left operands where they lie: row r, run i of segment s at data + r * row + segment[s] * 2 + i * run bytes.
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
  const char* ahead[4];
  Passing passing;
  // where the last block's sums, of as many tiles, are to go first, or null
  float* stored;
};

MNV4_INLINE void fetch(const char* line) {
#pragma GCC unroll 16
  for (int i = 0; i < kMatrixRows; ++i) __builtin_prefetch(line + i * kTileRow, 0, 2);
}

// Sums are tiles 0 to 3, left operands 4 and 5, weights 6 and 7.
template <int MB, int NB, Passing PASSING>
MNV4_INLINE void multiply_run(const char* a, ptrdiff_t a_row, const char* const* b, ptrdiff_t b_at) {
  constexpr bool kRowsOnce = PASSING != Passing::kWeights;
  constexpr bool kWeightsOnce = PASSING != Passing::kRows;
  load_tile<6, kWeightsOnce>(b[0] + b_at, kTileRow);
  load_tile<4, kRowsOnce>(a, a_row);
  multiply_tiles<0, 4, 6>();
  if constexpr (MB == 2) {
    load_tile<5, kRowsOnce>(a + kMatrixRows * a_row, a_row);
    multiply_tiles<NB, 5, 6>();
  }
  if constexpr (NB >= 2) {
    load_tile<7, kWeightsOnce>(b[1] + b_at, kTileRow);
    multiply_tiles<1, 4, 7>();
    if constexpr (MB == 2) multiply_tiles<3, 5, 7>();
  }
  if constexpr (NB == 4) {
    load_tile<6, kWeightsOnce>(b[2] + b_at, kTileRow);
    multiply_tiles<2, 4, 6>();
    load_tile<7, kWeightsOnce>(b[3] + b_at, kTileRow);
    multiply_tiles<3, 4, 7>();
  }
}

constexpr ptrdiff_t kSums = kMatrixRows * kPanel;

// What the tile held is stored at once, so that it is free again while the other ones still multiply.
template <int T>
MNV4_INLINE void begin_sums(float* stored) {
  if (stored) store_tile<T>(stored + T * kSums, kTileRow);
  clear_tile<T>();
}

// Nothing to do between the runs of a block.
struct Idle {
  MNV4_INLINE void step() {}
};

// Sums stay in tiles 0 to 3.
template <int MB, int NB, Passing PASSING, class Meanwhile>
void multiply_passing(const Block& t, Meanwhile& meanwhile) {
  static_assert(MB * NB <= 4, "as many sums as there are tiles for them");
  // in the order in which the last block's products end
  begin_sums<0>(t.stored);
  if constexpr (MB == 2) begin_sums<NB>(t.stored);
  if constexpr (NB >= 2) begin_sums<1>(t.stored);
  if constexpr (MB == 2 && NB == 2) begin_sums<3>(t.stored);
  if constexpr (NB == 4) begin_sums<2>(t.stored);
  if constexpr (NB == 4) begin_sums<3>(t.stored);
  const Rows& rows = *t.a;
  ptrdiff_t b_at = 0;
  for (int64_t s = 0; s < rows.segments; ++s) {
    const char* a = t.a_first + rows.segment[s] * static_cast<ptrdiff_t>(sizeof(Bf16));
    const int64_t runs = t.b_tail[0] ? rows.runs - 1 : rows.runs;
    for (int64_t i = 0; i < runs; ++i, a += rows.run, b_at += kTileBytes) {
#pragma GCC unroll 4
      for (int p = 0; p < NB; ++p) {
        if (t.ahead[p]) fetch(t.ahead[p] + b_at);
      }
      multiply_run<MB, NB, PASSING>(a, rows.row, t.b, b_at);
      meanwhile.step();
    }
    if (t.b_tail[0]) {
      multiply_run<MB, NB, PASSING>(a, rows.row, t.b_tail, 0);
      meanwhile.step();
    }
  }
}

template <int MB, int NB, class Meanwhile>
void multiply(const Block& t, Meanwhile meanwhile) {
  if (t.passing == Passing::kRows) return multiply_passing<MB, NB, Passing::kRows>(t, meanwhile);
  if (t.passing == Passing::kWeights) return multiply_passing<MB, NB, Passing::kWeights>(t, meanwhile);
  multiply_passing<MB, NB, Passing::kBoth>(t, meanwhile);
}

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
        beside = beside + C::load(residual_ + kPanel);
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
  const Out* residual_ = nullptr;
  // of both panels, as is gamma
  Vec first_;
  Vec second_;
  Vec least_;
  Activation act_;
  Vec gamma_ = Vec::broadcast(1.0f);
  Vec second_gamma_ = Vec::broadcast(1.0f);
};

template <class Out>
class Product {
  using C = simd::Stored<Out>;

 public:
  Product(const GemmArgs& args, const Rows& rows, int64_t row_begin) : args_(args), rows_(rows), row_begin_(row_begin) {
    const int64_t k = args.segments * args.segment_length;
    runs_ = k / kMatrixDepth;
    tail_bytes_ = k % kMatrixDepth / 2 * kTileRow;
  }

  // `count` rows, the first of which is row_begin and lies at rows.data
  void run(int64_t count, int64_t panel_begin, int64_t panel_end, bool wide) {
    Sums last{};
    block_.passing = passing(count);
    for (int64_t panel = panel_begin; panel < panel_end;) {
      const int64_t left = panel_end - panel;
      const int64_t panels = wide && left >= 4 ? 4 : left >= 2 ? 2 : 1;
      place_weights(panel, panels);
      for (int64_t row = 0; row < count;) {
        const int64_t blocks = panels < 4 && count - row > kMatrixRows ? 2 : 1;
        const int64_t rows = std::min(count - row, blocks * kMatrixRows);
        block_.a_first = rows_.data + row * rows_.row;
        for (int64_t p = 0; p < panels; ++p) take_ahead(p);
        const bool alike = last.panels == panels && last.tiles == blocks * panels;
        block_.stored = alike ? sums_ : nullptr;
        if (!alike) store_sums(last.tiles);
        if (alike && panels == 2 && trickles(last)) {
          multiply_block(blocks, last);
        } else {
          multiply_block(blocks, panels);
          finish(last);
        }
        last = {row, rows, panel, panels, blocks * panels};
        row += rows;
      }
      panel += panels;
    }
    store_sums(last.tiles);
    finish(last);
  }

 private:
  // Half of an L1 for what stays.
  Passing passing(int64_t count) const {
    constexpr int64_t kStays = 24 * 1024;
    const int64_t pixel = rows_.segments > 1 ? rows_.row : rows_.runs * kTileRow;
    if (rows_.segments * count * pixel <= kStays) return Passing::kWeights;
    return 2 * runs_ * kTileBytes < kStays ? Passing::kRows : Passing::kBoth;
  }

  void place_weights(int64_t panel, int64_t panels) {
    block_.a = &rows_;
    for (int64_t p = 0; p < panels; ++p) {
      block_.b[p] = static_cast<const char*>(advance(args_.b, Storage::kBfloat16, (panel + p) * args_.b_panel));
      block_.b_tail[p] = nullptr;
      if (tail_bytes_ == 0) continue;
      std::memcpy(tails_[p], block_.b[p] + runs_ * kTileBytes, static_cast<size_t>(tail_bytes_));
      std::memset(tails_[p] + tail_bytes_, 0, static_cast<size_t>(kTileBytes - tail_bytes_));
      block_.b_tail[p] = tails_[p];
    }
  }

  void take_ahead(int64_t p) {
    const ptrdiff_t ahead = args_.stream ? args_.stream->take(block_.b[p], runs_ * kTileBytes) : 0;
    block_.ahead[p] = ahead ? block_.b[p] + ahead : nullptr;
  }

  void multiply_block(int64_t blocks, int64_t panels) const {
    if (panels == 4) return multiply<1, 4>(block_, Idle{});
    if (blocks == 2) return panels == 2 ? multiply<2, 2>(block_, Idle{}) : multiply<2, 1>(block_, Idle{});
    panels == 2 ? multiply<1, 2>(block_, Idle{}) : multiply<1, 1>(block_, Idle{});
  }

  // Sums of `rows` rows of `panels` panels: [rows / 16][panels][16][16].
  struct Sums {
    int64_t row;
    int64_t rows;
    int64_t panel;
    int64_t panels;
    int64_t tiles;
  };

  // Two panels, while the sums of two are finished.
  void multiply_block(int64_t blocks, const Sums& last) const {
    if constexpr (std::is_same_v<Out, Bf16>) {
      if (args_.residual) {
        return is_plain() ? multiply_while<true, true>(blocks, last) : multiply_while<true, false>(blocks, last);
      }
    }
    is_plain() ? multiply_while<false, true>(blocks, last) : multiply_while<false, false>(blocks, last);
  }

  template <bool RESIDUAL, bool PLAIN>
  void multiply_while(int64_t blocks, const Sums& last) const {
    const int64_t row = row_begin_ + last.row;
    const int64_t image = args_.image_rows ? row / args_.image_rows : 0;
    const int64_t pixel = args_.image_rows ? row % args_.image_rows : row;
    const int64_t pace = div_up(last.rows, rows_.segments * rows_.runs);
    const Trickle<Out, RESIDUAL, PLAIN> epilogue(args_, sums_, last.panel, image, pixel, last.rows, pace);
    blocks == 2 ? multiply<2, 2>(block_, epilogue) : multiply<1, 2>(block_, epilogue);
  }

  // Whether a Trickle can finish these sums, of two panels.
  bool trickles(const Sums& sums) const {
    if ((sums.panel + 2) * kPanel > args_.n) return false;
    return std::is_same_v<Out, Bf16> ? writes_pairs(sums) : !args_.residual && !args_.paired;
  }

  void store_sums(int64_t tiles) {
    if (tiles >= 1) store_tile<0>(sums_, kTileRow);
    if (tiles >= 2) store_tile<1>(sums_ + kSums, kTileRow);
    if (tiles < 4) return;
    store_tile<2>(sums_ + 2 * kSums, kTileRow);
    store_tile<3>(sums_ + 3 * kSums, kTileRow);
  }

  // The epilogue.
  void finish(const Sums& sums) const {
    for (int64_t first = 0; first < sums.rows;) {
      // rows of one image and one tile
      const int64_t row = row_begin_ + sums.row + first;
      int64_t image = 0;
      int64_t pixel = row;
      int64_t end = std::min(sums.rows, (first / kMatrixRows + 1) * kMatrixRows);
      if (args_.image_rows) {
        image = row / args_.image_rows;
        pixel = row % args_.image_rows;
        end = std::min(end, first + args_.image_rows - pixel);
      }
      const float* values = sums_ + (first / kMatrixRows) * sums.panels * kSums + first % kMatrixRows * kPanel;
      if (is_plain() && writes_pairs(sums)) {
        finish_rows<true>(values, image, pixel, end - first, sums.panel);
      } else {
        for (int64_t p = 0; p < sums.panels; ++p, values += kSums) {
          finish_rows<false>(values, image, pixel, end - first, sums.panel + p);
        }
      }
      first = end;
    }
  }

  bool is_plain() const { return !args_.gamma && (args_.act == Activation::kNone || args_.act == Activation::kRelu); }

  // Whether a pixel's two panels lie side by side and can be written together.
  bool writes_pairs(const Sums& sums) const {
    if (!std::is_same_v<Out, Bf16> || !args_.paired || sums.panels != 2 || sums.panel % 2) return false;
    return !args_.residual || args_.residual_paired;
  }

  // Of a panel, or of a pair of them.
  template <bool PAIR>
  void finish_rows(const float* values, int64_t image, int64_t pixel, int64_t count, int64_t panel) const {
    const auto columns = static_cast<int>(std::min<int64_t>(kPanel, args_.n - panel * kPanel));
    auto* c = static_cast<Out*>(args_.c) + image * args_.c_image + pixel * args_.c_row + args_.c_at(panel);
    const Out* residual = nullptr;
    if (args_.residual) {
      residual = static_cast<const Out*>(args_.residual) + image * args_.residual_image + pixel * args_.residual_row +
                 args_.residual_at(panel);
    }
    if (args_.paired && panel % 2 == 0 && (panel + 1) * kPanel >= args_.n) {
      for (int64_t r = 0; r < count; ++r) C::store(c + r * args_.c_row + kPanel, Vec::zero());
    }
    const float* bias = args_.bias + panel * kPanel;
    if (columns == kPanel && is_plain()) {
      const Vec least = Vec::broadcast(args_.act == Activation::kRelu ? 0.0f : -__builtin_inff());
      if (residual) return finish_plain<true, PAIR>(values, bias, least, count, c, residual);
      return finish_plain<false, PAIR>(values, bias, least, count, c, residual);
    }
    const Vec first = Vec::load(bias);
    const Vec gamma = args_.gamma ? Vec::load(args_.gamma + panel * kPanel) : Vec::broadcast(1.0f);
    for (int64_t r = 0; r < count; ++r) {
      Vec y = simd::activate(args_.act, Vec::load(values + r * kPanel) + first);
      if (args_.gamma) y = y * gamma;
      if (residual) y = y + C::load(residual + r * args_.residual_row, columns);
      C::store(c + r * args_.c_row, y, columns);
    }
  }

  template <bool RESIDUAL, bool PAIR>
  void finish_plain(const float* values, const float* bias, Vec least, int64_t count, Out* c,
                    const Out* residual) const {
    const Vec first = Vec::load(bias);
    const Vec second = PAIR ? Vec::load(bias + kPanel) : Vec::zero();
    const ptrdiff_t c_row = args_.c_row;
    const ptrdiff_t residual_row = args_.residual_row;
    const auto row = [&](int64_t r) __attribute__((always_inline)) {
      Vec y = max(least, Vec::load(values + r * kPanel) + first);
      if constexpr (RESIDUAL) y = y + C::load(residual + r * residual_row);
      if constexpr (PAIR && std::is_same_v<Out, Bf16>) {
        Vec beside = max(least, Vec::load(values + kSums + r * kPanel) + second);
        if constexpr (RESIDUAL) beside = beside + C::load(residual + r * residual_row + kPanel);
        Vec::store_bf16_pair(c + r * c_row, y, beside);
      } else {
        C::store(c + r * c_row, y);
      }
    };
    if (count == kMatrixRows) {
#pragma GCC unroll 16
      for (int64_t r = 0; r < kMatrixRows; ++r) row(r);
    } else {
      for (int64_t r = 0; r < count; ++r) row(r);
    }
  }

  const GemmArgs& args_;
  const Rows& rows_;
  int64_t row_begin_;
  int64_t runs_;
  int64_t tail_bytes_;
  Block block_{};
  alignas(64) float sums_[4 * kSums];
  alignas(64) char tails_[4][kTileBytes];
};

MNV4_INLINE __mmask32 first_values(int64_t n) { return n >= kMatrixDepth ? ~__mmask32{0} : (__mmask32{1} << n) - 1; }

void pack_rows(const GemmArgs& args, int64_t row_begin, int64_t row_end, void* to, int64_t pitch) {
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

// Rows that are packed at a time where the caller has not done it: half of an L1 for a few hundred values of K.
constexpr int64_t kRowsAtATime = 8 * kMatrixRows;

char* row_buffer(int64_t values) {
  static thread_local std::vector<char> buffer;
  const auto bytes = static_cast<size_t>(values) * sizeof(Bf16) + kTileRow;
  if (buffer.size() < bytes) buffer.resize(bytes);
  const auto address = reinterpret_cast<uintptr_t>(buffer.data());
  return buffer.data() + (kTileRow - address % kTileRow) % kTileRow;
}

constexpr ptrdiff_t kWholeRow = 0;

Rows packed_rows(const char* data, int64_t pitch, int64_t k) {
  return {data, kTileRow, &kWholeRow, 1, div_up(k, kMatrixDepth), pitch * kTileRow};
}

template <class Out>
void pack_and_multiply(const GemmArgs& args, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                       int64_t panel_end) {
  const int64_t k = args.segments * args.segment_length;
  const int64_t most = std::min(row_end - row_begin, kRowsAtATime);
  const int64_t pitch = PackedRows::pitch(most);
  char* buffer = row_buffer(PackedRows::values(most, k));
  const Rows rows = packed_rows(buffer, pitch, k);
  for (int64_t row = row_begin; row < row_end; row += kRowsAtATime) {
    const int64_t end = std::min(row + kRowsAtATime, row_end);
    pack_rows(args, row, end, buffer, pitch);
    Product<Out>(args, rows, row).run(end - row, panel_begin, panel_end, false);
  }
}

template <class Out>
void product(const GemmArgs& args, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  const Session session;
  const int64_t count = row_end - row_begin;
  const int64_t k = args.segments * args.segment_length;
  if (args.packed_pitch) {
    configure(kMatrixRows);
    const char* data = static_cast<const char*>(args.a) + row_begin * kTileRow;
    const Rows rows = packed_rows(data, args.packed_pitch, k);
    return Product<Out>(args, rows, row_begin).run(count, panel_begin, panel_end, false);
  }
  const bool in_place = args.segment_length % kMatrixDepth == 0;
  // a tile reads all of its rows: the last ones, if they fill none, are copied
  const int64_t whole = !in_place ? 0 : args.rows_behind >= kMatrixRows ? count : count / kMatrixRows * kMatrixRows;
  const auto* a = static_cast<const Bf16*>(args.a) + row_begin * args.a_row;
  const Rows rows{reinterpret_cast<const char*>(a),
                  args.a_row * static_cast<ptrdiff_t>(sizeof(Bf16)),
                  args.segment,
                  args.segments,
                  args.segment_length / kMatrixDepth,
                  kTileRow};
  if (in_place && count < kMatrixRows) {
    // few rows, whose time is that of reading the weights
    configure(count);
    return Product<Out>(args, rows, row_begin).run(count, panel_begin, panel_end, args.c_panel == kPanel);
  }
  configure(kMatrixRows);
  if (whole) Product<Out>(args, rows, row_begin).run(whole, panel_begin, panel_end, false);
  if (whole < count) pack_and_multiply<Out>(args, row_begin + whole, row_end, panel_begin, panel_end);
}

template <class Out>
constexpr MatrixUnit kUnit{product<Out>, pack_rows, begin, end, configure};

template <class Out>
constexpr GemmKernel make_matrix_kernel(const char* name) {
  GemmKernel kernel{};
  kernel.name = name;
  kernel.input = Storage::kBfloat16;
  kernel.output = simd::Stored<Out>::kStorage;
  kernel.matrix = &kUnit<Out>;
  kernel.max_rows = kMatrixRows;
  kernel.wide_panels = 4;
  return kernel;
}

}  // namespace
}  // namespace mnv4
