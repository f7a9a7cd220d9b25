#include "kernels/attention/attention.h"

#include <algorithm>

#include "kernels/pointwise/pointwise.h"

namespace mnv4 {
namespace {

// Scores of two full tiles of rows stay in L1 for a few hundred keys.
int64_t block_rows(const GemmKernel& kernel) { return 2 * kernel.max_rows; }

// a panel more than the row: a pitch that is a power of two would put all rows in the same L1 sets
ptrdiff_t score_row(int64_t positions) { return round_up(positions, kPanel) + kPanel; }

}  // namespace

int64_t attention_scratch(const GemmKernel& kernel, int64_t positions) {
  return block_rows(kernel) * score_row(positions);
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

  GemmArgs mix = scores;
  mix.a = scratch;
  mix.a_row = scores.c_row;
  mix.segment_length = a.positions;
  mix.b = a.value;
  mix.b_panel = a.positions * kPanel;
  mix.c_row = a.value_dim;
  mix.n = a.value_dim;

  for (int64_t first = row_begin; first < row_end; first += block_rows(kernel)) {
    const int64_t rows = std::min(block_rows(kernel), row_end - first);
    scores.a = a.query + first * a.key_dim;
    gemm(kernel, scores, 0, rows, 0, div_up(a.positions, kPanel));
    pointwise_kernels().softmax_rows(scratch, rows, a.positions, scores.c_row, a.scale);
    mix.c = advance(a.y, mixing.output, first * a.value_dim);
    gemm(mixing, mix, 0, rows, 0, div_up(a.value_dim, kPanel));
  }
}

}  // namespace mnv4
