#include <algorithm>
#include <cmath>
#include <cstring>

#include "simd/vec_avx512.h"

#include "kernels/gemm/amx.h"
#include "kernels/stem/stem.h"
#include "simd/activation.h"

namespace mnv4 {
namespace {

using simd::Vec;

constexpr ptrdiff_t kTileRow = 64;
constexpr int64_t kSums = kMatrixRows * kPanel;
// bytes of 8 channels
constexpr int kQuarter = 16;

MNV4_INLINE uint32_t bfloat16(float x) {
  uint16_t rounded[Vec::kWidth];
  Vec::broadcast(x).store_bf16(rounded);
  return rounded[0];
}

// In a row of packed weights lie taps (0, 1, 2) of channels (0, 1, 2) one behind the other, the last one beside a zero.
void pack(const ConvArgs& args, void* weights) {
  auto* tile = static_cast<uint32_t*>(weights);
  const int64_t panels = div_up(args.out_channels, kPanel);
  constexpr int64_t kDepth = kStemRows * kStemPairs;
  constexpr uint32_t kHigh = 0xffff0000;
  std::fill_n(tile, round_up(panels, 2) * kPanel * kPanel, 0u);
  for (int64_t panel = 0; panel < panels; ++panel) {
    const auto* packed = static_cast<const uint32_t*>(args.weight) + panel * kDepth * kPanel;
    for (int64_t n = 0; n < kPanel; ++n, tile += kPanel) {
      for (int64_t ky = 0; ky < kStemRows; ++ky) {
        const uint32_t* from = packed + ky * kStemPairs * kPanel + n;
        uint32_t* to = tile + ky * kStemPairs;
        const uint32_t a = from[0];
        const uint32_t b = from[kPanel];
        const uint32_t c = from[2 * kPanel];
        const uint32_t d = from[3 * kPanel];
        const uint32_t e = from[4 * kPanel];
        if (args.pad_left % 2 == 0) {
          // taps 0 and 1, then 2
          to[0] = (a & ~kHigh) | (b & kHigh);
          to[1] = a >> 16 | c << 16;
          to[2] = (b & ~kHigh) | (c & kHigh);
          to[3] = d;
          to[4] = e;
        } else {
          // taps 1 and 2, then 0
          to[0] = b >> 16 | d << 16;
          to[1] = (c & ~kHigh) | (d & kHigh);
          to[2] = c >> 16 | e << 16;
          to[3] = a;
          to[4] = b & ~kHigh;
        }
      }
      const float bias = args.bias[panel * kPanel + n];
      const uint32_t high = bfloat16(bias);
      const uint32_t bits = high << 16;
      float rounded;
      std::memcpy(&rounded, &bits, sizeof rounded);
      // the two halves are exact to 2^-17 of it
      const uint32_t rest = std::isfinite(rounded) ? bfloat16(bias - rounded) : 0;
      tile[kDepth] = high | rest << 16;
    }
  }
}

// The first n lanes.
MNV4_INLINE __mmask16 lanes(int64_t n) {
  return n <= 0 ? __mmask16{0} : n >= Vec::kWidth ? ~__mmask16{0} : Vec::mask(static_cast<int>(n));
}

// Channel c of 16 pixels of three, whose values are in a, b and c.
template <int C>
MNV4_INLINE __m512 channel(__m512 a, __m512 b, __m512 c) {
  alignas(64) static constexpr auto kIndex = [] {
    struct {
      int ab[Vec::kWidth];
      int abc[Vec::kWidth];
    } index{};
    for (int i = 0; i < Vec::kWidth; ++i) {
      const int at = 3 * i + C;
      index.ab[i] = at < 2 * Vec::kWidth ? at : 0;
      index.abc[i] = at < 2 * Vec::kWidth ? i : at - Vec::kWidth;
    }
    return index;
  }();
  const __m512 ab = _mm512_permutex2var_ps(a, _mm512_load_si512(kIndex.ab), b);
  return _mm512_permutex2var_ps(ab, _mm512_load_si512(kIndex.abc), c);
}

// One channel of 32 pixels.
MNV4_INLINE __m512i narrow(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// `left` of the 32 pixels at x are there.
struct PlanarImage {
  ptrdiff_t plane;

  MNV4_INLINE void load(const float* x, int64_t left, __m512i* channels) const {
    const __mmask16 low = lanes(left);
    const __mmask16 high = lanes(left - Vec::kWidth);
    for (int c = 0; c < 3; ++c, x += plane) {
      channels[c] = narrow(_mm512_maskz_loadu_ps(low, x), _mm512_maskz_loadu_ps(high, x + Vec::kWidth));
    }
  }
  MNV4_INLINE void fetch(const float* x) const {
    for (int c = 0; c < 3; ++c, x += plane) {
      __builtin_prefetch(x);
      __builtin_prefetch(x + Vec::kWidth);
    }
  }
};

struct PixelImage {
  MNV4_INLINE void load(const float* x, int64_t left, __m512i* channels) const {
    __m512 v[6];
    for (int i = 0; i < 6; ++i) {
      v[i] = _mm512_maskz_loadu_ps(lanes(3 * left - i * Vec::kWidth), x + i * Vec::kWidth);
    }
    channels[0] = narrow(channel<0>(v[0], v[1], v[2]), channel<0>(v[3], v[4], v[5]));
    channels[1] = narrow(channel<1>(v[0], v[1], v[2]), channel<1>(v[3], v[4], v[5]));
    channels[2] = narrow(channel<2>(v[0], v[1], v[2]), channel<2>(v[3], v[4], v[5]));
  }
  MNV4_INLINE void fetch(const float* x) const {
    for (int i = 0; i < 6; ++i) __builtin_prefetch(x + i * Vec::kWidth);
  }
};

// From a pair to the one whose third tap it holds: a window's third tap lies before its pair if the padding is odd,
// else behind it.
constexpr ptrdiff_t beside(bool odd) { return odd ? 4 : -4; }

template <bool ODD, class Image>
MNV4_INLINE void fill_row(const Image& image, const ConvArgs& args, int64_t iy, int64_t x, char* pairs, int64_t pitch) {
  const bool inside = iy >= 0 && iy < args.height;
  const float* row = static_cast<const float*>(args.x) + iy * args.x_row + x * args.x_pixel;
  // a caller's image lies in memory: the rows of the output row after the coming one arrive during its products
  image.fetch(row + args.stride_h * args.x_row);
  __m512i v[3];
  image.load(row, inside ? args.width - x : 0, v);
  for (int c = 0; c < 3; ++c) _mm512_store_si512(pairs + c * pitch, v[c]);
  constexpr __mmask32 kHigh = 0xaaaaaaaa;
  char* third = pairs + 3 * pitch + beside(ODD);
  if constexpr (ODD) {
    _mm512_storeu_si512(third, _mm512_mask_mov_epi16(_mm512_srli_epi32(v[0], 16), kHigh, v[1]));
    _mm512_storeu_si512(third + pitch, _mm512_srli_epi32(v[2], 16));
  } else {
    _mm512_storeu_si512(third, _mm512_mask_mov_epi16(v[0], kHigh, _mm512_slli_epi32(v[1], 16)));
    _mm512_storeu_si512(third + pitch, _mm512_maskz_mov_epi16(~kHigh, v[2]));
  }
}

template <bool ODD, class Image>
MNV4_INLINE void fill_from(const Image& image, const ConvArgs& args, const StemPairs& to, int64_t x,
                           const char* before) {
  const int64_t pitch = to.pitch;
  const ptrdiff_t offset = StemPairs::kBefore + x * 2;
  char* pairs = to.rows + offset;
  if (before) {
    before += offset + (kStemRows - 1) * kStemPairs * pitch;
    for (int i = 0; i < kStemPairs; ++i) {
      const ptrdiff_t at = i * pitch + (i < 3 ? 0 : beside(ODD));
      _mm512_storeu_si512(pairs + at, _mm512_loadu_si512(before + at));
    }
  } else {
    fill_row<ODD>(image, args, to.iy, x, pairs, pitch);
  }
  fill_row<ODD>(image, args, to.iy + 1, x, pairs + kStemPairs * pitch, pitch);
  fill_row<ODD>(image, args, to.iy + 2, x, pairs + 2 * kStemPairs * pitch, pitch);
}

void fill(const ConvArgs& args, const StemPairs& to, int64_t x, const char* before) {
  const bool odd = args.pad_left % 2;
  if (args.x_pixel == 1) {
    const PlanarImage image{args.x_channel};
    return odd ? fill_from<true>(image, args, to, x, before) : fill_from<false>(image, args, to, x, before);
  }
  const PixelImage image;
  odd ? fill_from<true>(image, args, to, x, before) : fill_from<false>(image, args, to, x, before);
}

// Where 16 pixels' 32 channels go. Masks have two bits for each quarter, of 8 channels.
struct Target {
  char* c;
  ptrdiff_t row;       // bytes from a pixel to the next
  __mmask8 kept;       // what is the result's; else zeros are written
  __mmask8 written;    // by one store
  __mmask8 elsewhere;  // by another one, whose first quarter would be at `other`
  char* other;

  MNV4_INLINE void store(int64_t pixel, __m512i channels) const {
    _mm512_mask_storeu_epi64(c + pixel * row, written, channels);
    if (elsewhere) _mm512_mask_storeu_epi64(other + pixel * row, elsewhere, channels);
  }
};

// Eight channels of sums of two panels, [channel][pixel]: result p holds pixels p and p + 8 of the first panel's
// channels and of the second's, 128 bits each.
template <class Act>
MNV4_INLINE void transpose(const float* sums, const Act& act, __m512i* pixels) {
  __m512i v[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const Vec low = act(Vec::load(sums + i * kMatrixRows));
    const Vec high = act(Vec::load(sums + kSums + i * kMatrixRows));
    v[i] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v));
  }
  __m512i two[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    two[2 * i] = _mm512_unpacklo_epi16(v[2 * i], v[2 * i + 1]);
    two[2 * i + 1] = _mm512_unpackhi_epi16(v[2 * i], v[2 * i + 1]);
  }
  // [half of 4 channels][pixels 0 and 1, 2 and 3, 4 and 5, 6 and 7]
  __m512i four[2][4];
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    four[h][0] = _mm512_unpacklo_epi32(two[4 * h], two[4 * h + 2]);
    four[h][1] = _mm512_unpackhi_epi32(two[4 * h], two[4 * h + 2]);
    four[h][2] = _mm512_unpacklo_epi32(two[4 * h + 1], two[4 * h + 3]);
    four[h][3] = _mm512_unpackhi_epi32(two[4 * h + 1], two[4 * h + 3]);
  }
#pragma GCC unroll 4
  for (int p = 0; p < 4; ++p) {
    pixels[2 * p] = _mm512_unpacklo_epi64(four[0][p], four[1][p]);
    pixels[2 * p + 1] = _mm512_unpackhi_epi64(four[0][p], four[1][p]);
  }
}

template <bool WHOLE, class Act>
__attribute__((noinline)) void finish(const float* sums, int64_t count, const Act& act, const Target& to) {
  __m512i first[8];
  __m512i second[8];
  transpose(sums, act, first);
  transpose(sums + 8 * kMatrixRows, act, second);
  const __m512i near = _mm512_set_epi64(13, 12, 5, 4, 9, 8, 1, 0);
  const __m512i far = _mm512_set_epi64(15, 14, 7, 6, 11, 10, 3, 2);
#pragma GCC unroll 8
  for (int p = 0; p < 8; ++p) {
    const __m512i low = _mm512_permutex2var_epi64(first[p], near, second[p]);
    const __m512i high = _mm512_permutex2var_epi64(first[p], far, second[p]);
    if constexpr (WHOLE) {
      _mm512_storeu_si512(to.c + p * to.row, low);
      _mm512_storeu_si512(to.c + (p + 8) * to.row, high);
    } else {
      if (p < count) to.store(p, _mm512_maskz_mov_epi64(to.kept, low));
      if (p + 8 < count) to.store(p + 8, _mm512_maskz_mov_epi64(to.kept, high));
    }
  }
}

// Sums of 16 pixels by 32 channels in tiles T and T + 1.
template <int T>
MNV4_INLINE void multiply(const char* pairs, int64_t pitch) {
  load_tile<4 + T / 2>(pairs, pitch);
  clear_tile<T>();
  clear_tile<T + 1>();
  multiply_tiles<T, 6, 4 + T / 2>();
  multiply_tiles<T + 1, 7, 4 + T / 2>();
}

template <int T>
MNV4_INLINE void store(float* sums) {
  store_tile<T>(sums, kTileRow);
  store_tile<T + 1>(sums + kSums, kTileRow);
}

template <class Act>
void finish_block(const float* sums, int64_t count, const Act& act, Target& to) {
  const bool whole = count >= kMatrixRows && to.kept == to.written && to.written == 0xff;
  whole ? finish<true>(sums, count, act, to) : finish<false>(sums, count, act, to);
  to.c += kMatrixRows * to.row;
  to.other += kMatrixRows * to.row;
}

// While a block multiplies, the one before it is stored, the one before that finished and a run of the coming row
// becomes pairs: none of them waits for what has just been written.
template <class Act>
void row_of_panels(const ConvArgs& args, const StemPairs& from, const StemPairs& next, const Act& act, Target to) {
  alignas(64) float sums[2][2 * kSums];
  const int64_t width = args.out_width;
  const char* pairs = from.rows + StemPairs::begin(args);
  int64_t filled = next.rows ? 0 : args.width;
  const auto fill_run = [&] {
    if (filled < args.width) fill(args, next, filled, from.rows);
    filled += kStemRun;
  };
  multiply<0>(pairs, from.pitch);
  for (int64_t x = 0;; x += 2 * kMatrixRows) {
    if (x + kMatrixRows < width) multiply<2>(pairs + (x + kMatrixRows) * 4, from.pitch);
    store<0>(sums[0]);
    fill_run();
    if (x > 0) finish_block(sums[1], kMatrixRows, act, to);
    if (x + kMatrixRows >= width) {
      finish_block(sums[0], width - x, act, to);
      break;
    }
    if (x + 2 * kMatrixRows < width) multiply<0>(pairs + (x + 2 * kMatrixRows) * 4, from.pitch);
    store<2>(sums[1]);
    fill_run();
    finish_block(sums[0], kMatrixRows, act, to);
    if (x + 2 * kMatrixRows >= width) {
      finish_block(sums[1], width - x - kMatrixRows, act, to);
      break;
    }
  }
  while (filled < args.width) fill_run();
}

void row(const ConvArgs& args, const GemmArgs& out, const StemPairs& from, const void* weights, const StemPairs& next) {
  const auto* tile = static_cast<const char*>(weights);
  for (int64_t first = 0; first < out.n; first += 2 * kPanel, tile += 2 * kStemTile) {
    load_tile<6>(tile, kTileRow);
    load_tile<7>(tile + kStemTile, kTileRow);
    const auto quarters = std::min<int64_t>(4, (out.n - first) / 8);
    Target to{};
    to.c = to.other = static_cast<char*>(out.c) + out.c_at(first / kPanel) * 2;
    to.row = out.c_row * 2;
    to.kept = static_cast<__mmask8>((1u << (2 * quarters)) - 1);
    to.written = out.paired ? static_cast<__mmask8>(0xff) : to.kept;
    if (!out.paired && out.c_panel != kPanel) {
      constexpr __mmask8 kSecond = 0xf0;
      to.elsewhere = to.written & kSecond;
      to.written &= static_cast<__mmask8>(~kSecond);
      to.other = to.c + (out.c_panel - kPanel) * 2;
    }
    const StemPairs meanwhile{first == 0 ? next.rows : nullptr, next.pitch, next.iy};
    if (out.act == Activation::kRelu) {
      row_of_panels(args, from, meanwhile, [](Vec x) { return max(Vec::zero(), x); }, to);
    } else {
      row_of_panels(args, from, meanwhile, [&](Vec x) { return simd::activate(out.act, x); }, to);
    }
  }
}

}  // namespace

extern const StemKernel stem_amx = {"stem_amx", pack, fill, row};

}  // namespace mnv4
