// The roofline's ceiling: multiply-adds on registers alone, as many as the processor can do.
#pragma once

#include <cstdint>

namespace mnv4 {

struct PeakKernel {
  const char* name;
  // floating point operations of one iteration, a multiply-add counted as two
  int64_t operations;
  // Returns something of every sum, so that none can be left out.
  float (*run)(int64_t iterations);
};

// The first kernel of the list that the active tier can run and whose operands are bfloat16 or float32 as asked for;
// the float32 one where no tier multiplies bfloat16.
const PeakKernel& peak_kernel(bool bf16);

// GFLOP/s of `threads` threads at once, the best of a few tries of some milliseconds.
double peak_gflops(bool bf16, int threads);

}  // namespace mnv4
