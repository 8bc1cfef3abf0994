// Runs a .pte of lowering.to_executorch with ExecuTorch's C++ runtime alone: no Python code, no quant2e.
//
//   run_pte model.pte input.f32 1 3 32 32     reads float32 values of that shape, prints the first outputs
//
// CMakeLists.txt beside this file builds it against the ExecuTorch of a Python environment, whose wheel has the runtime in
// one library with kernels and XNNPACK. Built from ExecuTorch's sources instead, `extension/module/module.h` has all of
// this in a class.

#include <executorch/runtime/core/data_loader.h>
#include <executorch/runtime/executor/memory_manager.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <numeric>
#include <vector>

namespace et = executorch::runtime;

namespace {

// What is read of a file in memory.
class Bytes : public et::DataLoader {
 public:
  explicit Bytes(std::vector<char> bytes) : bytes_(std::move(bytes)) {}

  et::Result<et::FreeableBuffer> load(size_t offset, size_t size, const SegmentInfo&) const override {
    if (offset > bytes_.size() || size > bytes_.size() - offset) return et::Error::InvalidArgument;
    return et::FreeableBuffer(bytes_.data() + offset, size, nullptr);
  }
  et::Error load_into(size_t offset, size_t size, const SegmentInfo&, void* to) const override {
    if (offset > bytes_.size() || size > bytes_.size() - offset) return et::Error::InvalidArgument;
    std::memcpy(to, bytes_.data() + offset, size);
    return et::Error::Ok;
  }
  et::Result<size_t> size() const override { return bytes_.size(); }

 private:
  std::vector<char> bytes_;
};

// As much memory as is asked for. A device with a fixed arena gives `MemoryAllocator(size, arena)` in its place.
class Growing : public et::MemoryAllocator {
 public:
  Growing() : MemoryAllocator(0, nullptr) {}

  void* allocate(size_t size, size_t alignment = kDefaultAlignment) override {
    pieces_.emplace_back(new uint8_t[size + alignment]);
    const auto start = reinterpret_cast<uintptr_t>(pieces_.back().get());
    return reinterpret_cast<void*>((start + alignment - 1) / alignment * alignment);
  }
  void reset() override { pieces_.clear(); }

 private:
  std::vector<std::unique_ptr<uint8_t[]>> pieces_;
};

std::vector<char> read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) std::cerr << path << " cannot be read\n", std::exit(1);
  return {std::istreambuf_iterator<char>(file), {}};
}

template <class T>
T must(et::Result<T> result, const char* what) {
  if (!result.ok()) std::cerr << what << " failed: " << et::to_string(result.error()) << "\n", std::exit(1);
  return std::move(result.get());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: run_pte MODEL.pte INPUT.f32 SIZE...\n";
    return 2;
  }
  et::runtime_init();
  Bytes file(read(argv[1]));
  et::Program program = must(et::Program::load(&file), "loading the program");
  const et::MethodMeta meta = must(program.method_meta("forward"), "looking for 'forward'");

  std::vector<std::vector<uint8_t>> planned;  // activations, at the places that were planned when the file was made
  for (size_t i = 0; i < meta.num_memory_planned_buffers(); ++i)
    planned.emplace_back(must(meta.memory_planned_buffer_size(i), "planned memory"));
  std::vector<et::Span<uint8_t>> spans;
  for (auto& buffer : planned) spans.emplace_back(buffer.data(), buffer.size());
  et::HierarchicalAllocator arena({spans.data(), spans.size()});
  Growing own, temporary;
  et::MemoryManager memory(&own, &arena, &temporary);
  et::Method method = must(program.load_method("forward", &memory), "loading 'forward'");

  std::vector<executorch::aten::SizesType> sizes;
  for (int place = 3; place < argc; ++place) sizes.push_back(std::atoi(argv[place]));
  const size_t count = std::accumulate(sizes.begin(), sizes.end(), size_t{1}, std::multiplies<>());
  std::vector<char> values = read(argv[2]);
  if (values.size() < count * sizeof(float)) {
    std::cerr << argv[2] << " holds fewer than " << count << " float32 values\n";
    return 1;
  }
  std::vector<executorch::aten::DimOrderType> order(sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::vector<executorch::aten::StridesType> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  executorch::aten::TensorImpl input(executorch::aten::ScalarType::Float, sizes.size(), sizes.data(), values.data(),
                                     order.data(), strides.data());
  if (method.set_input(executorch::aten::Tensor(&input), 0) != et::Error::Ok || method.execute() != et::Error::Ok) {
    std::cerr << "running 'forward' failed\n";
    return 1;
  }
  const executorch::aten::Tensor first = method.get_output(0).toTensor();
  const int64_t shown = std::min<int64_t>(first.numel(), 8);
  for (int64_t place = 0; place < shown; ++place)
    std::cout << first.const_data_ptr<float>()[place] << (place + 1 < shown ? " " : "\n");
  return 0;
}
