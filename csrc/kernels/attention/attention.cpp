#include "kernels/attention/attention.h"

#include <algorithm>

#include "kernels/pointwise/pointwise.h"
#include "kernels/training/training.h"

namespace mnv4 {
namespace {

// Scores of two full tiles of rows stay in L1 for a few hundred keys.
int64_t block_rows(const GemmKernel& kernel) { return 2 * kernel.max_rows; }

// a panel more than the row: a pitch that is a power of two would put all rows in the same L1 sets
ptrdiff_t score_row(int64_t positions) { return round_up(positions, kPanel) + kPanel; }

// Rows of the way back: each tile of a gradient is read and written once a block.
int64_t gradient_rows(const GemmKernel& kernel) { return 4 * kernel.max_rows; }

GemmArgs product(const float* a, ptrdiff_t a_row, int64_t k, const float* packed, const float* zeros, float* c,
                 ptrdiff_t c_row, int64_t n) {
  static const ptrdiff_t whole_row = 0;
  GemmArgs args{};
  args.a = a;
  args.a_row = a_row;
  args.segment = &whole_row;
  args.segments = 1;
  args.segment_length = k;
  args.b = packed;
  args.b_panel = k * kPanel;
  args.bias = zeros;
  args.c = c;
  args.c_row = c_row;
  args.c_panel = kPanel;
  args.n = n;
  args.act = Activation::kNone;
  return args;
}

// Rows whose last 16 columns may be read whole: the rows themselves, or a copy.
struct Rows {
  const float* data;
  ptrdiff_t row;
};
Rows padded(const float* rows, int64_t count, int64_t depth, float* copy) {
  const int64_t width = round_up(depth, kPanel);
  if (width == depth) return {rows, depth};
  for (int64_t i = 0; i < count; ++i) std::copy_n(rows + i * depth, depth, copy + i * width);
  return {copy, width};
}

// tiles[p][d] += left^T right over rows
void add_outer(const float* left, ptrdiff_t left_row, int64_t positions, const Rows& right, int64_t depth, int64_t rows,
               bool first, float* tiles) {
  for (int64_t p = 0; p < positions; p += kPanel) {
    for (int64_t d = 0; d < depth; d += kPanel, tiles += kPanel * kPanel) {
      training_kernels().outer({left + p, 0, left_row, right.data + d, 0, right.row, 1, rows, tiles, first});
    }
  }
}

}  // namespace

int64_t attention_scratch(const GemmKernel& kernel, int64_t positions) {
  const int64_t floats = block_rows(kernel) * score_row(positions);
  return kernel.input == Storage::kFloat32 ? floats : 2 * floats;
}

void attention(const GemmKernel& kernel, const GemmKernel& mixing, const AttentionArgs& a, int64_t row_begin,
               int64_t row_end, float* scratch) {
  const ptrdiff_t whole_row = 0;
  GemmArgs scores{};
  scores.a_row = a.key_dim;
  scores.segment = &whole_row;
  scores.segments = 1;
  scores.segment_length = a.key_dim;
  scores.b = a.key;
  scores.b_panel = a.key_dim * kPanel;
  scores.bias = a.zeros;
  scores.c = scratch;
  scores.c_row = score_row(a.positions);
  scores.c_panel = kPanel;
  scores.n = a.positions;
  scores.act = Activation::kNone;

  const bool rounds = mixing.input != Storage::kFloat32;
  float* weights = rounds ? scratch + block_rows(kernel) * scores.c_row : scratch;
  GemmArgs mix = scores;
  mix.a = weights;
  mix.a_row = scores.c_row;
  mix.segment_length = mixed_positions(mixing.input, a.positions);
  mix.b = a.value;
  mix.b_panel = mix.segment_length * kPanel;
  mix.c_row = a.value_dim;
  mix.n = a.value_dim;

  for (int64_t first = row_begin; first < row_end; first += block_rows(kernel)) {
    const int64_t rows = std::min(block_rows(kernel), row_end - first);
    scores.a = advance(a.query, kernel.input, first * a.key_dim);
    gemm(kernel, scores, 0, rows, 0, div_up(a.positions, kPanel));
    pointwise_kernels().softmax_rows(scratch, rows, a.positions, scores.c_row, a.scale);
    for (int64_t r = 0; rounds && r < rows; ++r) {
      float* row = scratch + r * scores.c_row;
      if (mix.segment_length > a.positions) row[a.positions] = 0.0f;
      void* rounded = advance(static_cast<void*>(weights), mixing.input, r * mix.a_row);
      pointwise_kernels().narrow(row, mixing.input, rounded, mix.segment_length);
    }
    mix.c = advance(a.y, mixing.output, first * a.value_dim);
    gemm(mixing, mix, 0, rows, 0, div_up(a.value_dim, kPanel));
  }
}

int64_t attention_tiles(int64_t positions, int64_t depth) {
  return round_up(positions, kPanel) * round_up(depth, kPanel);
}

int64_t attention_gradient_scratch(const GemmKernel& kernel, int64_t positions, int64_t key_dim, int64_t value_dim) {
  return gradient_rows(kernel) * (2 * score_row(positions) + round_up(key_dim, kPanel) + round_up(value_dim, kPanel));
}

void attention_gradient(const GemmKernel& kernel, const AttentionGradientArgs& a, int64_t row_begin, int64_t row_end,
                        float* scratch) {
  const int64_t block = gradient_rows(kernel);
  const ptrdiff_t pitch = score_row(a.positions);
  float* weights = scratch;
  float* dweights = weights + block * pitch;
  float* query_copy = dweights + block * pitch;
  float* grad_copy = query_copy + block * round_up(a.key_dim, kPanel);
  const int64_t panels = div_up(a.positions, kPanel);
  for (int64_t first = row_begin; first < row_end; first += block) {
    const int64_t rows = std::min(block, row_end - first);
    const float* query = a.query + first * a.key_dim;
    const float* grad = a.grad + first * a.value_dim;
    gemm(kernel, product(query, a.key_dim, a.key_dim, a.key, a.zeros, weights, pitch, a.positions), 0, rows, 0, panels);
    pointwise_kernels().softmax_rows(weights, rows, a.positions, pitch, a.scale);
    const bool begin = first == row_begin;
    add_outer(weights, pitch, a.positions, padded(grad, rows, a.value_dim, grad_copy), a.value_dim, rows, begin,
              a.value_tiles);
    gemm(kernel, product(grad, a.value_dim, a.value_dim, a.value, a.zeros, dweights, pitch, a.positions), 0, rows, 0,
         panels);
    pointwise_kernels().softmax_gradient_rows(weights, dweights, rows, a.positions, pitch, a.scale);
    add_outer(dweights, pitch, a.positions, padded(query, rows, a.key_dim, query_copy), a.key_dim, rows, begin,
              a.key_tiles);
    gemm(kernel,
         product(dweights, pitch, a.positions, a.key_by_depth, a.zeros, a.dquery + first * a.key_dim, a.key_dim,
                 a.key_dim),
         0, rows, 0, div_up(a.key_dim, kPanel));
  }
}

}  // namespace mnv4
