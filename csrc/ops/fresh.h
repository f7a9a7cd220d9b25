// Memory that nobody has written made visible, for tests. Free of torch, for `_C`.
#pragma once

namespace mnv4 {

// While on, what the ops allocate begins as NaN.
void fill_fresh_memory(bool on);

}  // namespace mnv4
