// Runs a package of lowering.package_inductor with torch's C++ library alone: no Python, no quant2e.
//
//   run_package model_aot.pt2 input.f32 1 3 32 32     reads float32 values of that shape, prints the first outputs
//
// CMakeLists.txt beside this file builds it against the torch of a Python environment.

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <vector>

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: run_package MODEL.pt2 INPUT.f32 SIZE...\n";
    return 2;
  }
  std::vector<int64_t> sizes;
  int64_t count = 1;
  for (int place = 3; place < argc; ++place) {
    sizes.push_back(std::atoll(argv[place]));
    count *= sizes.back();
  }
  std::vector<float> values(count);
  std::ifstream file(argv[2], std::ios::binary);
  if (!file.read(reinterpret_cast<char*>(values.data()), count * sizeof(float))) {
    std::cerr << argv[2] << " holds fewer than " << count << " float32 values\n";
    return 1;
  }
  const c10::InferenceMode without_gradients;
  torch::inductor::AOTIModelPackageLoader package(argv[1]);
  const auto outputs = package.run({at::from_blob(values.data(), sizes, at::kFloat)});
  const at::Tensor first = outputs.at(0).contiguous().flatten();
  const int64_t shown = std::min<int64_t>(first.numel(), 8);
  for (int64_t place = 0; place < shown; ++place) {
    std::cout << first[place].item<float>() << (place + 1 < shown ? " " : "\n");
  }
  return 0;
}
