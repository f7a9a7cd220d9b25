// What a plan's steps are made of. A job is a number of units of equal cost that workers share; units of one step are
// independent, and each output element is computed whole by one unit, so that the result has the same bits whatever
// the number of workers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "kernels/attention/attention.h"
#include "kernels/conv/conv.h"
#include "kernels/dwconv/dwconv.h"
#include "kernels/gemm/gemm.h"
#include "kernels/winograd/winograd.h"

namespace mnv4::engine {

// Activations of one node: planes of 16 channels, [image][block][pixel][16], the last block padded with zeros. A matrix
// unit reads runs of 32 channels: for it planes lie in pairs, [block / 2][image][pixel][32], the last one, too, padded
// with zeros. Then rows of several images are adjacent, and tiles take them together.
struct Planes {
  int64_t offset = 0;  // bytes from the arena's start
  Storage type = Storage::kFloat32;
  int64_t images = 0;
  int64_t channels = 0;
  int64_t height = 0;
  int64_t width = 0;
  // of a pair of planes, of which these may be a part; 0 where they are not in pairs
  int64_t paired_images = 0;

  int64_t pixels() const { return height * width; }
  int64_t blocks() const { return div_up(channels, kPanel); }
  bool paired() const { return paired_images > 0; }
  // From a pixel, a row of them and an image to the next, and from the first block to `b`.
  int64_t pixel() const { return paired() ? 2 * kPanel : kPanel; }
  int64_t row() const { return width * pixel(); }
  int64_t image() const { return pixels() * (paired() ? 2 * kPanel : blocks() * kPanel); }
  int64_t block(int64_t b) const { return GemmArgs::panel_at(paired(), b, paired() ? pair() : plane()); }
  // From a pair to the next; a power of two would put all of them in the same cache sets.
  int64_t pair() const { return (paired_images * pixels() + 4) * pixel(); }
  // Elements of a plane, whatever lies between them.
  int64_t plane() const { return pixels() * kPanel; }
  int64_t bytes() const {
    const int64_t values = paired() ? div_up(blocks(), 2) * pair() : images * image();
    return values * storage_bytes(type);
  }
  // Element i, in an arena that starts at `arena`; a plane.
  void* at(char* arena, int64_t i) const { return advance(static_cast<void*>(arena + offset), type, i); }
  void* at(char* arena, int64_t i, int64_t b) const { return at(arena, i * image() + block(b)); }
  // Zeros beside rows [row_begin, row_end) of block `b`, if it is the last one and has no partner.
  void clear_partner(char* arena, int64_t i, int64_t b, int64_t row_begin, int64_t row_end) const;
};

// The caller's input, strides in floats. Jobs that touch it or the caller's results know the first of their images.
struct Input {
  const float* data;
  ptrdiff_t image;
  ptrdiff_t channel;
  ptrdiff_t block;
  ptrdiff_t row;
  ptrdiff_t pixel;
};

// One run of a plan.
struct Context {
  char* arena;
  Input input;
  // of the caller's batch, that this run computes
  int64_t first_image;
  float* const* outputs;
  // maps among them, else NCHW
  bool nhwc;
  // [step] seconds between the barriers, as worker 0 sees them; null where nobody asks
  double* step_seconds;
};

class Job;

// What a worker has of its own during a step.
struct Worker {
  float* scratch;
  Stream stream;
  // whose packed rows are in scratch, or null
  const Job* packed = nullptr;
};

class Job {
 public:
  Job(int64_t units, double unit_cost) : units(units), unit_cost(unit_cost) {}
  virtual ~Job() = default;
  // Units [begin, end); the worker's scratch holds scratch_floats() floats.
  virtual void run(const Context& context, int64_t begin, int64_t end, Worker& worker) const = 0;
  virtual int64_t scratch_floats() const { return 0; }
  // Units that are worth taking at once.
  virtual int64_t grain() const { return 1; }
  // Weights that units [begin, end) read, in that order; empty where fetching them ahead is not worth it.
  virtual std::vector<Stream::Range> weights(int64_t begin, int64_t end) const;
  // Bytes of weights that the tiles of units [begin, end) pass through: the clock by which a stream runs.
  virtual int64_t passes(int64_t begin, int64_t end) const;

  const int64_t units;
  // in multiply-adds of one core, roughly; only ratios within a step matter
  const double unit_cost;
};

// A depthwise convolution as part of a job.
struct Depthwise {
  DwconvArgs args{};     // without x and y
  const float* weight;   // [block][taps][16]
  const float* bias;     // [block * 16]
  bool reflect = false;  // taps outside the image mirror it
  Planes y;

  // A block's plane of an image: rows [row_begin, row_end). `padded` is scratch for the mirrored plane.
  void run(const DwconvKernel& kernel, const void* x, int64_t x_pixel, char* arena, int64_t image, int64_t block,
           int64_t row_begin, int64_t row_end, float* padded) const;
  // Output rows that read nothing behind the first `rows` of the input.
  int64_t rows_ready(int64_t rows) const;
  int64_t padded_floats() const;
  double plane_cost() const;
};

// The caller's input to planes, for a program that doesn't begin with a dense convolution; a unit is an input row.
class InputJob : public Job {
 public:
  InputJob(const Planes& y, int64_t first_image);
  void run(const Context& context, int64_t begin, int64_t end, Worker& worker) const override;

 private:
  Planes y_;
  int64_t first_image_;
};

// Dense convolution, the one before it where nobody else reads that one's rows, and the pointwise one behind it where
// nobody else reads its own; a unit is an output row of an image, or two of them with Winograd's products.
class ConvJob : public Job {
 public:
  struct Projection {
    const void* weight = nullptr;
    const float* bias = nullptr;
    Activation act = Activation::kNone;
    Planes y;
    std::optional<Planes> residual;
  };
  struct Spec {
    ConvArgs args{};          // without x, y and their strides
    bool from_input = false;  // else from x
    Planes x;
    int64_t first_image = 0;
    bool has_source = false;  // then x is the source's
    ConvArgs source{};
    Planes y;
    std::optional<Projection> projection;  // then y is only a row in scratch
  };
  explicit ConvJob(Spec spec);
  void run(const Context& context, int64_t begin, int64_t end, Worker& worker) const override;
  int64_t scratch_floats() const override;
  // a run begins with filling the ring
  int64_t grain() const override { return 8; }
  std::vector<Stream::Range> weights(int64_t begin, int64_t end) const override;
  int64_t passes(int64_t begin, int64_t end) const override;

 private:
  // Output rows [first, first + rows) of an image, by ConvRows or WinogradRows; `buffer` is for rows to project.
  template <class Rows>
  void walk(const Context& context, const ConvArgs& args, ConvRows* source, int64_t image, int64_t first, int64_t rows,
            float* buffer, Worker& worker) const;
  void project(const Context& context, int64_t image, int64_t oy, const void* row, Stream* stream) const;
  int64_t rows_of_unit() const { return spec_.args.winograd ? WinogradRows::kRows : ConvRows::kRows; }
  int64_t own_scratch() const;
  // of a row to project, which lies as the map's rows would, and what a tile reads behind it
  int64_t row_floats() const {
    return spec_.y.width * round_up(spec_.y.channels, spec_.y.pixel()) + (spec_.y.paired() ? kMatrixRows * kPanel : 0);
  }

  // The convolution that reads x.
  ConvArgs& outer() { return spec_.has_source ? spec_.source : spec_.args; }

  Spec spec_;
  const GemmKernel& kernel_;
  const GemmKernel& source_kernel_;
  const GemmKernel* projection_kernel_ = nullptr;
  std::vector<ptrdiff_t> segment_;
};

// The left operand or the result of a product: planes, or rows of a plain matrix.
struct Matrix {
  int64_t offset = 0;  // bytes
  Storage type = Storage::kFloat32;
  int64_t images = 0;
  int64_t rows = 0;  // per image
  ptrdiff_t image = 0;
  ptrdiff_t row = 0;
  ptrdiff_t panel = 0;  // between 16 columns and the next; in pairs, between 32
  int64_t columns = 0;
  bool paired = false;

  static Matrix of(const Planes& p);
  static Matrix row_major(Storage type, int64_t images, int64_t rows, int64_t columns);
  int64_t bytes() const { return images * image * storage_bytes(type); }
  // From the first panel to panel p.
  ptrdiff_t panel_at(int64_t p) const { return GemmArgs::panel_at(paired, p, panel); }
  void* at(char* arena, int64_t i) const { return advance(static_cast<void*>(arena + offset), type, i); }
};

// Pointwise convolution, and what rides on it while a panel of 16 channels is in cache.
class PanelJob : public Job {
 public:
  struct Spec {
    Matrix x;
    Matrix y;
    bool keep_y = true;            // else y is scratch that the rider consumes
    int64_t depth = 0;             // rows of a packed panel
    const void* weight = nullptr;  // of x's type
    const float* bias = nullptr;
    Activation act = Activation::kNone;
    bool has_residual = false;
    Matrix residual;
    std::optional<Depthwise> dw;  // of the panel's plane
    bool mean = false;            // of the panel's plane, over its pixels; only where y is not kept
    Planes mean_y;
    // without a rider: this part of the tiles of x's rows
    int64_t part = 0;
    int64_t parts = 1;
  };
  explicit PanelJob(Spec spec);
  void run(const Context& context, int64_t begin, int64_t end, Worker& worker) const override;
  int64_t grain() const override;
  int64_t scratch_floats() const override;
  std::vector<Stream::Range> weights(int64_t begin, int64_t end) const override;
  int64_t passes(int64_t begin, int64_t end) const override;

 private:
  int64_t panel_bytes() const { return spec_.depth * kPanel * storage_bytes(spec_.x.type); }

  // What is multiplied at once: panels of images, and of a single image some of the rows only.
  struct Piece {
    int64_t panel;
    int64_t panels;
    int64_t image;
    int64_t images;
    int64_t row_begin;  // from first_row_
    int64_t row_end;
    int64_t units;
  };
  Piece piece(int64_t begin, int64_t end) const;
  // Rows of images that are in scratch at the same time, of several images all rows.
  struct Packed {
    int64_t image;
    int64_t images;
    int64_t row_begin;
    int64_t row_end;
    int64_t pitch() const { return PackedRows::pitch(images * (row_end - row_begin)); }
  };
  void pack(const Context& context, const Packed& packed, float* to) const;
  void run_piece(const Context& context, const Piece& piece, const Packed& packed, Worker& worker) const;
  void run_packed(const Context& context, int64_t begin, int64_t end, const Packed& packed, Worker& worker) const;
  void ride(const Context& context, const Piece& piece, const void* planes, int64_t row_begin, int64_t row_end,
            float* padded) const;
  GemmArgs product(const Context& context) const;
  // rows of an image that this job computes
  int64_t rows() const { return last_row_ - first_row_; }
  int64_t packed_floats() const;
  int64_t planes_at_a_time() const;
  int64_t plane_floats() const { return spec_.x.rows * kPanel; }

  const GemmKernel& kernel_;
  const DwconvKernel& dwconv_;
  Spec spec_;
  const MatrixUnit* unit_;  // that multiplies, or null
  bool whole_;              // a unit is a whole panel of an image, else a tile of rows
  bool packs_;              // rows are packed for a matrix unit first, unless their planes lie in pairs
  // of what is packed: with all of it, L2 would have no room for the rest
  int64_t images_at_once_ = 0;
  int64_t rows_at_once_ = 0;
  int64_t tiles_;
  int64_t first_tile_;
  int64_t last_tile_;
  int64_t first_row_;
  int64_t last_row_;
  std::vector<ptrdiff_t> segment_;
};

// Depthwise convolution of its own, or one part of its rows; a unit is an output row of one plane.
class DepthwiseJob : public Job {
 public:
  DepthwiseJob(const Planes& x, Depthwise dw, int64_t part, int64_t parts);
  void run(const Context& context, int64_t begin, int64_t end, Worker& worker) const override;
  int64_t grain() const override { return std::clamp<int64_t>(last_row_ - first_row_, 1, 8); }
  int64_t scratch_floats() const override { return dw_.padded_floats(); }

 private:
  const DwconvKernel& kernel_;
  Planes x_;
  Depthwise dw_;
  int64_t first_row_;
  int64_t last_row_;
};

// Normalises a plane and downsamples it for key and for value; a unit is a plane.
class DownsampleJob : public Job {
 public:
  DownsampleJob(const Planes& x, const float* scale, const float* shift, Depthwise key, Depthwise value);
  void run(const Context& context, int64_t begin, int64_t end, Worker& worker) const override;
  int64_t scratch_floats() const override { return x_.pixels() * x_.pixel(); }

 private:
  const DwconvKernel& kernel_;
  Planes x_;
  const float* scale_;
  const float* shift_;
  Depthwise key_;
  Depthwise value_;
};

// Row-major float32 keys [P][Dk] to the packed panels of attention's first product; a unit is a panel of an image.
class KeyPanelsJob : public Job {
 public:
  KeyPanelsJob(const Matrix& key, const Matrix& packed);
  void run(const Context& context, int64_t begin, int64_t end, Worker& worker) const override;
  int64_t scratch_floats() const override { return packed_.columns * kPanel; }

 private:
  Matrix key_;
  Matrix packed_;
};

// Planes of float32 values, which are the packed panels of attention's second product, to panels of pairs; a unit is a
// plane.
class ValuePairsJob : public Job {
 public:
  ValuePairsJob(const Planes& value, const Matrix& packed);
  void run(const Context& context, int64_t begin, int64_t end, Worker& worker) const override;
  int64_t scratch_floats() const override { return packed_.rows * kPanel; }

 private:
  Planes value_;
  Matrix packed_;
};

// Scores, softmax and mix; a unit is a block of query rows of an image.
class AttentionJob : public Job {
 public:
  AttentionJob(const AttentionArgs& args, int64_t rows, const Matrix& query, const Matrix& key, const Matrix& value,
               const Matrix& y);
  void run(const Context& context, int64_t begin, int64_t end, Worker& worker) const override;
  int64_t scratch_floats() const override { return attention_scratch(kernel_, args_.positions); }

 private:
  const GemmKernel& kernel_;
  const GemmKernel& mixing_;
  AttentionArgs args_;
  int64_t rows_;
  int64_t blocks_;
  Matrix query_;
  Matrix key_;    // packed
  Matrix value_;  // packed
  Matrix y_;
};

// Mean over the pixels of each plane; a unit is a plane.
class MeanJob : public Job {
 public:
  MeanJob(const Planes& x, const Planes& y);
  void run(const Context& context, int64_t begin, int64_t end, Worker& worker) const override;
  int64_t scratch_floats() const override { return x_.pixels() * x_.pixel(); }

 private:
  Planes x_;
  Planes y_;
};

// A product of few rows; a unit is a group of panels, so that a worker keeps several streams of weights in flight.
class LinearJob : public Job {
 public:
  LinearJob(const Planes& x, const Planes& y, const void* weight, const float* bias, Activation act);
  void run(const Context& context, int64_t begin, int64_t end, Worker& worker) const override;
  std::vector<Stream::Range> weights(int64_t begin, int64_t end) const override;
  int64_t passes(int64_t begin, int64_t end) const override;

 private:
  const GemmKernel& kernel_;
  Planes x_;
  Planes y_;
  const void* weight_;
  const float* bias_;
  Activation act_;
};

// The caller's result from planes or from rows; a unit is 16 channels of an image.
class OutputJob : public Job {
 public:
  OutputJob(const Planes& x, int64_t index, int64_t first_image);
  void run(const Context& context, int64_t begin, int64_t end, Worker& worker) const override;
  int64_t scratch_floats() const override { return x_.pixels() * x_.pixel(); }

 private:
  Planes x_;
  int64_t index_;
  int64_t first_image_;
};

}  // namespace mnv4::engine
