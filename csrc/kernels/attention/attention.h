// softmax(Q K^T * scale) V for query rows that all share one K and one V.
//
// Heads of one position are adjacent in NHWC, so [positions][heads][Dk] is already the row-major matrix
// [positions * heads][Dk]: no transpose, no copy of Q or of the result.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/gemm/gemm.h"

namespace mnv4 {

// query, key and value are of the kernels' input type: with bfloat16 key and value are packed as pairs, the value with
// a row of zeros behind an odd number of positions.
struct AttentionArgs {
  const void* query;   // [rows][key_dim]
  const void* key;     // packed [ceil(P / 16)][key_dim][16]
  const void* value;   // packed [ceil(value_dim / 16)][mixed_positions][16]
  const float* zeros;  // [max(ceil(P / 16), ceil(value_dim / 16)) * 16] of bias
  void* y;             // [rows][value_dim], of the mixing kernel's output type
  int64_t positions;   // P, keys of an image
  int64_t key_dim;
  int64_t value_dim;
  float scale;
};

// Length of the mixing product's reduction.
inline int64_t mixed_positions(Storage type, int64_t positions) {
  return type == Storage::kFloat32 ? positions : round_up(positions, 2);
}

// Floats of scratch that one worker needs: the scores of one block of rows, and those rounded.
int64_t attention_scratch(const GemmKernel& kernel, int64_t positions);

// Query rows [row_begin, row_end). `kernel` has float32 out, `mixing` the same type in. Scores and softmax are float32.
void attention(const GemmKernel& kernel, const GemmKernel& mixing, const AttentionArgs& args, int64_t row_begin,
               int64_t row_end, float* scratch);

// The way back. Weights are computed anew. Sums over query rows are added to tiles [ceil(P / 16)][ceil(D / 16)][16][16]
// of the gradients of key and value; rows beyond P and columns beyond D hold nothing of use.
struct AttentionGradientArgs {
  const float* query;         // [rows][key_dim]
  const float* grad;          // [rows][value_dim]
  const float* key;           // packed [ceil(P / 16)][key_dim][16]
  const float* value;         // packed [ceil(P / 16)][value_dim][16]
  const float* key_by_depth;  // packed [ceil(key_dim / 16)][P][16]
  const float* zeros;         // [max(ceil(P / 16), ceil(key_dim / 16)) * 16] of bias
  float* dquery;              // [rows][key_dim]
  float* key_tiles;
  float* value_tiles;
  int64_t positions;
  int64_t key_dim;
  int64_t value_dim;
  float scale;
};

// Floats of the tiles of a gradient [positions][depth].
int64_t attention_tiles(int64_t positions, int64_t depth);

// Floats of scratch that one worker needs.
int64_t attention_gradient_scratch(const GemmKernel& kernel, int64_t positions, int64_t key_dim, int64_t value_dim);

// Query rows [row_begin, row_end); the tiles are written, not added to, by the first of them.
void attention_gradient(const GemmKernel& kernel, const AttentionGradientArgs& args, int64_t row_begin, int64_t row_end,
                        float* scratch);

}  // namespace mnv4
