// C = act(A B + bias) * gamma + residual, by register tiles: 1x1 convolutions, dense convolutions by segments,
// attention's two products and the classifier all run on these kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/features.h"
#include "kernels/activation.h"
#include "kernels/storage.h"

namespace mnv4 {

// Output channels of one packed panel of weights.
inline constexpr int kPanel = 16;

inline constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline constexpr int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

// One tile: `rows` rows by one panel (or two). Strides are in elements; a and b are of the kernel's input type, c and
// residual of its output type. With bfloat16 input K comes in pairs: all lengths of K are
// even.
struct GemmTile {
  const void* a;             // row 0
  ptrdiff_t a_row;           // from a row to the next
  const ptrdiff_t* segment;  // [segments] start of each run of K within a row
  int64_t segments;
  int64_t segment_length;  // every run has this many consecutive K
  const void* b;           // [K][kPanel], in bfloat16 [K / 2][kPanel][2]
  ptrdiff_t b_panel;       // from a panel to the next; read by tiles of several, as are the other steps
  const float* bias;       // [panels * kPanel]
  const float* gamma;      // [panels * kPanel] or null
  const void* residual;    // or null
  ptrdiff_t residual_row;
  ptrdiff_t residual_panel;
  void* c;
  ptrdiff_t c_row;
  ptrdiff_t c_panel;
  int columns;  // valid columns of the (last) panel, 1 to kPanel
  Activation act;
  // A long reduction comes in chains: all but the last leave their sums in `partial`, the next ones add theirs to it.
  bool first;
  bool last;
  float* partial;  // [rows * panels * kPanel]
  // Tiles of as many rows below this one, itself included; 1 where tiles fetch.
  int64_t repeat = 1;
  // Bytes from b to what is brought into L2 line by line while a panel passes by; 0 for nothing. For kernels that
  // fetch.
  ptrdiff_t ahead[2];
};

// Longest chain of additions: the error of a plain sum grows with its length, and chains of a thousand leave the budget
// that eager's own blocked sums set.
inline constexpr int64_t kChain = 256;
// For the head: eager's products of few rows sum in many lanes, which is more exact still.
inline constexpr int64_t kShortChain = 16;
// Rows and panels that go through short chains together.
inline constexpr int64_t kFewRows = 16;
inline constexpr int64_t kFewPanels = 4;
// Of a map of so few pixels, too, eager sums in many lanes on some processors, and its products cost nothing.
inline constexpr int64_t kFewPixels = 16;
inline int64_t gemm_chain(int64_t pixels) { return pixels <= kFewPixels ? kShortChain : kChain; }

using GemmTileFn = void (*)(const GemmTile&);

// Row strides that tiles are compiled for, as displacements of one pointer: any other, stride-2 pixels of an image,
// planes of 16 channels, every second pixel of such a plane. An image's segments, a row of the 3 x 3 window each, are
// short, so their length is compiled too, as is a plane's for some.
enum RowVariant { kAnyRow, kImageRow, kPlaneRow, kStridedPlaneRow, kRowVariants };

struct GemmArgs;

// A processor's matrix unit, whose tiles take kMatrixRows rows, one panel and runs of kMatrixDepth values of K.
struct MatrixUnit {
  void (*product)(const GemmArgs&, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end);
  // Rows [row_begin, row_end) of args.a as PackedRows in `to`.
  void (*pack_rows)(const GemmArgs&, int64_t row_begin, int64_t row_end, void* to, int64_t pitch);
  // What MatrixSession calls.
  void (*begin)();
  void (*end)();
  // For products of another driver, within a session: tiles of so many rows.
  void (*configure)(int64_t rows);
};

inline constexpr int64_t kMatrixRows = 16;
inline constexpr int64_t kMatrixDepth = 32;

// A matrix unit multiplies float32 as sums of so many bfloat16, which have its 24 bits, and so many products of those.
inline constexpr int64_t kTerms = 3;
inline constexpr int kTermProducts = 6;

// Rows in the order in which a matrix unit reads them: [K / kMatrixDepth][pitch][terms][kMatrixDepth] of bfloat16,
// zeros beyond K.
struct PackedRows {
  static int64_t row_bytes(Storage rows) {
    return kMatrixDepth * storage_bytes(Storage::kBfloat16) * (rows == Storage::kFloat32 ? kTerms : 1);
  }
  // a tile may read past the last row, and a pitch that is a power of two would put all runs in the same L1 sets
  static int64_t pitch(int64_t rows) { return round_up(rows, kMatrixRows) + kMatrixRows + 4; }
  static int64_t bytes(Storage type, int64_t rows, int64_t k) {
    return pitch(rows) * div_up(k, kMatrixDepth) * row_bytes(type);
  }
  // As many at a time, so that L2 has room for the other operands.
  static int64_t most_bytes() { return cpu::cache_sizes().l2 / 2; }
};

struct GemmKernel {
  const char* name;
  Storage input;
  Storage output;
  // null where register tiles do the products, which are all that follows
  const MatrixUnit* matrix;
  // beside register tiles: for float32 products in terms, or null
  const MatrixUnit* split;
  // About as many values of K of two panels stay in L1 beside what else a tile reads, where reading them from L2 for
  // each tile takes longer than to keep sums in memory between chains of that length; 0: it does not.
  int64_t depth;
  // Tiles fetch weights while they multiply; else what calls them does, and a call may take several tiles.
  bool fetches;
  // rows of the largest tile; tile[v][r] takes exactly r rows, row_stride[v] apart
  int max_rows;
  GemmTileFn tile[kRowVariants][16];
  ptrdiff_t row_stride[kRowVariants];
  int64_t segment_length[kRowVariants];  // that their segments must have, 0: any
  // tiles of two panels, where a load for each multiply-add is more than the processor can do; 0 rows: none
  int pair_rows;
  GemmTileFn pair[kRowVariants][16];
  // Sums of all of K in short chains, of up to kFewRows rows and kFewPanels panels, in the tile's partial
  // [panels][rows][kPanel]; of the tile's c, residual and epilogue nothing is read.
  void (*short_chains)(const GemmTile&, int64_t rows, int64_t panels);
};

// The first kernel of the list that the active tier can run. Every tier has float32 in and out.
const GemmKernel& gemm_kernel(Storage input = Storage::kFloat32, Storage output = Storage::kFloat32);

// True where the active tier multiplies bfloat16, and where a matrix unit does.
bool gemm_has_bfloat16();
bool gemm_has_matrix_unit();

// While one lives its thread's matrix unit, if there is one, stays configured: that takes as long as a small product.
class MatrixSession {
 public:
  MatrixSession();
  ~MatrixSession();
  MatrixSession(const MatrixSession&) = delete;
  MatrixSession& operator=(const MatrixSession&) = delete;

 private:
  const MatrixUnit* unit_;
};

// Weights that will be needed soon, in order: tiles bring them into L2 while they multiply, so that the first tile of a
// panel does not wait for memory. Cheap to copy, used by one thread.
class Stream {
 public:
  struct Range {
    const void* data;
    int64_t bytes;
  };
  Stream() = default;
  // `rate`: bytes to fetch for each byte of weights that a tile passes through.
  Stream(const Range* begin, const Range* end, double rate)
      : range_(begin), end_(end), rate_(static_cast<int64_t>(rate * kOne)) {}

  bool empty() const { return range_ == end_; }

  // GemmTile::ahead of a tile that passes through `bytes` bytes at `b`.
  ptrdiff_t take(const void* b, int64_t bytes) {
    if (empty()) return 0;
    due_ += rate_ * bytes;
    if (due_ < kOne * bytes) return 0;
    due_ -= kOne * bytes;
    const ptrdiff_t ahead = static_cast<const char*>(range_->data) + done_ - static_cast<const char*>(b);
    advance(bytes);
    return ahead;
  }

  // Fetches what is due while a tile passes through `bytes` bytes.
  void pass(int64_t bytes) {
    if (empty()) return;
    due_ += rate_ * bytes;
    if (due_ >= kOne * kLeast) fetch();
  }

 private:
  static constexpr int64_t kOne = 1 << 16;
  static constexpr int64_t kLine = 64;
  static constexpr int64_t kLeast = 4 * kLine;

  void fetch();
  void advance(int64_t bytes) {
    done_ += bytes;
    if (done_ >= range_->bytes) {
      done_ = 0;
      ++range_;
    }
  }

  const Range* range_ = nullptr;
  const Range* end_ = nullptr;
  int64_t done_ = 0;
  // in parts of kOne
  int64_t rate_ = 0;
  int64_t due_ = 0;
};

// A matrix product over rows [row_begin, row_end) and panels [panel_begin, panel_end) of one operand.
struct GemmArgs {
  const void* a;
  ptrdiff_t a_row;
  const ptrdiff_t* segment;
  int64_t segments;
  int64_t segment_length;
  const void* b;         // packed [ceil(n / kPanel)][at least K][kPanel]
  ptrdiff_t b_panel;     // from a packed panel to the next
  const float* bias;     // [ceil(n / kPanel) * kPanel]
  const float* gamma;    // the same, or null
  const void* residual;  // or null
  ptrdiff_t residual_row;
  void* c;
  ptrdiff_t c_row;
  ptrdiff_t c_panel;  // from a panel's columns to the next's; residual_panel for the residual
  ptrdiff_t residual_panel;
  // For matrix units: columns of panels 2 i and 2 i + 1 lie side by side, and steps lead from two panels to the next
  // two. Beside a last panel without partner c gets zeros.
  bool paired = false;
  bool residual_paired = false;
  // the panel that c begins with
  int64_t c_first = 0;
  int64_t n;  // columns
  // Rows are those of several images, `image_rows` of each; 0: of one. From an image to the next:
  int64_t image_rows = 0;
  ptrdiff_t a_image = 0;
  ptrdiff_t c_image = 0;
  ptrdiff_t residual_image = 0;
  // rows behind the last one that may be read, whatever they hold
  int64_t rows_behind = 0;
  // By the kernel's `split`; `segment_length` is then a multiple of kPanel, or there is one segment.
  bool split = false;
  // a is row 0 of PackedRows of this pitch, of all images; 0: a is as told above
  int64_t packed_pitch = 0;
  Activation act;
  // kChain, or kShortChain where all of K is one segment or segments are no shorter
  int64_t chain = kChain;
  Stream* stream = nullptr;  // or what to fetch meanwhile

  // Columns of panel p, from c and from residual.
  ptrdiff_t c_at(int64_t p) const { return panel_at(paired, p - c_first, c_panel); }
  ptrdiff_t residual_at(int64_t p) const { return panel_at(residual_paired, p, residual_panel); }
  static ptrdiff_t panel_at(bool paired, int64_t p, ptrdiff_t step) {
    return paired ? p / 2 * step + p % 2 * kPanel : p * step;
  }
};

// Rows count through all images.
void gemm(const GemmKernel& kernel, const GemmArgs& args, int64_t row_begin, int64_t row_end, int64_t panel_begin,
          int64_t panel_end);

// What multiplies in terms where that pays, or null: splitting the weights costs as much as 16 rows' products, and runs
// of a short K are few for their epilogue. `pixels` are a map's, whatever part of them is multiplied at a time: terms
// give other bits than register tiles.
inline constexpr int64_t kLeastSplitPixels = 16;
inline constexpr int64_t kLeastSplitDepth = 64;
inline const MatrixUnit* gemm_split(const GemmKernel& kernel, int64_t pixels, int64_t k) {
  return pixels >= kLeastSplitPixels && k >= kLeastSplitDepth ? kernel.split : nullptr;
}

// Panels that are multiplied at once where there are as many: a pair, or where rows outgrow L2 more, so that a chain of
// theirs is read once for all.
int64_t gemm_panels(const GemmKernel& kernel, int64_t rows, int64_t k);

// Register tiles take panels in pairs, of a K that is long enough.
inline bool gemm_pairs(const GemmKernel& kernel, int64_t k) { return kernel.pair_rows > 0 && k >= kernel.depth; }

// How often each panel of weights passes by while register tiles multiply `rows` rows of k values.
inline int64_t gemm_passes(const GemmKernel& kernel, int64_t rows, int64_t k) {
  return div_up(rows, gemm_pairs(kernel, k) ? kernel.pair_rows : kernel.max_rows);
}

// How `tasks` workers share a product: a grid of row chunks by panel chunks.
struct GemmGrid {
  int64_t row_chunks;
  int64_t panel_chunks;
};
GemmGrid gemm_grid(const GemmKernel& kernel, int64_t rows, int64_t panels, int64_t workers);

// [n][k] row-major weights to [ceil(n / kPanel)][k][kPanel], missing columns zero.
void pack_panels(const float* weight, int64_t n, int64_t k, ptrdiff_t weight_row, ptrdiff_t weight_column,
                 float* packed);

// float32 panels of even depth to bfloat16 panels [ceil(n / kPanel)][k / 2][kPanel][2]; in place if the pointers agree.
void pack_pairs(const float* panels, int64_t panel_count, int64_t k, uint16_t* packed);

// The exact inverse of pack_pairs' order, widened.
void unpack_pairs(const uint16_t* packed, int64_t panel_count, int64_t k, float* panels);

}  // namespace mnv4
