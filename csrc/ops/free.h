// The end of an engine, for `_C`: garbage is collected at any time, and an op would be subject to whoever traces ops.
#pragma once

#include <cstdint>

namespace mnv4 {

// Frees the engine when the last call of it is done; nothing where there is none.
void engine_free(int64_t handle);

}  // namespace mnv4
