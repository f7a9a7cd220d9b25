#include "kernels/stem/stem.h"

#include <algorithm>
#include <cstring>

#include "cpu/features.h"

namespace mnv4 {

#define MNV4_STEM_KERNEL(tier, name) extern const StemKernel name;
#include "kernels/stem/stem.inc"
#undef MNV4_STEM_KERNEL

namespace {

const StemKernel* stem_kernel() {
  using cpu::Tier;
  [[maybe_unused]] const Tier active = cpu::active_tier();
#define MNV4_STEM_KERNEL(tier, name) \
  if (active >= tier) return &name;
#include "kernels/stem/stem.inc"
#undef MNV4_STEM_KERNEL
  return nullptr;
}

constexpr int64_t kLine = 64;

int64_t pitch_of(const ConvArgs& a) {
  const int64_t written = round_up(a.width, kStemRun) * 2;
  const int64_t read = round_up(a.out_width, kMatrixRows) * 4;
  // and a line behind the last pixel for the pair beside it
  return StemPairs::kBefore + std::max(written, read) + kLine;
}

int64_t pairs_bytes(const ConvArgs& a) { return kMatrixRows * pitch_of(a); }
int64_t weight_bytes(const ConvArgs& a) { return round_up(a.out_channels, 2 * kPanel) / kPanel * kStemTile; }

char* aligned(float* scratch) {
  const auto address = reinterpret_cast<uintptr_t>(scratch);
  return reinterpret_cast<char*>(scratch) + (kLine - address % kLine) % kLine;
}

}  // namespace

bool StemRows::takes(const GemmKernel& kernel, const ConvArgs& a) {
  const bool window = a.kernel_h == 3 && a.kernel_w == 3 && a.stride_h == 2 && a.stride_w == 2 && a.dilation_h == 1 &&
                      a.dilation_w == 1 && a.pad_left < 3;
  const bool planes = a.x_pixel == 1;
  const bool pixels = a.x_channel == 1 && a.x_pixel == 3;
  return stem_kernel() && kernel.matrix && kernel.output == Storage::kBfloat16 && window && a.pairs &&
         a.channels == 3 && a.x_type == Storage::kFloat32 && (planes || pixels) && a.out_channels % 8 == 0;
}

int64_t StemRows::floats(const ConvArgs& a) {
  return (2 * pairs_bytes(a) + weight_bytes(a) + kLine) / static_cast<int64_t>(sizeof(float));
}

StemRows::StemRows(const GemmKernel& kernel, const ConvArgs& args, float* scratch)
    : kernel_(*stem_kernel()),
      unit_(*kernel.matrix),
      args_(args),
      pitch_(pitch_of(args)),
      pairs_(aligned(scratch)),
      weights_(pairs_ + 2 * pairs_bytes(args)) {
  std::memset(pairs_, 0, static_cast<size_t>(2 * pairs_bytes(args)));
  constexpr uint32_t kOnes = 0x3f803f80;  // a pair of 1.0
  for (int64_t oy : {0, 1}) {
    auto* bias = reinterpret_cast<uint32_t*>(pairs(oy) + kStemRows * kStemPairs * pitch_);
    std::fill_n(bias, pitch_ / static_cast<int64_t>(sizeof kOnes), kOnes);
  }
  kernel_.pack(args, weights_);
}

char* StemRows::pairs(int64_t oy) const { return pairs_ + oy % 2 * pairs_bytes(args_); }

void StemRows::row(int64_t oy, const GemmArgs& out) {
  const int64_t iy = oy * args_.stride_h - args_.pad_top;
  const StemPairs from{pairs(oy), pitch_, iy};
  if (ready_ != oy) {
    for (int64_t x = 0; x < args_.width; x += kStemRun) kernel_.fill(args_, from, x, nullptr);
  }
  ready_ = oy + 1;
  const bool last = ready_ == args_.out_height;
  const StemPairs next{last ? nullptr : pairs(ready_), pitch_, iy + args_.stride_h};
  unit_.begin();
  unit_.configure(kMatrixRows);
  kernel_.row(args_, out, from, weights_, next);
  unit_.end();
}

}  // namespace mnv4
