#include <algorithm>

#include "engine/job.h"
#include "kernels/pointwise/pointwise.h"

namespace mnv4::engine {
namespace {

// Pixels of 16 channels that are multiplied before their rider reads them: half of an L1 and more.
constexpr int64_t kPixelsAtATime = 512;

// A panel that only a mean consumes is kept as it was summed.
Storage panel_type(const PanelJob::Spec& s) { return s.mean ? Storage::kFloat32 : s.y.type; }

const GemmKernel& panel_kernel(const PanelJob::Spec& s) { return gemm_kernel(s.x.type, panel_type(s)); }

// The matrix unit that multiplies, or null.
const MatrixUnit* panel_unit(const PanelJob::Spec& s) {
  const GemmKernel& kernel = panel_kernel(s);
  return kernel.matrix ? kernel.matrix : gemm_split(kernel, s.x.rows, s.depth);
}

int64_t panel_tiles(const PanelJob::Spec& s) { return div_up(s.x.rows, panel_kernel(s).max_rows); }

int64_t panel_units(const PanelJob::Spec& s) {
  const int64_t panels = s.x.images * div_up(s.y.columns, kPanel);
  const int64_t tiles = panel_tiles(s);
  return s.dw || s.mean ? panels : panels * (tiles * (s.part + 1) / s.parts - tiles * s.part / s.parts);
}

double panel_cost(const PanelJob::Spec& s) {
  const bool pairs = s.x.type == Storage::kBfloat16;
  const double rate = panel_unit(s) ? (pairs ? 8.0 : 2.0) : pairs ? 2.0 : 1.0;
  const double product = static_cast<double>(s.x.rows * s.x.columns * kPanel) / rate;
  if (!s.dw && !s.mean) return product / static_cast<double>(panel_tiles(s));
  return product + (s.dw ? s.dw->plane_cost() : 0.0);
}

}  // namespace

PanelJob::PanelJob(Spec spec)
    : Job(panel_units(spec), panel_cost(spec)),
      kernel_(panel_kernel(spec)),
      dwconv_(dwconv_kernel(panel_type(spec), spec.dw ? spec.dw->y.type : panel_type(spec))),
      spec_(std::move(spec)),
      unit_(panel_unit(spec_)),
      whole_(spec_.dw || spec_.mean),
      tiles_(panel_tiles(spec_)),
      first_tile_(tiles_ * spec_.part / spec_.parts),
      last_tile_(tiles_ * (spec_.part + 1) / spec_.parts),
      first_row_(whole_ ? 0 : spec_.x.rows * first_tile_ / tiles_),
      last_row_(whole_ ? spec_.x.rows : spec_.x.rows * last_tile_ / tiles_) {
  const bool planes = spec_.x.paired || (spec_.x.row == kPanel && spec_.x.panel != kPanel);
  const int64_t segments = planes ? spec_.depth / kPanel : 1;
  for (int64_t s = 0; s < segments; ++s) segment_.push_back(s * spec_.x.panel);
  const bool in_place = kernel_.matrix && !planes && spec_.x.columns % kMatrixDepth == 0;
  packs_ = unit_ && !spec_.x.paired && !in_place;
  if (!packs_) return;
  const int64_t budget = PackedRows::most_bytes();
  const int64_t image_bytes = PackedRows::bytes(spec_.x.type, rows(), spec_.depth);
  images_at_once_ =
      std::clamp<int64_t>(budget / std::max<int64_t>(1, image_bytes), 1, std::max<int64_t>(1, spec_.x.images));
  rows_at_once_ = rows();
  if (!whole_ && image_bytes > budget) {
    // what tiles take at once
    constexpr int64_t kBlock = 2 * kMatrixRows;
    rows_at_once_ = std::max(rows() * budget / image_bytes / kBlock, int64_t{1}) * kBlock;
  }
}

int64_t PanelJob::packed_floats() const {
  if (!packs_) return 0;
  const int64_t bytes = PackedRows::bytes(spec_.x.type, images_at_once_ * rows_at_once_, spec_.depth);
  return round_up(div_up(bytes, static_cast<int64_t>(sizeof(float))), kPanel);
}

// Planes that a rider takes from scratch at once: those of few pixels in groups, as long as they stay in L1.
int64_t PanelJob::planes_at_a_time() const {
  if (!unit_) return gemm_panels(kernel_, rows(), spec_.depth);
  return std::clamp<int64_t>(kPixelsAtATime / spec_.x.rows, 2, 2 * std::max<int64_t>(1, spec_.x.images));
}

int64_t PanelJob::scratch_floats() const {
  const int64_t planes = spec_.keep_y ? 0 : planes_at_a_time() * plane_floats();
  return packed_floats() + planes + (spec_.dw ? spec_.dw->padded_floats() : 0);
}

int64_t PanelJob::grain() const {
  const int64_t tiles = whole_ ? 1 : last_tile_ - first_tile_;
  // each piece packs its rows anew
  if (packs_ && (images_at_once_ < spec_.x.images || rows_at_once_ < rows())) return div_up(units, 2);
  // a single panel takes a matrix unit almost as long as two
  if (unit_) return std::max<int64_t>(1, 2 * spec_.x.images * tiles);
  return whole_ ? 1 : std::clamp<int64_t>(tiles, 1, 8);
}

// The largest piece that units [begin, end) begin with.
PanelJob::Piece PanelJob::piece(int64_t begin, int64_t end) const {
  const int64_t tiles = whole_ ? 1 : last_tile_ - first_tile_;
  const int64_t units = spec_.x.images * tiles;
  const int64_t panel = begin / units;
  const int64_t image = begin % units / tiles;
  const int64_t tile = begin % tiles;
  const int64_t count = end - begin;
  if (tile > 0 || count < tiles) {
    const int64_t last = std::min(tiles, tile + count);
    const auto row = [&](int64_t t) { return spec_.x.rows * (first_tile_ + t) / tiles_ - first_row_; };
    return {panel, 1, image, 1, row(tile), row(last), last - tile};
  }
  const int64_t most = std::min(gemm_panels(kernel_, rows(), spec_.depth), count / units);
  const int64_t panels = image == 0 ? std::max<int64_t>(1, most / 2 * 2) : 1;
  const int64_t images = panels > 1 ? spec_.x.images : std::min(spec_.x.images - image, count / tiles);
  return {panel, panels, image, images, 0, rows(), panels * images * tiles};
}

// A product of all images and panels; what it reads and writes begins with this job's first row.
GemmArgs PanelJob::product(const Context& context) const {
  const Spec& s = spec_;
  GemmArgs a{};
  a.a = s.x.at(context.arena, first_row_ * s.x.row);
  a.a_row = s.x.row;
  a.a_image = s.x.image;
  a.image_rows = rows();
  a.segment = segment_.data();
  a.segments = static_cast<int64_t>(segment_.size());
  a.segment_length = a.segments > 1 ? kPanel : s.x.panel == kPanel ? s.x.columns : s.depth;
  a.b = s.weight;
  a.b_panel = s.depth * kPanel;
  a.bias = s.bias;
  a.act = s.act;
  a.chain = gemm_chain(s.x.rows);
  a.split = unit_ && !kernel_.matrix;
  // planes are padded to whole panels, rows of a matrix are not
  const bool row_major = s.y.panel == kPanel && s.keep_y && s.y.row != kPanel;
  a.n = row_major ? s.y.columns : round_up(s.y.columns, kPanel);
  a.c_row = kPanel;
  if (s.keep_y) {
    a.c = s.y.at(context.arena, first_row_ * s.y.row);
    a.c_row = s.y.row;
    a.c_panel = s.y.panel;
    a.c_image = s.y.image;
    a.paired = s.y.paired;
  }
  if (s.has_residual) {
    a.residual = s.residual.at(context.arena, first_row_ * s.residual.row);
    a.residual_row = s.residual.row;
    a.residual_panel = s.residual.panel;
    a.residual_paired = s.residual.paired;
    a.residual_image = s.residual.image;
  }
  return a;
}

// What rides on a piece's planes, of which rows up to row_end are there, and were up to row_begin before.
void PanelJob::ride(const Context& context, const Piece& piece, const void* planes, int64_t row_begin, int64_t row_end,
                    float* padded) const {
  const Spec& s = spec_;
  for (int64_t p = 0; p < piece.panels; ++p) {
    const int64_t panel = piece.panel + p;
    for (int64_t i = 0; i < piece.images; ++i) {
      const int64_t image = piece.image + i;
      const void* plane = s.keep_y ? s.y.at(context.arena, image * s.y.image + s.y.panel_at(panel))
                                   : advance(planes, panel_type(s), (p * piece.images + i) * plane_floats());
      if (s.dw) {
        const int64_t width = s.dw->args.width;
        s.dw->run(dwconv_, plane, s.keep_y ? s.y.row : kPanel, context.arena, image, panel,
                  s.dw->rows_ready(row_begin / width), s.dw->rows_ready(row_end / width), padded);
      }
      if (s.mean) {
        float mean[kPanel];
        pointwise_kernels().mean_pixels(static_cast<const float*>(plane), s.x.rows, kPanel, kPanel, mean);
        void* y = s.mean_y.at(context.arena, image * s.mean_y.image() + panel * kPanel);
        pointwise_kernels().narrow(mean, s.mean_y.type, y, kPanel);
      }
    }
  }
}

void PanelJob::run_piece(const Context& context, const Piece& piece, const Packed& packed, Worker& worker) const {
  const Spec& s = spec_;
  float* planes = worker.scratch + packed_floats();
  float* padded = planes + (s.keep_y ? 0 : planes_at_a_time() * plane_floats());
  GemmArgs a = product(context);
  if (packs_) {
    const int64_t row = (piece.image - packed.image) * rows() - packed.row_begin;
    a.a = reinterpret_cast<const char*>(worker.scratch) + row * PackedRows::row_bytes(s.x.type);
    a.packed_pitch = packed.pitch();
  } else {
    a.a = advance(a.a, s.x.type, piece.image * a.a_image);
    if (s.x.paired) a.packed_pitch = s.x.panel / kMatrixDepth;
  }
  // pairs are counted from the first panel
  const int64_t first = a.paired || a.residual_paired ? piece.panel : 0;
  const int64_t passed = piece.panel - first;
  a.b = advance(a.b, s.x.type, passed * a.b_panel);
  a.bias += passed * kPanel;
  a.n -= passed * kPanel;
  if (s.keep_y) {
    a.c = advance(a.c, kernel_.output, piece.image * a.c_image + passed * a.c_panel);
  } else {
    a.c = planes;
    a.c_first = first;
    a.c_image = plane_floats();
    a.c_panel = piece.images * plane_floats();
  }
  if (a.residual) {
    a.residual = advance(a.residual, kernel_.output, piece.image * a.residual_image + passed * a.residual_panel);
  }
  a.stream = &worker.stream;
  const int64_t end = (piece.images - 1) * rows() + piece.row_end;
  int64_t strip = end;
  // a plane that outgrows L1 is read by its rider strip by strip, while it is being written
  if (unit_ && s.dw && !s.dw->reflect && piece.images == 1 && end > kPixelsAtATime) {
    strip = std::max<int64_t>(1, kPixelsAtATime / 2 / s.dw->args.width) * s.dw->args.width;
  }
  for (int64_t row = piece.row_begin; row < end; row += strip) {
    const int64_t last = std::min(row + strip, end);
    gemm(kernel_, a, row, last, first, first + piece.panels);
    if (whole_) ride(context, piece, planes, strip < end ? row : 0, strip < end ? last : s.x.rows, padded);
  }
}

void PanelJob::pack(const Context& context, const Packed& packed, float* to) const {
  const GemmArgs a = product(context);
  const int64_t rows = packed.row_end - packed.row_begin;
  for (int64_t i = 0; i < packed.images; ++i) {
    GemmArgs image = a;
    image.a = advance(a.a, spec_.x.type, (packed.image + i) * a.a_image);
    unit_->pack_rows(image, packed.row_begin, packed.row_end,
                     reinterpret_cast<char*>(to) + i * rows * PackedRows::row_bytes(spec_.x.type), packed.pitch());
  }
}

void PanelJob::run_packed(const Context& context, int64_t begin, int64_t end, const Packed& packed,
                          Worker& worker) const {
  while (begin < end) {
    const Piece next = piece(begin, end);
    int64_t images = whole_ ? std::max<int64_t>(1, planes_at_a_time() / next.panels) : next.images;
    // some rows of each image don't lie side by side
    if (spec_.x.paired && rows() < spec_.x.rows) images = 1;
    const int64_t last = std::min(next.image + next.images, packed.image + packed.images);
    Piece part = next;
    part.row_begin = std::max(next.row_begin, packed.row_begin);
    part.row_end = std::min(next.row_end, packed.row_end);
    for (part.image = std::max(next.image, packed.image); part.image < last; part.image += images) {
      part.images = std::min(images, last - part.image);
      if (part.row_begin < part.row_end) run_piece(context, part, packed, worker);
    }
    begin += next.units;
  }
}

void PanelJob::run(const Context& context, int64_t begin, int64_t end, Worker& worker) const {
  const int64_t images = packs_ ? images_at_once_ : spec_.x.images;
  const int64_t most = packs_ ? rows_at_once_ : rows();
  const bool all = images >= spec_.x.images && most >= rows();
  for (int64_t image = 0; image < spec_.x.images; image += images) {
    for (int64_t row = 0; row < rows(); row += most) {
      const Packed packed{image, std::min(images, spec_.x.images - image), row, std::min(row + most, rows())};
      if (packs_ && !(all && worker.packed == this)) pack(context, packed, worker.scratch);
      run_packed(context, begin, end, packed, worker);
    }
  }
  worker.packed = packs_ && all ? this : nullptr;
}

std::vector<Stream::Range> PanelJob::weights(int64_t begin, int64_t end) const {
  if (begin == end) return {};
  const int64_t units = spec_.x.images * (whole_ ? 1 : last_tile_ - first_tile_);
  const int64_t last = div_up(end, units);
  // panels that are multiplied together are needed together
  const int64_t group = gemm_panels(kernel_, rows(), spec_.depth);
  std::vector<Stream::Range> found;
  for (int64_t p = begin / units; p < last; p += group) {
    const void* panel = advance(spec_.weight, spec_.x.type, p * spec_.depth * kPanel);
    found.push_back({panel, std::min(group, last - p) * panel_bytes()});
  }
  return found;
}

int64_t PanelJob::passes(int64_t begin, int64_t end) const {
  // more workers than tiles
  if (begin == end) return 0;
  const int64_t units = whole_ ? 1 : last_tile_ - first_tile_;
  return (end - begin) * gemm_passes(kernel_, rows(), spec_.depth) * panel_bytes() / units;
}

}  // namespace mnv4::engine
