// Runs a package of AOTInductor without Python. Usage: main LIBRARY PACKAGE INPUT EXPECTED, the last two raw float32 of
// the shapes [2, 3, 64, 96] and [2, 1000]. Prints the largest difference and exits with 0 if there is none.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <fstream>
#include <string>

namespace {

at::Tensor read(const std::string& path, at::IntArrayRef shape) {
  at::Tensor tensor = at::empty(shape);
  std::ifstream file(path, std::ios::binary);
  file.read(static_cast<char*>(tensor.mutable_data_ptr()), static_cast<std::streamsize>(tensor.nbytes()));
  return tensor;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 5) return 2;
  if (!dlopen(arguments[1], RTLD_NOW | RTLD_GLOBAL)) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 2;
  }
  torch::inductor::AOTIModelPackageLoader loader(arguments[2]);
  const at::Tensor expected = read(arguments[4], {2, 1000});
  const at::Tensor actual = loader.run({read(arguments[3], {2, 3, 64, 96})}).at(0);
  const double difference = (actual - expected).abs().max().item<double>();
  std::printf("largest difference %g\n", difference);
  return difference == 0.0 ? 0 : 1;
}
