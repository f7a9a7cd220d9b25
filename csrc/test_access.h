// `_C.microkernels`: every row of the kernels' lists by name, and one call of it on the caller's memory, for tests.
// Buffers are what Python hands over as such; their sizes are the caller's business, as they are in the engine.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "cpu/features.h"
#include "kernels/conv/conv.h"
#include "kernels/dwconv/dwconv.h"
#include "kernels/gemm/gemm.h"
#include "kernels/peak/peak.h"
#include "kernels/pointwise/pointwise.h"
#include "kernels/stem/stem.h"
#include "kernels/winograd/winograd.h"

namespace mnv4 {

#define MNV4_GEMM_KERNEL(tier, input, output, name) extern const GemmKernel name;
#include "kernels/gemm/gemm.inc"
#undef MNV4_GEMM_KERNEL
#define MNV4_DWCONV_KERNEL(tier, input, output, name) extern const DwconvKernel name;
#include "kernels/dwconv/dwconv.inc"
#undef MNV4_DWCONV_KERNEL
#define MNV4_POINTWISE_KERNELS(tier, name) extern const PointwiseKernels name;
#include "kernels/pointwise/pointwise.inc"
#undef MNV4_POINTWISE_KERNELS
#define MNV4_WINOGRAD_KERNELS(tier, name) extern const WinogradKernels name;
#include "kernels/winograd/winograd.inc"
#undef MNV4_WINOGRAD_KERNELS
#define MNV4_STEM_KERNEL(tier, name) extern const StemKernel name;
#include "kernels/stem/stem.inc"
#undef MNV4_STEM_KERNEL
#define MNV4_PEAK_KERNEL(tier, name, bf16) extern const PeakKernel name;
#include "kernels/peak/peak.inc"
#undef MNV4_PEAK_KERNEL

namespace test_access {

namespace py = pybind11;
using cpu::Tier;

template <class Kernel>
struct Row {
  Tier tier;
  const char* listed_name;
  const Kernel* kernel;
};

inline std::vector<Row<GemmKernel>> gemm_rows() {
  return {
#define MNV4_GEMM_KERNEL(tier, input, output, name) {tier, #name, &name},
#include "kernels/gemm/gemm.inc"
#undef MNV4_GEMM_KERNEL
  };
}

inline std::vector<Row<DwconvKernel>> dwconv_rows() {
  return {
#define MNV4_DWCONV_KERNEL(tier, input, output, name) {tier, #name, &name},
#include "kernels/dwconv/dwconv.inc"
#undef MNV4_DWCONV_KERNEL
  };
}

inline std::vector<Row<PointwiseKernels>> pointwise_rows() {
  return {
#define MNV4_POINTWISE_KERNELS(tier, name) {tier, #name, &name},
#include "kernels/pointwise/pointwise.inc"
#undef MNV4_POINTWISE_KERNELS
  };
}

inline std::vector<Row<WinogradKernels>> winograd_rows() {
  return {
#define MNV4_WINOGRAD_KERNELS(tier, name) {tier, #name, &name},
#include "kernels/winograd/winograd.inc"
#undef MNV4_WINOGRAD_KERNELS
  };
}

inline std::vector<Row<StemKernel>> stem_rows() {
  return {
#define MNV4_STEM_KERNEL(tier, name) {tier, #name, &name},
#include "kernels/stem/stem.inc"
#undef MNV4_STEM_KERNEL
  };
}

inline std::vector<Row<PeakKernel>> peak_rows() {
  return {
#define MNV4_PEAK_KERNEL(tier, name, bf16) {tier, #name, &name},
#include "kernels/peak/peak.inc"
#undef MNV4_PEAK_KERNEL
  };
}

inline const char* storage_name(Storage type) {
  return type == Storage::kFloat32 ? "float32" : type == Storage::kBfloat16 ? "bfloat16" : "float16";
}

inline Storage parse_storage(const std::string& name) {
  for (Storage type : {Storage::kFloat32, Storage::kBfloat16, Storage::kFloat16}) {
    if (name == storage_name(type)) return type;
  }
  throw py::value_error("`type` must be float32, bfloat16 or float16, got '" + name + "'");
}

inline Activation activation(const std::string& name) {
  Activation act;
  if (!parse_activation(name.c_str(), &act)) throw py::value_error("`act` is no activation: '" + name + "'");
  return act;
}

// The row of that name, refused where this processor would fault.
template <class Kernel>
const Kernel& find(const std::vector<Row<Kernel>>& rows, const std::string& name) {
  for (const Row<Kernel>& row : rows) {
    if (name != row.listed_name) continue;
    if (row.tier > cpu::detected_tier()) throw py::value_error("this processor can't run " + name);
    return *row.kernel;
  }
  throw py::value_error("no kernel is called '" + name + "'");
}

// What a row says of itself: the name that is listed, the one in its table, its tier, and its types if it has any.
template <class Kernel>
py::dict facts(const Row<Kernel>& row) {
  py::dict found;
  found["listed_name"] = row.listed_name;
  found["name"] = row.kernel->name;
  found["tier"] = cpu::tier_name(row.tier);
  if constexpr (requires { row.kernel->input; }) {
    found["input"] = storage_name(row.kernel->input);
    found["output"] = storage_name(row.kernel->output);
  }
  if constexpr (requires { row.kernel->max_rows; }) {
    found["matrix"] = row.kernel->matrix != nullptr;
    found["split"] = row.kernel->split != nullptr;
    found["max_rows"] = row.kernel->max_rows;
    found["pair_rows"] = row.kernel->pair_rows;
    found["row_stride"] = std::vector<ptrdiff_t>(row.kernel->row_stride, row.kernel->row_stride + kRowVariants);
    const int64_t* lengths = row.kernel->segment_length;
    found["segment_length"] = std::vector<int64_t>(lengths, lengths + kRowVariants);
  }
  return found;
}

template <class Kernel>
py::list all_facts(const std::vector<Row<Kernel>>& rows) {
  py::list found;
  for (const Row<Kernel>& row : rows) found.append(facts(row));
  return found;
}

inline py::dict lists() {
  py::dict found;
  found["gemm"] = all_facts(gemm_rows());
  found["dwconv"] = all_facts(dwconv_rows());
  found["pointwise"] = all_facts(pointwise_rows());
  found["winograd"] = all_facts(winograd_rows());
  found["stem"] = all_facts(stem_rows());
  found["peak"] = all_facts(peak_rows());
  return found;
}

using Numbers = std::map<std::string, int64_t>;
using OptionalBuffer = std::optional<py::buffer>;

inline void* data(const py::buffer& buffer, bool writable = false) { return buffer.request(writable).ptr; }
inline void* data(const OptionalBuffer& buffer) { return buffer ? data(*buffer) : nullptr; }

// One tile. `variant` is a RowVariant; a `pair` takes two panels.
inline void run_gemm_tile(const std::string& name, const Numbers& n, const std::vector<ptrdiff_t>& segments,
                          const std::string& act, const py::buffer& a, const py::buffer& b, const py::buffer& bias,
                          const OptionalBuffer& gamma, const OptionalBuffer& residual, const py::buffer& c,
                          const py::buffer& partial) {
  const GemmKernel& kernel = find(gemm_rows(), name);
  GemmTile tile{};
  tile.a = data(a);
  tile.a_row = n.at("a_row");
  tile.segment = segments.data();
  tile.segments = static_cast<int64_t>(segments.size());
  tile.segment_length = n.at("segment_length");
  tile.b = data(b);
  tile.b_panel = n.at("b_panel");
  tile.bias = static_cast<const float*>(data(bias));
  tile.gamma = static_cast<const float*>(data(gamma));
  tile.residual = data(residual);
  tile.residual_row = n.at("residual_row");
  tile.c = data(c, true);
  tile.c_row = n.at("c_row");
  tile.c_panel = n.at("c_panel");
  tile.residual_panel = n.at("residual_panel");
  tile.columns = static_cast<int>(n.at("columns"));
  tile.act = activation(act);
  tile.first = n.at("first") != 0;
  tile.last = n.at("last") != 0;
  tile.partial = static_cast<float*>(data(partial, true));
  const int64_t variant = n.at("variant");
  const int64_t rows = n.at("rows");
  const bool pair = n.at("pair") != 0;
  const int most = pair ? kernel.pair_rows : kernel.max_rows;
  if (kernel.matrix || rows < 1 || rows > most || variant < 0 || variant >= kRowVariants) {
    throw py::value_error("no tile of " + name + " has that many rows");
  }
  (pair ? kernel.pair[variant] : kernel.tile[variant])[rows](tile);
}

// A product of rows [row_begin, row_end) and panels [panel_begin, panel_end). With `packed` the rows of all images are
// packed for the matrix unit first.
inline void run_gemm(const std::string& name, const Numbers& n, const std::vector<ptrdiff_t>& segments,
                     const std::string& act, const py::buffer& a, const py::buffer& b, const py::buffer& bias,
                     const OptionalBuffer& gamma, const OptionalBuffer& residual, const py::buffer& c) {
  const GemmKernel& kernel = find(gemm_rows(), name);
  GemmArgs args{};
  args.a = data(a);
  args.a_row = n.at("a_row");
  args.segment = segments.data();
  args.segments = static_cast<int64_t>(segments.size());
  args.segment_length = n.at("segment_length");
  args.b = data(b);
  args.b_panel = n.at("b_panel");
  args.bias = static_cast<const float*>(data(bias));
  args.gamma = static_cast<const float*>(data(gamma));
  args.residual = data(residual);
  args.residual_row = n.at("residual_row");
  args.residual_panel = n.at("residual_panel");
  args.residual_image = n.at("residual_image");
  args.c = data(c, true);
  args.c_row = n.at("c_row");
  args.c_panel = n.at("c_panel");
  args.c_image = n.at("c_image");
  args.c_first = n.at("c_first");
  args.paired = n.at("c_paired") != 0;
  args.residual_paired = n.at("residual_paired") != 0;
  args.n = n.at("n");
  args.act = activation(act);
  args.image_rows = n.at("image_rows");
  args.a_image = n.at("a_image");
  args.rows_behind = n.at("rows_behind");
  args.split = n.at("split") != 0;
  args.chain = n.at("chain");
  const MatrixUnit* unit = args.split ? kernel.split : kernel.matrix;
  if (args.split && !unit) throw py::value_error(name + " multiplies nothing in terms");
  std::vector<char> packed;
  if (n.at("packed")) {
    if (!unit) throw py::value_error(name + " reads no packed rows");
    const int64_t rows = n.at("images") * args.image_rows;
    const int64_t k = args.segments * args.segment_length;
    packed.assign(static_cast<size_t>(PackedRows::bytes(kernel.input, rows, k)), '\xff');
    args.packed_pitch = PackedRows::pitch(rows);
    for (int64_t i = 0; i < n.at("images"); ++i) {
      GemmArgs image = args;
      image.a = advance(args.a, kernel.input, i * args.a_image);
      void* to = packed.data() + i * args.image_rows * PackedRows::row_bytes(kernel.input);
      unit->pack_rows(image, 0, args.image_rows, to, args.packed_pitch);
    }
    args.a = packed.data();
  }
  gemm(kernel, args, n.at("row_begin"), n.at("row_end"), n.at("panel_begin"), n.at("panel_end"));
}

inline void run_dwconv(const std::string& name, const Numbers& n, const std::string& act, const py::buffer& x,
                       const py::buffer& weight, const py::buffer& bias, const py::buffer& y) {
  const DwconvKernel& kernel = find(dwconv_rows(), name);
  const auto small = [&](const char* key) { return static_cast<int>(n.at(key)); };
  DwconvArgs args{};
  args.x = data(x);
  args.x_row = n.at("x_row");
  args.x_pixel = n.at("x_pixel");
  args.height = n.at("height");
  args.width = n.at("width");
  args.y = data(y, true);
  args.y_row = n.at("y_row");
  args.y_pixel = n.at("y_pixel");
  args.out_height = n.at("out_height");
  args.out_width = n.at("out_width");
  args.weight = static_cast<const float*>(data(weight));
  args.bias = static_cast<const float*>(data(bias));
  args.channels = n.at("channels");
  args.kernel_h = small("kernel_h");
  args.kernel_w = small("kernel_w");
  args.stride_h = small("stride_h");
  args.stride_w = small("stride_w");
  args.pad_top = small("pad_top");
  args.pad_left = small("pad_left");
  args.dilation_h = small("dilation_h");
  args.dilation_w = small("dilation_w");
  args.act = activation(act);
  kernel.run(args, n.at("row_begin"), n.at("row_end"), n.at("channel_begin"), n.at("channel_end"));
}

// Rows [row_begin, row_end) of an image's first convolution in bfloat16 by the tier in use; false if it has no kernel
// for them. `weight` is OIHW in float32; scratch is NaN at first.
inline bool run_stem(const Numbers& n, const std::string& act, const py::buffer& x, const py::buffer& weight,
                     const py::buffer& bias, const py::buffer& y) {
  const auto small = [&](const char* key) { return static_cast<int>(n.at(key)); };
  ConvArgs args{};
  args.x = data(x);
  args.x_type = Storage::kFloat32;
  args.x_channel = n.at("x_channel");
  args.x_row = n.at("x_row");
  args.x_pixel = n.at("x_pixel");
  args.channels = 3;
  args.height = n.at("height");
  args.width = n.at("width");
  args.bias = static_cast<const float*>(data(bias));
  args.out_channels = n.at("out_channels");
  args.out_height = n.at("out_height");
  args.out_width = n.at("out_width");
  args.kernel_h = args.kernel_w = 3;
  args.stride_h = args.stride_w = small("stride");
  args.pad_top = small("pad_top");
  args.pad_left = small("pad_left");
  args.dilation_h = args.dilation_w = 1;
  args.act = activation(act);
  args.pairs = true;
  const GemmKernel& kernel = gemm_kernel(Storage::kBfloat16, Storage::kBfloat16);
  if (!StemRows::takes(kernel, args)) return false;

  const int64_t panels = div_up(args.out_channels, kPanel);
  const int64_t depth = conv_depth(args.shape());
  std::vector<float> packed(static_cast<size_t>(panels * depth * kPanel));
  std::vector<uint16_t> pairs(packed.size());
  pack_conv(static_cast<const float*>(data(weight)), args.out_channels, args.shape(), packed.data());
  pack_pairs(packed.data(), panels, depth, pairs.data());
  args.weight = pairs.data();
  std::vector<float> scratch(static_cast<size_t>(StemRows::floats(args)), __builtin_nanf(""));
  StemRows rows(kernel, args, scratch.data());
  GemmArgs out{};
  out.c_row = n.at("y_pixel");
  out.c_panel = n.at("y_panel");
  out.paired = n.at("y_paired") != 0;
  out.n = args.out_channels;
  out.act = args.act;
  for (int64_t oy = n.at("row_begin"); oy < n.at("row_end"); ++oy) {
    out.c = advance(data(y, true), Storage::kBfloat16, oy * n.at("y_row"));
    rows.row(oy, out);
  }
  return true;
}

inline void define(py::module_& m) {
  m.def("lists", &lists, "Every family's list, best kernel first: what each row says of itself.");
  m.attr("any_row") = static_cast<int>(kAnyRow);
  m.attr("image_row") = static_cast<int>(kImageRow);
  m.attr("longest_chain") = kChain;
  m.attr("short_chain") = kShortChain;
  m.def("gemm_tile", &run_gemm_tile, py::arg("name"), py::arg("numbers"), py::arg("segments"), py::arg("act"),
        py::arg("a"), py::arg("b"), py::arg("bias"), py::arg("gamma"), py::arg("residual"), py::arg("c"),
        py::arg("partial"), "One GemmTile of kernel `name`; `numbers` are its fields, `rows` and `variant`.");
  m.def(
      "gemm_name",
      [](const std::string& input, const std::string& output) {
        return gemm_kernel(parse_storage(input), parse_storage(output)).name;
      },
      py::arg("input"), py::arg("output"), "The kernel that the tier in use takes for these types.");
  m.def(
      "gemm", &run_gemm, py::arg("name"), py::arg("numbers"), py::arg("segments"), py::arg("act"), py::arg("a"),
      py::arg("b"), py::arg("bias"), py::arg("gamma"), py::arg("residual"), py::arg("c"),
      "A product by kernel `name`; `numbers` are the fields of GemmArgs, the rows and panels, `images` and `packed`.");
  m.def("dwconv", &run_dwconv, py::arg("name"), py::arg("numbers"), py::arg("act"), py::arg("x"), py::arg("weight"),
        py::arg("bias"), py::arg("y"), "Rows and channels of a depthwise convolution by kernel `name`.");
  m.def("stem", &run_stem, py::arg("numbers"), py::arg("act"), py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("y"), "Rows of an image's first convolution; whether the tier in use has a kernel for it.");
  m.def(
      "convert",
      [](const std::string& name, const std::string& type, bool widen, const py::buffer& x, const py::buffer& y,
         int64_t n) {
        const PointwiseKernels& kernels = find(pointwise_rows(), name);
        const Storage storage = parse_storage(type);
        if (widen) return kernels.widen(data(x), storage, static_cast<float*>(data(y, true)), n);
        return kernels.narrow(static_cast<const float*>(data(x)), storage, data(y, true), n);
      },
      py::arg("name"), py::arg("type"), py::arg("widen"), py::arg("x"), py::arg("y"), py::arg("n"),
      "`n` numbers from `type` to float32, or back.");
  m.def(
      "narrow_triples",
      [](const std::string& name, const py::buffer& x, int64_t x_plane, const py::buffer& y, int64_t n) {
        find(pointwise_rows(), name)
            .narrow_triples(static_cast<const float*>(data(x)), x_plane, static_cast<uint16_t*>(data(y, true)), n);
      },
      py::arg("name"), py::arg("x"), py::arg("x_plane"), py::arg("y"), py::arg("n"),
      "Three planes of `n` float32 to [n][3] in bfloat16.");
  m.def(
      "mean_pixels",
      [](const std::string& name, const py::buffer& x, int64_t pixels, int64_t x_pixel, int64_t channels,
         const py::buffer& y) {
        find(pointwise_rows(), name)
            .mean_pixels(static_cast<const float*>(data(x)), pixels, x_pixel, channels,
                         static_cast<float*>(data(y, true)));
      },
      py::arg("name"), py::arg("x"), py::arg("pixels"), py::arg("x_pixel"), py::arg("channels"), py::arg("y"),
      "Mean over pixels [pixels][channels].");
  m.def(
      "softmax_rows",
      [](const std::string& name, const py::buffer& x, int64_t rows, int64_t columns, int64_t x_row, float scale) {
        find(pointwise_rows(), name).softmax_rows(static_cast<float*>(data(x, true)), rows, columns, x_row, scale);
      },
      py::arg("name"), py::arg("x"), py::arg("rows"), py::arg("columns"), py::arg("x_row"), py::arg("scale"),
      "softmax(scale * x), row by row, in place.");
  m.def(
      "softmax_gradient_rows",
      [](const std::string& name, const py::buffer& weights, const py::buffer& grad, int64_t rows, int64_t columns,
         int64_t row_pitch, float scale) {
        find(pointwise_rows(), name)
            .softmax_gradient_rows(static_cast<const float*>(data(weights)), static_cast<float*>(data(grad, true)),
                                   rows, columns, row_pitch, scale);
      },
      py::arg("name"), py::arg("weights"), py::arg("grad"), py::arg("rows"), py::arg("columns"), py::arg("row_pitch"),
      py::arg("scale"), "The gradient of softmax's argument, row by row, in place of the weights' gradient.");
  m.def(
      "winograd_terms",
      [](const std::string& name, int64_t stride, const py::buffer& x, int64_t x_row, int64_t tiles, int64_t channels,
         const py::buffer& terms, int64_t term) {
        const float* rows[kWinogradMostTerms];
        for (int i = 0; i < kWinogradForms[stride - 1].terms; ++i) {
          rows[i] = static_cast<const float*>(data(x)) + i * x_row;
        }
        const WinogradTransforms& transforms = find(winograd_rows(), name).of_stride[stride - 1];
        transforms.make_terms(rows, tiles, channels, static_cast<float*>(data(terms, true)), term);
      },
      py::arg("name"), py::arg("stride"), py::arg("x"), py::arg("x_row"), py::arg("tiles"), py::arg("channels"),
      py::arg("terms"), py::arg("term"),
      "Terms of a row of tiles, from as many rows of pixels x_row apart as it takes.");
  m.def(
      "winograd_rows",
      [](const std::string& name, int64_t stride, const py::buffer& sums, int64_t sum, int64_t tiles, int64_t width,
         const std::string& act, const py::buffer& y, int64_t y_row, int64_t y_pixel) {
        auto* first = static_cast<float*>(data(y, true));
        float* const rows[] = {first, y_row ? first + y_row : nullptr};
        const WinogradTransforms& transforms = find(winograd_rows(), name).of_stride[stride - 1];
        transforms.make_rows(static_cast<const float*>(data(sums)), sum, tiles, width, activation(act), rows, y_pixel);
      },
      py::arg("name"), py::arg("stride"), py::arg("sums"), py::arg("sum"), py::arg("tiles"), py::arg("width"),
      py::arg("act"), py::arg("y"), py::arg("y_row"), py::arg("y_pixel"),
      "Two rows of `width` pixels y_row apart, or one where that is 0.");
}

}  // namespace test_access
}  // namespace mnv4
