// Products on AMX's tiles: 16 rows by 16 columns by 32 values of K in 16 cycles, two by two tiles of sums.
// Weights of bfloat16 are packed as for vdpbf16ps: 32 values of K of a panel are a tile as they lie.
//
// Included after simd/vec_avx512.h, by files compiled for AMX.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels/gemm/matrix_rows.h"
#include "kernels/gemm/matrix_runs.h"
#include "kernels/gemm/trickle.h"
#include "simd/activation.h"
#include "simd/stored.h"

namespace mnv4 {
namespace {

using simd::Vec;

template <class Operands, class Out>
class Product {
  using C = simd::Stored<Out>;

 public:
  Product(const GemmArgs& args, const Rows& rows, int64_t row_begin) : args_(args), rows_(rows), row_begin_(row_begin) {
    const int64_t k = args.segments * args.segment_length;
    // terms are filled up where they are made
    runs_ = kSplits ? div_up(k, kMatrixDepth) : k / kMatrixDepth;
    tail_bytes_ = kSplits ? 0 : k % kMatrixDepth / 2 * kTileRow;
    if (kSplits) split_ = buffer_for<Use::kWeights>(2 * runs_ * kRun);
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
        const bool alike = last.panels == panels && last.tiles == blocks * panels;
        block_.stored = alike ? sums_ : nullptr;
        if (!alike) store_sums(last.tiles);
        if (alike && panels == 2 && trickles(last)) {
          multiply_block(row == 0, blocks, last);
        } else {
          multiply_block(row == 0, blocks, panels);
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
  static constexpr bool kSplits = Operands::kTiles > 1;
  static constexpr ptrdiff_t kRun = Operands::kTiles * kTileBytes;

  // Half of an L1 for what stays.
  Passing passing(int64_t count) const {
    constexpr int64_t kStays = 24 * 1024;
    const int64_t pixel = rows_.segments > 1 ? rows_.row : rows_.runs * Operands::kTiles * kTileRow;
    if (rows_.segments * count * pixel <= kStays) return Passing::kWeights;
    return 2 * runs_ * kRun < kStays ? Passing::kRows : Passing::kBoth;
  }

  void place_weights(int64_t panel, int64_t panels) {
    block_.a = &rows_;
    for (int64_t p = 0; p < panels; ++p) {
      weights_[p] = static_cast<const char*>(advance(args_.b, Operands::kStorage, (panel + p) * args_.b_panel));
      block_.b[p] = kSplits ? split_ + p * runs_ * kRun : weights_[p];
      block_.b_tail[p] = nullptr;
      if (tail_bytes_ == 0) continue;
      std::memcpy(tails_[p], block_.b[p] + runs_ * kTileBytes, static_cast<size_t>(tail_bytes_));
      std::memset(tails_[p] + tail_bytes_, 0, static_cast<size_t>(kTileBytes - tail_bytes_));
      block_.b_tail[p] = tails_[p];
    }
  }

  // Weights in terms are made while the first rows are multiplied, each run before its products.
  template <int MB, int NB, class Meanwhile>
  void multiply_weights(bool first, const Meanwhile& meanwhile) const {
    if constexpr (kSplits) {
      if (first) {
        const float* panels[NB];
        for (int p = 0; p < NB; ++p) panels[p] = reinterpret_cast<const float*>(weights_[p]);
        const Splitter<NB> splitter(panels, args_.segments * args_.segment_length, split_);
        return multiply<Operands, MB, NB>(block_, Both<Meanwhile, Splitter<NB>>{meanwhile, splitter});
      }
    }
    multiply<Operands, MB, NB>(block_, meanwhile);
  }

  void multiply_block(bool first, int64_t blocks, int64_t panels) const {
    if constexpr (!kSplits) {
      if (panels == 4) return multiply<Operands, 1, 4>(block_, Idle{});
    }
    if (blocks == 2) return panels == 2 ? multiply_weights<2, 2>(first, Idle{}) : multiply_weights<2, 1>(first, Idle{});
    panels == 2 ? multiply_weights<1, 2>(first, Idle{}) : multiply_weights<1, 1>(first, Idle{});
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
  void multiply_block(bool first, int64_t blocks, const Sums& last) const {
    if (args_.residual) {
      return is_plain() ? multiply_while<true, true>(first, blocks, last)
                        : multiply_while<true, false>(first, blocks, last);
    }
    is_plain() ? multiply_while<false, true>(first, blocks, last) : multiply_while<false, false>(first, blocks, last);
  }

  template <bool RESIDUAL, bool PLAIN>
  void multiply_while(bool first, int64_t blocks, const Sums& last) const {
    const int64_t row = row_begin_ + last.row;
    const int64_t image = args_.image_rows ? row / args_.image_rows : 0;
    const int64_t pixel = args_.image_rows ? row % args_.image_rows : row;
    const int64_t pace = div_up(last.rows, rows_.segments * rows_.runs * Operands::kSteps);
    const Trickle<Out, RESIDUAL, PLAIN> epilogue(args_, sums_, last.panel, image, pixel, last.rows, pace);
    blocks == 2 ? multiply_weights<2, 2>(first, epilogue) : multiply_weights<1, 2>(first, epilogue);
  }

  // Whether a Trickle can finish these sums, of two panels.
  bool trickles(const Sums& sums) const {
    if ((sums.panel + 2) * kPanel > args_.n) return false;
    return std::is_same_v<Out, Bf16> ? writes_pairs(sums) : !args_.paired;
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
  const char* weights_[4];
  char* split_ = nullptr;
  alignas(64) float sums_[4 * kSums];
  alignas(64) char tails_[4][kTileBytes];
};

template <class Operands, class Out>
void pack_and_multiply(const GemmArgs& args, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                       int64_t panel_end) {
  const int64_t k = args.segments * args.segment_length;
  const int64_t most = std::min(row_end - row_begin, kRowsAtATime);
  const int64_t pitch = PackedRows::pitch(most);
  char* buffer = buffer_for<Use::kRows>(PackedRows::bytes(Operands::kStorage, most, k));
  const Rows rows = packed_rows<Operands>(buffer, pitch, k);
  for (int64_t row = row_begin; row < row_end; row += kRowsAtATime) {
    const int64_t end = std::min(row + kRowsAtATime, row_end);
    pack_rows<Operands>(args, row, end, buffer, pitch);
    Product<Operands, Out>(args, rows, row).run(end - row, panel_begin, panel_end, false);
  }
}

template <class Operands, class Out>
void product(const GemmArgs& args, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  const Session session;
  const int64_t count = row_end - row_begin;
  if (args.packed_pitch) {
    configure(kMatrixRows);
    const char* data = static_cast<const char*>(args.a) + row_begin * Operands::kTiles * kTileRow;
    const Rows rows = packed_rows<Operands>(data, args.packed_pitch, args.segments * args.segment_length);
    return Product<Operands, Out>(args, rows, row_begin).run(count, panel_begin, panel_end, false);
  }
  if constexpr (Operands::kStorage == Storage::kBfloat16) {
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
      return Product<Operands, Out>(args, rows, row_begin).run(count, panel_begin, panel_end, args.c_panel == kPanel);
    }
    configure(kMatrixRows);
    if (whole) Product<Operands, Out>(args, rows, row_begin).run(whole, panel_begin, panel_end, false);
    if (whole < count) pack_and_multiply<Operands, Out>(args, row_begin + whole, row_end, panel_begin, panel_end);
  } else {
    configure(std::min(count, kMatrixRows));
    pack_and_multiply<Operands, Out>(args, row_begin, row_end, panel_begin, panel_end);
  }
}

template <class Operands, class Out>
constexpr MatrixUnit kUnit{product<Operands, Out>, pack_rows<Operands>, begin, end, configure};

template <class Operands, class Out>
constexpr GemmKernel make_matrix_kernel(const char* name) {
  GemmKernel kernel{};
  kernel.name = name;
  kernel.input = Operands::kStorage;
  kernel.output = simd::Stored<Out>::kStorage;
  kernel.matrix = &kUnit<Operands, Out>;
  kernel.max_rows = kMatrixRows;
  return kernel;
}

// A kernel of register tiles that can also multiply float32 in terms.
constexpr GemmKernel with_split(GemmKernel kernel) {
  kernel.split = &kUnit<Terms, float>;
  return kernel;
}

}  // namespace
}  // namespace mnv4
