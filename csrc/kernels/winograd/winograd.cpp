#include "kernels/winograd/winograd.h"

#include <algorithm>

#include "cpu/features.h"

namespace mnv4 {

#define MNV4_WINOGRAD_KERNELS(tier, name) extern const WinogradKernels name;
#include "kernels/winograd/winograd.inc"
#undef MNV4_WINOGRAD_KERNELS

const WinogradKernels& winograd_kernels() {
  using cpu::Tier;
  const Tier active = cpu::active_tier();
#define MNV4_WINOGRAD_KERNELS(tier, name) \
  if (active >= tier) return name;
#include "kernels/winograd/winograd.inc"
#undef MNV4_WINOGRAD_KERNELS
  return winograd_scalar;
}

namespace {

constexpr int kTerms = kWinogradTerms;
constexpr int kSums = kWinogradSums;
// Terms [kFirst[i], kFirst[i + 1]) are added up in sum i.
constexpr int kFirst[kSums + 1] = {0, 2, 3, 5};
// The taps that a term's weight adds up, and the term whose weight is one tap alone.
constexpr int kTaps[kTerms][3] = {{1, 0, 0}, {0, 1, 0}, {1, 0, 1}, {0, 0, 1}, {0, 1, 0}};
constexpr int kTermOfTap[3] = {0, 1, 3};

// Channels side by side in a pixel of a padded row.
int64_t pixel_channels(int64_t channels) { return channels % kPanel == 0 ? kPanel : channels; }

ConvArgs tile_args(ConvArgs a) {
  a.kernel_h = a.kernel_w = kTerms;
  a.stride_h = a.stride_w = 4;
  a.out_height = div_up(a.out_height, 2);
  a.out_width = div_up(a.out_width, 2);
  return a;
}

struct Scratch {
  int64_t rows;
  int64_t terms;
  int64_t sums;

  explicit Scratch(const ConvArgs& args) {
    const ConvArgs tile = tile_args(args);
    rows = round_up(PaddedRows::floats(tile), kPanel);
    terms = round_up(kTerms * kTerms * tile.out_width * args.channels, kPanel);
    sums = kSums * kSums * tile.out_width * kPanel;
  }
};

// Calls visit(sum over rows, sum over columns, its terms along rows, along columns) in the order of packed weights.
template <class Visit>
void for_each_term(const Visit& visit) {
  for (int i = 0; i < kSums; ++i) {
    for (int j = 0; j < kSums; ++j) {
      for (int a = kFirst[i]; a < kFirst[i + 1]; ++a) {
        for (int b = kFirst[j]; b < kFirst[j + 1]; ++b) visit(i, j, a, b);
      }
    }
  }
}

// Calls visit(offset in OIHW, offset in the packed weights) of the first of a filter's taps and terms. Its taps are
// adjacent, its terms channels * kPanel apart.
template <class Visit>
void for_each_filter(int64_t out_channels, int64_t channels, const Visit& visit) {
  for (int64_t o = 0; o < out_channels; ++o) {
    const int64_t panel = o / kPanel * winograd_depth(channels) * kPanel;
    for (int64_t c = 0; c < channels; ++c) visit((o * channels + c) * 9, panel + c * kPanel + o % kPanel);
  }
}

}  // namespace

bool winograd_fits(const ConvShape& s, int64_t stride_h, int64_t stride_w, int64_t dilation_h) {
  const bool halving = s.kernel_h == 3 && s.kernel_w == 3 && stride_h == 2 && stride_w == 2;
  return halving && dilation_h == 1 && !s.dilated && !s.pairs && !conv_is_planar(s.channels);
}

int64_t winograd_depth(int64_t channels) { return kTerms * kTerms * channels; }

void pack_winograd(const float* weight, int64_t out_channels, int64_t channels, float* packed) {
  std::fill_n(packed, round_up(out_channels, kPanel) * winograd_depth(channels), 0.0f);
  for_each_filter(out_channels, channels, [&](int64_t from, int64_t to) {
    const float* g = weight + from;
    for_each_term([&](int, int, int a, int b) {
      float sum = 0.0f;
      for (int y = 0; y < 3; ++y) {
        for (int x = 0; x < 3; ++x) sum += kTaps[a][y] * kTaps[b][x] ? g[y * 3 + x] : 0.0f;
      }
      packed[to] = sum;
      to += channels * kPanel;
    });
  });
}

void unpack_winograd(const float* packed, int64_t out_channels, int64_t channels, float* weight) {
  for_each_filter(out_channels, channels, [&](int64_t to, int64_t from) {
    for_each_term([&](int, int, int a, int b) {
      for (int y = 0; y < 3; ++y) {
        for (int x = 0; x < 3; ++x) {
          if (kTermOfTap[y] == a && kTermOfTap[x] == b) weight[to + y * 3 + x] = packed[from];
        }
      }
      from += channels * kPanel;
    });
  });
}

int64_t winograd_scratch(const ConvArgs& args) {
  const Scratch s(args);
  const int64_t segments = kTerms * kTerms * args.channels / pixel_channels(args.channels);
  return s.rows + s.terms + s.sums +
         round_up(segments * static_cast<int64_t>(sizeof(ptrdiff_t) / sizeof(float)), kPanel);
}

WinogradRows::WinogradRows(const GemmKernel& kernel, const ConvArgs& args, float* scratch, ConvRows* source)
    : kernel_(kernel),
      transforms_(winograd_kernels()),
      args_(args),
      tile_args_(tile_args(args)),
      rows_(kernel, tile_args_, scratch, source) {
  const Scratch s(args);
  terms_ = scratch + s.rows;
  sums_ = terms_ + s.terms;
  segment_ = reinterpret_cast<ptrdiff_t*>(sums_ + s.sums);
  const int64_t pixel = pixel_channels(args.channels);
  const int64_t planes = args.channels / pixel;
  const int64_t plane = tile_args_.out_width * pixel;
  ptrdiff_t* segment = segment_;
  for_each_term([&](int, int, int a, int b) {
    for (int64_t p = 0; p < planes; ++p) *segment++ = ((kTerms * a + b) * planes + p) * plane;
  });
  product_.a = terms_;
  product_.a_row = pixel;
  product_.segment_length = pixel;
  product_.c_row = kPanel;
  product_.n = kPanel;
  product_.act = Activation::kNone;
  product_.stream = args.stream;
}

void WinogradRows::rows(int64_t oy, void* const* y) {
  static constexpr float kNoBias[kPanel] = {};
  const int64_t pixel = pixel_channels(args_.channels);
  const int64_t planes = args_.channels / pixel;
  const int64_t tiles = tile_args_.out_width;
  const int64_t first = 2 * oy - args_.pad_top;
  rows_.advance_to(first);
  for (int64_t p = 0; p < planes; ++p) {
    const float* row[kTerms];
    for (int i = 0; i < kTerms; ++i) row[i] = static_cast<const float*>(rows_.at(first + i)) + p * rows_.ring().plane;
    transforms_.make_terms(row, tiles, pixel, terms_ + p * tiles * pixel, planes * tiles * pixel);
  }
  const auto* weight = static_cast<const float*>(args_.weight);
  for (int64_t panel = 0; panel < div_up(args_.out_channels, kPanel); ++panel) {
    product_.segment = segment_;
    product_.c = sums_;
    for (int i = 0; i < kSums; ++i) {
      for (int j = 0; j < kSums; ++j) {
        product_.segments = planes * (kFirst[i + 1] - kFirst[i]) * (kFirst[j + 1] - kFirst[j]);
        product_.b = weight;
        // the middle sum is part of all four outputs
        product_.bias = i == 1 && j == 1 ? args_.bias + panel * kPanel : kNoBias;
        gemm(kernel_, product_, 0, tiles, 0, 1);
        product_.segment += product_.segments;
        product_.c = static_cast<float*>(product_.c) + tiles * kPanel;
        weight += product_.segments * pixel * kPanel;
      }
    }
    float* to[kRows] = {};
    for (int64_t r = 0; r < kRows; ++r) {
      if (y[r]) to[r] = static_cast<float*>(y[r]) + panel * args_.y_panel;
    }
    transforms_.make_rows(sums_, tiles, args_.out_width, args_.act, to, args_.y_pixel);
  }
}

}  // namespace mnv4
