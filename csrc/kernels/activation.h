// The activations of every epilogue.
#pragma once

#include <cstring>

namespace mnv4 {

enum class Activation { kNone, kRelu, kRelu6, kHardSwish, kSilu, kGelu, kGeluTanh };

// By the names of mnv4_kernels/ops/activation.py, in the enumeration's order.
inline constexpr const char* kActivationNames[] = {"none", "relu", "relu6", "hard_swish", "silu", "gelu", "gelu_tanh"};

inline bool parse_activation(const char* name, Activation* act) {
  int index = 0;
  for (const char* candidate : kActivationNames) {
    if (std::strcmp(candidate, name) == 0) {
      *act = static_cast<Activation>(index);
      return true;
    }
    ++index;
  }
  return false;
}

}  // namespace mnv4
