// A whole network as the engine reads it: one row of integers a node, in execution order, and a list of arrays.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/activation.h"

namespace mnv4::engine {

enum class Kind : int64_t { kInput, kConv, kDepthwise, kPointwise, kAttention, kPool, kLinear, kOutput };
inline constexpr const char* kKindNames[] = {"input",     "conv", "depthwise", "pointwise",
                                             "attention", "pool", "linear",    "output"};

// How taps outside the image read: zeros with explicit or TF 'same' amounts, or the image reflected at its border.
enum class PadMode : int64_t { kExplicit, kSame, kReflect };
inline constexpr const char* kPadModeNames[] = {"explicit", "same", "reflect"};

// The node's fields in the row's order. A node's id is its row; `input` and `residual` are ids, -1 for none. An
// output's `channels` is its tag: a run asks for the outputs of one tag. `weight` is the first of the node's arrays:
//   conv, depthwise, pointwise, linear: weight, bias
//   attention: norm scale, norm shift, query, query bias, key down, key shift, key, key bias, value down, value shift,
//              value, value bias, output, output bias; the down arrays are empty where K/V is not downsampled
// clang-format off
#define MNV4_ENGINE_FIELDS(FIELD) \
  FIELD(kind) FIELD(input) FIELD(residual) FIELD(weight) FIELD(channels) \
  FIELD(kernel_h) FIELD(kernel_w) FIELD(stride_h) FIELD(stride_w) FIELD(pad_top) \
  FIELD(pad_bottom) FIELD(pad_left) FIELD(pad_right) FIELD(pad_mode) FIELD(dilation_h) \
  FIELD(dilation_w) FIELD(act) FIELD(heads) FIELD(key_dim) FIELD(value_dim)
// clang-format on

struct Node {
#define MNV4_ENGINE_FIELD(name) int64_t name = 0;
  MNV4_ENGINE_FIELDS(MNV4_ENGINE_FIELD)
#undef MNV4_ENGINE_FIELD

  Kind what() const { return static_cast<Kind>(kind); }
  Activation activation() const { return static_cast<Activation>(act); }
};

#define MNV4_ENGINE_FIELD(name) #name,
inline constexpr const char* kFieldNames[] = {MNV4_ENGINE_FIELDS(MNV4_ENGINE_FIELD)};
#undef MNV4_ENGINE_FIELD
inline constexpr int64_t kFields = sizeof kFieldNames / sizeof *kFieldNames;

struct Array {
  const float* data = nullptr;
  int64_t size = 0;
};

struct Program {
  std::vector<Node> nodes;
  std::vector<Array> arrays;
};

// Rows to nodes; on a row that no plan could follow, an empty list and the reason.
std::vector<Node> decode(const int64_t* rows, int64_t count, int64_t arrays, std::string* error);

}  // namespace mnv4::engine
