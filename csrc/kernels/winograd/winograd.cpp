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

// What terms and sums of an axis are made of.
struct Axis {
  // Terms [first[i], first[i + 1]) are added up in sum i.
  int first[5];
  // What of the taps a term's weight adds up.
  double taps[kWinogradMostTerms][3];
};

// [stride - 1]
constexpr Axis kAxes[] = {
    {{0, 1, 2, 3, 4}, {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}}},
    {{0, 2, 3, 5}, {{1, 0, 0}, {0, 1, 0}, {1, 0, 1}, {0, 0, 1}, {0, 1, 0}}},
};
// Of stride 2, the term whose weight is one tap alone.
constexpr int kTermOfTap[3] = {0, 1, 3};

const WinogradForm& form_of(int64_t stride) { return kWinogradForms[stride - 1]; }

// Channels side by side in a pixel of a padded row.
int64_t pixel_channels(int64_t channels) { return channels % kPanel == 0 ? kPanel : channels; }

ConvArgs tile_args(ConvArgs a) {
  const WinogradForm& form = form_of(a.stride_h);
  a.kernel_h = a.kernel_w = form.terms;
  a.stride_h = a.stride_w = form.step;
  a.out_height = div_up(a.out_height, 2);
  a.out_width = div_up(a.out_width, 2);
  return a;
}

// Floats from a term or a sum of `tiles` tiles to the next: an odd number of lines, because a tile's are written or
// read at once, and a pitch of 4 KiB, 32 tiles of 32 channels, would put all of them in the same set of L1.
ptrdiff_t pitch(int64_t tiles, int64_t channels) { return round_up(tiles * channels, 2 * kPanel) + kPanel; }

struct Scratch {
  int64_t rows;
  int64_t terms;
  int64_t sums;

  explicit Scratch(const ConvArgs& args) {
    const WinogradForm& form = form_of(args.stride_h);
    const ConvArgs tile = tile_args(args);
    rows = round_up(PaddedRows::floats(tile), kPanel);
    terms = form.terms * form.terms * pitch(tile.out_width, args.channels);
    sums = form.sums * form.sums * pitch(tile.out_width, kPanel);
  }
};

// Calls visit(term along rows, term along columns) in the order of packed weights.
template <class Visit>
void for_each_term(int64_t stride, const Visit& visit) {
  const int sums = form_of(stride).sums;
  const auto& first = kAxes[stride - 1].first;
  for (int i = 0; i < sums; ++i) {
    for (int j = 0; j < sums; ++j) {
      for (int a = first[i]; a < first[i + 1]; ++a) {
        for (int b = first[j]; b < first[j + 1]; ++b) visit(a, b);
      }
    }
  }
}

// Calls visit(offset in OIHW, offset in the packed weights) of the first of a filter's taps and terms. Its taps are
// adjacent, its terms channels * kPanel apart.
template <class Visit>
void for_each_filter(int64_t out_channels, int64_t channels, int64_t stride, const Visit& visit) {
  for (int64_t o = 0; o < out_channels; ++o) {
    const int64_t panel = o / kPanel * winograd_depth(channels, stride) * kPanel;
    for (int64_t c = 0; c < channels; ++c) visit((o * channels + c) * 9, panel + c * kPanel + o % kPanel);
  }
}

}  // namespace

bool winograd_fits(const ConvShape& s, int64_t stride_h, int64_t stride_w, int64_t dilation_h) {
  const bool form = s.kernel_h == 3 && s.kernel_w == 3 && stride_h == stride_w && (stride_h == 1 || stride_h == 2);
  return form && dilation_h == 1 && !s.dilated && !s.pairs && !conv_is_planar(s.channels);
}

int64_t winograd_depth(int64_t channels, int64_t stride) {
  const int64_t terms = form_of(stride).terms;
  return terms * terms * channels;
}

int64_t winograd_floats(int64_t out_channels, int64_t channels, int64_t stride) {
  const int64_t behind = stride == 1 ? 9 * channels : 0;
  return round_up(out_channels, kPanel) * (winograd_depth(channels, stride) + behind);
}

void pack_winograd(const float* weight, int64_t out_channels, int64_t channels, int64_t stride, float* packed) {
  std::fill_n(packed, winograd_floats(out_channels, channels, stride), 0.0f);
  const auto& taps = kAxes[stride - 1].taps;
  for_each_filter(out_channels, channels, stride, [&](int64_t from, int64_t to) {
    const float* g = weight + from;
    for_each_term(stride, [&](int a, int b) {
      double sum = 0.0;
      for (int y = 0; y < 3; ++y) {
        for (int x = 0; x < 3; ++x) sum += taps[a][y] * taps[b][x] * static_cast<double>(g[y * 3 + x]);
      }
      packed[to] = static_cast<float>(sum);
      to += channels * kPanel;
    });
  });
  if (stride != 1) return;
  const int64_t panels = round_up(out_channels, kPanel) * winograd_depth(channels, stride);
  std::copy_n(weight, out_channels * channels * 9, packed + panels);
}

void unpack_winograd(const float* packed, int64_t out_channels, int64_t channels, int64_t stride, float* weight) {
  if (stride == 1) {
    const int64_t panels = round_up(out_channels, kPanel) * winograd_depth(channels, stride);
    std::copy_n(packed + panels, out_channels * channels * 9, weight);
    return;
  }
  for_each_filter(out_channels, channels, stride, [&](int64_t to, int64_t from) {
    for_each_term(stride, [&](int a, int b) {
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
  const int64_t segments = winograd_depth(args.channels, args.stride_h) / pixel_channels(args.channels);
  return s.rows + s.terms + s.sums +
         round_up(segments * static_cast<int64_t>(sizeof(ptrdiff_t) / sizeof(float)), kPanel);
}

WinogradRows::WinogradRows(const GemmKernel& kernel, const ConvArgs& args, float* scratch, ConvRows* source)
    : kernel_(kernel),
      form_(form_of(args.stride_h)),
      transforms_(winograd_kernels().of_stride[args.stride_h - 1]),
      args_(args),
      tile_args_(tile_args(args)),
      rows_(kernel, tile_args_, scratch, source),
      term_(pitch(tile_args_.out_width, args.channels)),
      sum_(pitch(tile_args_.out_width, kPanel)) {
  const Scratch s(args);
  terms_ = scratch + s.rows;
  sums_ = terms_ + s.terms;
  segment_ = reinterpret_cast<ptrdiff_t*>(sums_ + s.sums);
  const int64_t pixel = pixel_channels(args.channels);
  const int64_t planes = args.channels / pixel;
  const int64_t plane = tile_args_.out_width * pixel;
  ptrdiff_t* segment = segment_;
  for_each_term(args.stride_h, [&](int a, int b) {
    for (int64_t p = 0; p < planes; ++p) *segment++ = (form_.terms * a + b) * term_ + p * plane;
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
  const int64_t first = oy * args_.stride_h - args_.pad_top;
  rows_.advance_to(first);
  for (int64_t p = 0; p < planes; ++p) {
    const float* row[kWinogradMostTerms];
    for (int i = 0; i < form_.terms; ++i)
      row[i] = static_cast<const float*>(rows_.at(first + i)) + p * rows_.ring().plane;
    transforms_.make_terms(row, tiles, pixel, terms_ + p * tiles * pixel, term_);
  }
  const auto* weight = static_cast<const float*>(args_.weight);
  const auto& terms = kAxes[args_.stride_h - 1].first;
  for (int64_t panel = 0; panel < div_up(args_.out_channels, kPanel); ++panel) {
    product_.segment = segment_;
    product_.c = sums_;
    for (int i = 0; i < form_.sums; ++i) {
      for (int j = 0; j < form_.sums; ++j) {
        product_.segments = planes * (terms[i + 1] - terms[i]) * (terms[j + 1] - terms[j]);
        product_.b = weight;
        // this sum is part of all four outputs
        product_.bias = i == 1 && j == 1 ? args_.bias + panel * kPanel : kNoBias;
        gemm(kernel_, product_, 0, tiles, 0, 1);
        product_.segment += product_.segments;
        product_.c = static_cast<float*>(product_.c) + sum_;
        weight += product_.segments * pixel * kPanel;
      }
    }
    float* to[kRows] = {};
    for (int64_t r = 0; r < kRows; ++r) {
      if (y[r]) to[r] = static_cast<float*>(y[r]) + panel * args_.y_panel;
    }
    transforms_.make_rows(sums_, sum_, tiles, args_.out_width, args_.act, to, args_.y_pixel);
  }
}

}  // namespace mnv4
