// The kernel of call_forms.py in C++: as a function, as an op of TORCH_LIBRARY, and as one of the stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/extension.h>

#include <optional>
#include <string>

namespace {

using Optional = std::optional<at::Tensor>;

at::Tensor kernel(const at::Tensor& x, const at::Tensor&, const Optional&, const Optional&, std::string,
                  const Optional&, const Optional&) {
  return at::empty_like(x);
}

using torch::stable::Tensor;
using StableOptional = std::optional<Tensor>;

Tensor stable_kernel(Tensor x, Tensor, StableOptional, StableOptional, std::string, StableOptional, StableOptional) {
  return torch::stable::empty_like(x);
}

}  // namespace

#define SCHEMA \
  "(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, str act, Tensor? gamma, Tensor? residual) -> Tensor"

TORCH_LIBRARY_FRAGMENT(mnv4_call_forms, m) {
  m.def("unstable" SCHEMA);
  m.def("stable" SCHEMA);
  m.def("stable_autograd" SCHEMA);
}

TORCH_LIBRARY_IMPL(mnv4_call_forms, CPU, m) { m.impl("unstable", &kernel); }

STABLE_TORCH_LIBRARY_IMPL(mnv4_call_forms, CPU, m) {
  m.impl("stable", TORCH_BOX(&stable_kernel));
  m.impl("stable_autograd", TORCH_BOX(&stable_kernel));
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("kernel", &kernel); }
