// `mnv4_kernels._C`: introspection for Python, never on a hot path.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/features.h"
#include "engine/memory.h"
#include "engine/phases.h"
#include "engine/program.h"
#include "kernels/gemm/gemm.h"
#include "kernels/peak/peak.h"
#include "ops/free.h"
#include "ops/fresh.h"
#include "test_access.h"

namespace py = pybind11;
using mnv4::cpu::Tier;

namespace {

constexpr Tier kTiers[] = {Tier::kScalar, Tier::kNeon, Tier::kAvx2, Tier::kAvx512, Tier::kAvx512Bf16, Tier::kAmx};

Tier tier_of(const std::string& name) {
  std::string known;
  for (Tier tier : kTiers) {
    if (name == mnv4::cpu::tier_name(tier)) return tier;
    known += (known.empty() ? "" : ", ") + std::string(mnv4::cpu::tier_name(tier));
  }
  throw py::value_error("`tier` must be one of " + known + ", got '" + name + "'");
}

std::vector<std::string> compiled_tiers() {
  std::vector<std::string> names;
  for (Tier tier : mnv4::cpu::compiled_tiers()) names.emplace_back(mnv4::cpu::tier_name(tier));
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What the C++ library of mnv4_kernels has, and which instruction set tier it uses.";
  m.def("compiled_tiers", &compiled_tiers, "Names of the tiers that the library was built with, lowest first.");
  m.def(
      "detected_tier", [] { return mnv4::cpu::tier_name(mnv4::cpu::detected_tier()); },
      "Name of the highest compiled tier that this processor can run.");
  m.def(
      "active_tier", [] { return mnv4::cpu::tier_name(mnv4::cpu::active_tier()); },
      "Name of the tier in use: the detected one, or the cap if that is lower.");
  m.def(
      "set_tier_cap", [](const std::string& tier) { mnv4::cpu::set_tier_cap(tier_of(tier)); }, py::arg("tier"),
      "Uses no tier above `tier`, process-wide, from the next call of an op on.");
  m.def("clear_tier_cap", &mnv4::cpu::clear_tier_cap, "Ends `set_tier_cap`.");
  m.def(
      "peak_gflops", [](bool bf16, int threads) { return mnv4::peak_gflops(bf16, threads); }, py::arg("bf16"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
      "GFLOP/s of `threads` threads of the active tier on registers alone, bfloat16 or float32 operands.");
  m.def(
      "has_term_products", [] { return mnv4::gemm_kernel().split != nullptr; },
      "Whether the active tier multiplies float32 as sums of bfloat16, by `term_products` products.");
  m.attr("term_products") = mnv4::kTermProducts;
  m.def(
      "panel_width", [] { return static_cast<int>(mnv4::kPanel); }, "Output channels of one panel of packed weights.");
  m.def(
      "engine_fields",
      [] {
        return std::vector<std::string>(std::begin(mnv4::engine::kFieldNames), std::end(mnv4::engine::kFieldNames));
      },
      "Columns of an engine program's rows.");
  m.def(
      "engine_kinds",
      [] { return std::vector<std::string>(std::begin(mnv4::engine::kKindNames), std::end(mnv4::engine::kKindNames)); },
      "Kinds of an engine program's nodes, by their codes.");
  m.def(
      "engine_pad_modes",
      [] {
        return std::vector<std::string>(std::begin(mnv4::engine::kPadModeNames), std::end(mnv4::engine::kPadModeNames));
      },
      "Padding modes of an engine program's nodes, by their codes.");
  m.def(
      "engine_most_images", [] { return mnv4::engine::kMostImages; }, "Images that one plan takes at a time at most.");
  m.def("fill_fresh_memory", &mnv4::fill_fresh_memory, py::arg("on"),
        "While on, what the ops allocate begins as NaN, process-wide.");
  m.def("engine_free", &mnv4::engine_free, py::arg("handle"), "Frees the engine `handle`, if it is one.");
  m.def("engine_bytes", &mnv4::engine::Memory::total, "Bytes that all engines of the process hold.");
  py::module_ microkernels = m.def_submodule("microkernels", "Single kernels of the lists, for tests.");
  mnv4::test_access::define(microkernels);
}
