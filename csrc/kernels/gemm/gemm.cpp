#include "kernels/gemm/gemm.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/pointwise/pointwise.h"

namespace mnv4 {

#define MNV4_GEMM_KERNEL(tier, in, out, name) extern const GemmKernel name;
#include "kernels/gemm/gemm.inc"
#undef MNV4_GEMM_KERNEL

const GemmKernel& gemm_kernel(Storage input, Storage output) {
  using cpu::Tier;
  const Tier active = cpu::active_tier();
#define MNV4_GEMM_KERNEL(tier, in, out, name) \
  if (active >= tier && input == in && output == out) return name;
#include "kernels/gemm/gemm.inc"
#undef MNV4_GEMM_KERNEL
  return gemm_f32_scalar;
}

bool gemm_has_bfloat16() { return gemm_kernel(Storage::kBfloat16, Storage::kBfloat16).input == Storage::kBfloat16; }
bool gemm_has_matrix_unit() { return gemm_kernel(Storage::kBfloat16, Storage::kBfloat16).matrix != nullptr; }

MatrixSession::MatrixSession() : unit_(gemm_kernel(Storage::kBfloat16, Storage::kBfloat16).matrix) {
  if (unit_) unit_->begin();
}
MatrixSession::~MatrixSession() {
  if (unit_) unit_->end();
}

void Stream::fetch() {
  int64_t lines = due_ / (kOne * kLine);
  due_ -= lines * kOne * kLine;
  while (lines > 0 && !empty()) {
    const char* const from = static_cast<const char*>(range_->data) + done_;
    const int64_t now = std::min(lines, div_up(range_->bytes - done_, kLine));
    for (int64_t i = 0; i < now; ++i) __builtin_prefetch(from + i * kLine, 0, 2);
    lines -= now;
    advance(now * kLine);
  }
}

namespace {

// Chains that are summed up in one level.
constexpr int kChainGroup = 8;

// Sums that are kept between chains, and rows of a block whose sums of four panels they are.
constexpr int64_t kPartialRows = 288;
constexpr int64_t kPartialFloats = 4 * kPanel * kPartialRows;

// Tiles of a call, between which weights are fetched.
constexpr int64_t kTilesAtOnce = 2;

// A long reduction goes chain by chain through all rows of a block, so that L1 keeps the chain's weights. Fewer than
// two groups of chains have the same bits whether they are summed up here or by ChainSums.
bool chain_by_chain(const GemmKernel& kernel, const GemmArgs& args) {
  const int64_t k = args.segments * args.segment_length;
  return kernel.depth && args.chain == kChain && k > kernel.depth && k <= kChainGroup * kChain;
}

// A row pitch that is a multiple of 4 KiB puts all rows of a tile in the same L1 set: 60 to 70% of peak. A copy with a
// pitch one panel longer restores it, and costs a pass over the operand.
bool aliases(const GemmKernel& kernel, const GemmArgs& args, int64_t rows, int64_t panels) {
  const ptrdiff_t set_stride = 4096 / storage_bytes(kernel.input);
  return args.a_row % set_stride == 0 && args.segments == 1 && rows > 4 && panels > 2;
}

// Rows that fill half of L2.
int64_t rows_that_stay(const GemmKernel& kernel, int64_t k) {
  return cpu::cache_sizes().l2 / 2 / storage_bytes(kernel.input) / std::max<int64_t>(1, k);
}

// Blocks of rows whose operand stays in half of L2 while every panel of weights passes by. In chains only the rows of
// one need to, but what is copied has to be there for all.
int64_t count_blocks(const GemmKernel& kernel, const GemmArgs& args, int64_t rows, int64_t panels) {
  const int64_t k = args.segments * args.segment_length;
  int64_t most = rows_that_stay(kernel, k);
  if (chain_by_chain(kernel, args)) {
    most = aliases(kernel, args, rows, panels) ? std::min(most, kPartialRows) : kPartialRows;
  }
  if (rows <= most) return 1;
  return div_up(div_up(rows, kernel.max_rows), std::max<int64_t>(1, most / kernel.max_rows));
}

const void* copy_rows(const GemmKernel& kernel, const GemmArgs& args, int64_t first, int64_t rows, ptrdiff_t pitch) {
  static thread_local std::vector<char> buffer;
  const auto bytes = static_cast<size_t>(rows * pitch * storage_bytes(kernel.input));
  if (buffer.size() < bytes) buffer.resize(bytes);
  for (int64_t r = 0; r < rows; ++r) {
    const void* row = advance(args.a, kernel.input, (first + r) * args.a_row + args.segment[0]);
    std::memcpy(buffer.data() + r * pitch * storage_bytes(kernel.input), row,
                static_cast<size_t>(args.segment_length * storage_bytes(kernel.input)));
  }
  return buffer.data();
}

// The largest tile of any kernel, in floats.
constexpr int kTileFloats = 24 * kPanel;

// Sums of chains, and sums of those: a tree of three levels, whose error hardly grows with the length. The last level
// is float64, for its additions are of the size of the result: some processors' eager is that exact.
class ChainSums {
 public:
  // `values` of the tile.
  ChainSums(GemmTile& tile, int64_t values) : tile_(tile), values_(values) {
    tile.partial = partial_;
    tile.first = true;
  }
  // Between two chains; `last` tells whether the coming one ends the reduction.
  void next(bool last) {
    tile_.first = false;
    if (++chains_ % kChainGroup == 0) {
      for (int64_t i = 0; i < values_; ++i) {
        total_[i] = (grouped_ ? total_[i] : 0.0) + static_cast<double>(partial_[i]);
        partial_[i] = 0.0f;
      }
      grouped_ = true;
    }
    if (last && grouped_) {
      for (int64_t i = 0; i < values_; ++i) {
        partial_[i] = static_cast<float>(static_cast<double>(partial_[i]) + total_[i]);
      }
    }
  }

 private:
  GemmTile& tile_;
  const int64_t values_;
  int chains_ = 0;
  bool grouped_ = false;
  alignas(64) float partial_[kTileFloats] = {};
  alignas(64) double total_[kTileFloats];
};

// A reduction in chains: parts of a long segment, or several short ones.
class Chains {
 public:
  Chains(const GemmArgs& args, Storage input, const ptrdiff_t* segment, int64_t longest)
      : input_(input),
        segment_(segment),
        segments_(args.segments),
        length_(args.segment_length),
        longest_(longest),
        whole_(length_ < longest),
        one_(segments_ * length_ <= longest),
        pieces_(one_ || whole_ ? 1 : div_up(length_, longest)),
        run_(one_     ? segments_
             : whole_ ? longest / length_
                      : 1),
        count_(one_ ? 1 : div_up(segments_, run_) * pieces_) {}

  int64_t count() const { return count_; }

  // Chain i of the tile whose rows begin at `a` and whose panel at `b`.
  void place(int64_t i, const void* a, const void* b, GemmTile& tile) const {
    const int64_t first = i / pieces_ * run_;
    const int64_t offset = i % pieces_ * longest_;
    tile.a = advance(a, input_, offset);
    tile.segment = segment_ + first;
    tile.segments = std::min(run_, segments_ - first);
    tile.segment_length = whole_ ? length_ : std::min(length_ - offset, longest_);
    tile.b = advance(b, input_, (first * length_ + offset) * kPanel);
  }

 private:
  const Storage input_;
  const ptrdiff_t* const segment_;
  const int64_t segments_;
  const int64_t length_;
  const int64_t longest_;
  const bool whole_;      // segments are
  const bool one_;        // all is one chain: nothing is divided, which small products would notice
  const int64_t pieces_;  // of a segment
  const int64_t run_;     // segments of a chain
  const int64_t count_;
};

// Two even chains up to twice the longest: eager's product of 256 by two threads is two sums of 128, whose largest
// error one chain of 256 exceeds by more than twice in one of ten draws.
int64_t chain_length(const GemmKernel& kernel, const GemmArgs& args) {
  const int64_t k = args.segments * args.segment_length;
  if (chain_by_chain(kernel, args)) {
    const int64_t chains = std::clamp<int64_t>((k + kernel.depth / 2) / kernel.depth, 1, kChainGroup);
    return round_up(div_up(k, chains), kPanel);
  }
  const bool even = kernel.input == Storage::kFloat32 && k >= args.chain && k < 2 * args.chain;
  return even ? round_up(div_up(k, 2), kPanel) : args.chain;
}

// One tile's whole reduction.
void run_chains(GemmTileFn fn, GemmTile& tile, const Chains& chains, int64_t values, const void* a, const void* b) {
  ChainSums sums(tile, values);
  for (int64_t i = 0; i < chains.count(); ++i) {
    tile.last = i + 1 == chains.count();
    if (i > 0) sums.next(tile.last);
    chains.place(i, a, b, tile);
    fn(tile);
  }
}

// A block's rows of some panels, in bytes.
struct Rows {
  const char* a;
  char* c;
  const char* residual;
  ptrdiff_t a_row = 0;
  ptrdiff_t c_row = 0;
  ptrdiff_t residual_row = 0;

  // Calls visit(rows) for tiles of as many rows, tile.repeat of them, at most `most` at once; tiles differ by one row
  // at most.
  template <class Visit>
  void each_tile(int64_t rows, int64_t tiles, int64_t most, GemmTile& tile, const Visit& visit) const {
    const auto least = static_cast<int64_t>(static_cast<uint32_t>(rows) / static_cast<uint32_t>(tiles));
    int64_t longer = rows - least * tiles;
    Rows at = *this;
    while (tiles > 0) {
      const int64_t count = least + (longer > 0);
      tile.repeat = std::min(most, longer > 0 ? longer : tiles);
      tile.a = at.a;
      tile.c = at.c;
      tile.residual = at.residual;
      visit(count);
      const int64_t passed = tile.repeat * count;
      at.a += passed * a_row;
      at.c += passed * c_row;
      at.residual += passed * residual_row;
      tiles -= tile.repeat;
      longer -= tile.repeat;
    }
  }
};

// Sets what a tile of `panels` panels from `panel` on reads and writes; returns its rows from `row` on, which lie at
// `a`.
Rows place_panels(const GemmKernel& kernel, const GemmArgs& args, const void* a, int64_t row, int64_t panel,
                  int64_t panels, GemmTile& tile) {
  const int64_t last_panel = div_up(args.n, kPanel) - 1;
  const bool is_last = panel + panels - 1 == last_panel;
  tile.columns = is_last ? static_cast<int>(args.n - last_panel * kPanel) : kPanel;
  tile.bias = args.bias + panel * kPanel;
  tile.gamma = args.gamma ? args.gamma + panel * kPanel : nullptr;
  Rows block{static_cast<const char*>(a), static_cast<char*>(args.c), static_cast<const char*>(args.residual)};
  block.a_row = tile.a_row * storage_bytes(kernel.input);
  block.c_row = args.c_row * storage_bytes(kernel.output);
  block.c += row * block.c_row + panel * args.c_panel * storage_bytes(kernel.output);
  if (args.residual) {
    block.residual_row = args.residual_row * storage_bytes(kernel.output);
    block.residual += row * block.residual_row + panel * args.residual_panel * storage_bytes(kernel.output);
  }
  return block;
}

// A tile of this product, but for where it is.
GemmTile tile_of(const GemmArgs& args) {
  GemmTile tile;
  tile.a_row = args.a_row;
  tile.b_panel = args.b_panel;
  tile.residual = nullptr;
  tile.residual_row = args.residual_row;
  tile.residual_panel = args.residual_panel;
  tile.c_row = args.c_row;
  tile.c_panel = args.c_panel;
  tile.act = args.act;
  tile.ahead[0] = tile.ahead[1] = 0;
  return tile;
}

// All of K in short chains: the kernel's sums of a few rows and panels, and tiles without any K for their epilogue.
void gemm_short_chains(const GemmKernel& kernel, const GemmArgs& args, int64_t row_begin, int64_t row_end,
                       int64_t panel_begin, int64_t panel_end) {
  GemmTile sums = tile_of(args);
  sums.segment = args.segment;
  sums.segments = args.segments;
  sums.segment_length = args.segment_length;
  GemmTile finish = sums;
  finish.b = args.b;
  finish.segments = finish.segment_length = 0;
  finish.first = false;
  finish.last = true;
  alignas(64) float partial[kFewPanels * kFewRows * kPanel];
  for (int64_t panel = panel_begin; panel < panel_end; panel += kFewPanels) {
    const int64_t panels = std::min(kFewPanels, panel_end - panel);
    sums.b = advance(args.b, kernel.input, panel * args.b_panel);
    sums.bias = args.bias + panel * kPanel;
    for (int64_t row = row_begin; row < row_end; row += kFewRows) {
      const int64_t rows = std::min(kFewRows, row_end - row);
      sums.a = advance(args.a, kernel.input, row * args.a_row);
      sums.partial = finish.partial = partial;
      kernel.short_chains(sums, rows, panels);
      for (int64_t p = 0; p < panels; ++p) {
        const Rows block = place_panels(kernel, args, sums.a, row, panel + p, 1, finish);
        block.each_tile(rows, div_up(rows, kernel.max_rows), 1, finish, [&](int64_t count) {
          kernel.tile[kAnyRow][count](finish);
          finish.partial += count * kPanel;
        });
      }
    }
  }
}

void gemm_block(const GemmKernel& kernel, const GemmArgs& args, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                int64_t panel_end) {
  const int64_t rows = row_end - row_begin;
  const int64_t k = args.segments * args.segment_length;
  const ptrdiff_t whole_row = 0;
  const ptrdiff_t* segment = args.segment;

  GemmTile tile = tile_of(args);
  const void* a = advance(args.a, kernel.input, row_begin * args.a_row);
  if (aliases(kernel, args, rows, panel_end - panel_begin)) {
    tile.a_row = k + kPanel;
    segment = &whole_row;
    a = copy_rows(kernel, args, row_begin, rows, tile.a_row);
  }

  int variant = kAnyRow;
  for (int v = kAnyRow + 1; v < kRowVariants; ++v) {
    const bool fits = !kernel.segment_length[v] || args.segment_length == kernel.segment_length[v];
    if (tile.a_row == kernel.row_stride[v] && fits) variant = v;
  }

  const Chains chains(args, kernel.input, segment, chain_length(kernel, args));
  alignas(64) float partial[kPartialFloats];
  tile.partial = partial;
  const bool in_chains = chain_by_chain(kernel, args);
  const int64_t group = in_chains ? gemm_panels(kernel, rows, k) : panel_end - panel_begin;
  const int64_t passes = in_chains ? chains.count() : 1;
  // One pass by the panel and, in a pair, its neighbour; returns how many they are.
  const auto pass_by = [&](int64_t pass, int64_t first, int64_t panel, int64_t left) {
    const bool pair = gemm_pairs(kernel, k) && left >= 2;
    const int64_t panels = pair ? 2 : 1;
    const GemmTileFn* fn = pair ? kernel.pair[variant] : kernel.tile[variant];
    const int64_t tiles = div_up(rows, pair ? kernel.pair_rows : kernel.max_rows);
    const void* b = advance(args.b, kernel.input, panel * args.b_panel);
    Rows block = place_panels(kernel, args, a, row_begin, panel, panels, tile);
    Stream* stream = args.stream && !args.stream->empty() ? args.stream : nullptr;
    const auto take = [&](const void* from, int64_t depth) {
      if (!stream) return;
      if (!kernel.fetches) return stream->pass(tile.repeat * panels * depth * kPanel * storage_bytes(kernel.input));
      for (int64_t p = 0; p < panels; ++p) {
        tile.ahead[p] = stream->take(from, depth * kPanel * storage_bytes(kernel.input));
      }
    };
    tile.ahead[0] = tile.ahead[1] = 0;
    const int64_t at_once = kernel.fetches ? 1 : kTilesAtOnce;
    if (in_chains) {
      tile.first = pass == 0;
      tile.last = pass + 1 == passes;
      tile.partial = partial + (panel - first) * rows * kPanel;
      chains.place(pass, a, b, tile);
      block.a = static_cast<const char*>(tile.a);
      block.each_tile(rows, tiles, at_once, tile, [&](int64_t count) {
        take(tile.b, tile.segments * tile.segment_length);
        fn[count](tile);
        tile.partial += tile.repeat * count * panels * kPanel;
      });
    } else if (chains.count() == 1) {
      tile.first = tile.last = true;
      chains.place(0, a, b, tile);
      block.each_tile(rows, tiles, at_once, tile, [&](int64_t count) {
        take(b, k);
        fn[count](tile);
      });
    } else {
      block.each_tile(rows, tiles, 1, tile, [&](int64_t count) {
        take(b, k);
        run_chains(fn[count], tile, chains, count * panels * kPanel, tile.a, b);
      });
    }
    return panels;
  };
  for (int64_t first = panel_begin; first < panel_end; first += group) {
    const int64_t end = std::min(first + group, panel_end);
    for (int64_t pass = 0; pass < passes; ++pass) {
      for (int64_t panel = first; panel < end;) panel += pass_by(pass, first, panel, end - panel);
    }
  }
}

}  // namespace

int64_t gemm_panels(const GemmKernel& kernel, int64_t rows, int64_t k) {
  const int64_t least = kernel.matrix || kernel.pair_rows ? 2 : 1;
  if (!kernel.depth || k <= kernel.depth || rows <= rows_that_stay(kernel, k)) return least;
  return std::max(least, kPartialFloats / (std::min(rows, kPartialRows) * kPanel) / least * least);
}

void gemm(const GemmKernel& kernel, const GemmArgs& args, int64_t row_begin, int64_t row_end, int64_t panel_begin,
          int64_t panel_end) {
  const int64_t rows = row_end - row_begin;
  if (rows <= 0) return;
  if (args.image_rows && !args.packed_pitch) {
    for (int64_t row = row_begin; row < row_end;) {
      const int64_t i = row / args.image_rows;
      const int64_t first = i * args.image_rows;
      const int64_t end = std::min(first + args.image_rows, row_end);
      GemmArgs image = args;
      image.image_rows = 0;
      image.a = advance(args.a, kernel.input, i * args.a_image);
      image.c = advance(args.c, kernel.output, i * args.c_image);
      if (args.residual) image.residual = advance(args.residual, kernel.output, i * args.residual_image);
      gemm(kernel, image, row - first, end - first, panel_begin, panel_end);
      row = end;
    }
    return;
  }
  if (args.split) return kernel.split->product(args, row_begin, row_end, panel_begin, panel_end);
  if (kernel.matrix) return kernel.matrix->product(args, row_begin, row_end, panel_begin, panel_end);
  if (args.chain == kShortChain && args.segments * args.segment_length > kShortChain) {
    return gemm_short_chains(kernel, args, row_begin, row_end, panel_begin, panel_end);
  }
  const int64_t blocks = count_blocks(kernel, args, rows, panel_end - panel_begin);
  if (blocks == 1) return gemm_block(kernel, args, row_begin, row_end, panel_begin, panel_end);
  for (int64_t b = 0; b < blocks; ++b) {
    gemm_block(kernel, args, row_begin + rows * b / blocks, row_begin + rows * (b + 1) / blocks, panel_begin,
               panel_end);
  }
}

GemmGrid gemm_grid(const GemmKernel& kernel, int64_t rows, int64_t panels, int64_t workers) {
  const int64_t tiles = std::max<int64_t>(1, div_up(rows, kernel.max_rows));
  GemmGrid best{1, 1};
  int64_t best_cost = tiles * panels;
  for (int64_t row_chunks = 1; row_chunks <= std::min(workers, tiles); ++row_chunks) {
    const int64_t panel_chunks = std::min(panels, workers / row_chunks);
    const int64_t cost = div_up(tiles, row_chunks) * div_up(panels, panel_chunks);
    // on a tie the grid with more row chunks wins: its workers share the weights, not the activations' lines
    if (cost <= best_cost) {
      best_cost = cost;
      best = {row_chunks, panel_chunks};
    }
  }
  return best;
}

void pack_panels(const float* weight, int64_t n, int64_t k, ptrdiff_t weight_row, ptrdiff_t weight_column,
                 float* packed) {
  for (int64_t first = 0; first < n; first += kPanel, packed += k * kPanel) {
    const int64_t columns = std::min<int64_t>(kPanel, n - first);
    // squares: sixteen rows of a long matrix are a power of two apart and would evict each other's lines
    for (int64_t start = 0; start < k; start += kPanel) {
      const int64_t end = std::min(start + kPanel, k);
      for (int64_t j = 0; j < kPanel; ++j) {
        const float* row = weight + (first + j) * weight_row;
        for (int64_t i = start; i < end; ++i) packed[i * kPanel + j] = j < columns ? row[i * weight_column] : 0.0f;
      }
    }
  }
}

void pack_pairs(const float* panels, int64_t panel_count, int64_t k, uint16_t* packed) {
  // a pair's 32 values are read before they are written, so that both may start at the same place
  for (int64_t pair = 0; pair < panel_count * k / 2; ++pair) {
    uint16_t rounded[2 * kPanel];
    pointwise_kernels().narrow(panels + pair * 2 * kPanel, Storage::kBfloat16, rounded, 2 * kPanel);
    for (int j = 0; j < kPanel; ++j) {
      packed[(pair * kPanel + j) * 2] = rounded[j];
      packed[(pair * kPanel + j) * 2 + 1] = rounded[kPanel + j];
    }
  }
}

void unpack_pairs(const uint16_t* packed, int64_t panel_count, int64_t k, float* panels) {
  for (int64_t pair = 0; pair < panel_count * k / 2; ++pair) {
    float wide[2 * kPanel];
    pointwise_kernels().widen(packed + pair * 2 * kPanel, Storage::kBfloat16, wide, 2 * kPanel);
    for (int j = 0; j < kPanel; ++j) {
      panels[pair * 2 * kPanel + j] = wide[2 * j];
      panels[pair * 2 * kPanel + kPanel + j] = wide[2 * j + 1];
    }
  }
}

}  // namespace mnv4
