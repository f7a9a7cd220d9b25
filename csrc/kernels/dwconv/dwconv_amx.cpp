// Processors with AMX do half as many vdpbf16ps a cycle as float32 multiply-adds, of pairs that is no more than singly.
#include "simd/vec_avx512.h"

#include "kernels/dwconv/tile.h"

namespace mnv4 {

extern const DwconvKernel dwconv_bf16_bf16_amx = make_dwconv_kernel<simd::Bf16, simd::Bf16>("dwconv_bf16_bf16_amx");

}  // namespace mnv4
