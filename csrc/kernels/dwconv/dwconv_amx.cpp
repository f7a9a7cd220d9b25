// Processors with AMX do a quarter as many vdpbf16ps a cycle as float32 multiply-adds: in pairs it takes twice as long.
#include "simd/vec_avx512.h"

#include "kernels/dwconv/tile.h"

namespace mnv4 {

extern const DwconvKernel dwconv_bf16_bf16_amx = make_dwconv_kernel<simd::Bf16, simd::Bf16>("dwconv_bf16_bf16_amx");

}  // namespace mnv4
