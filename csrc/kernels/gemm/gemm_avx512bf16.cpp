// The same tiles with pairs of bfloat16: vdpbf16ps, twice the rate of float32. The pair of a row is broadcast as an
// integer: as a float (vbroadcastss) it runs at 74% of peak.
#include "simd/vec_avx512.h"

#include "kernels/gemm/tile.h"

namespace mnv4 {
namespace {

using simd::Bf16;

template <>
struct Operand<Bf16> {
  static constexpr Storage kStorage = Storage::kBfloat16;
  static constexpr int kGroup = 2;
  using Packed = __m512i;
  static MNV4_INLINE Packed broadcast(const Bf16* p) {
    int pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  static MNV4_INLINE Packed load(const Bf16* p) { return _mm512_loadu_si512(p); }
  static MNV4_INLINE Vec multiply_add(Packed x, Packed w, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w))};
  }
};

}  // namespace

extern const GemmKernel gemm_bf16_bf16_avx512bf16 = make_gemm_kernel<Bf16, Bf16, 14, 3, 4>("gemm_bf16_bf16_avx512bf16");
extern const GemmKernel gemm_bf16_f32_avx512bf16 = make_gemm_kernel<Bf16, float, 14, 3, 4>("gemm_bf16_f32_avx512bf16");
extern const GemmKernel gemm_f32_bf16_avx512bf16 = make_gemm_kernel<float, Bf16, 14, 3, 4>("gemm_f32_bf16_avx512bf16");

}  // namespace mnv4
