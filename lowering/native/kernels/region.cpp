// quant2e::int8_region: runs the plan of a region, image by image, and gives the op to torch.

#include "region.h"

#include <algorithm>
#include <vector>

#include "memory.h"

#include "../../../quant2e/observers/native/native_op.cpp"

extern "C" {
typedef void* List;
int32_t torch_list_size(List, size_t*);
int32_t torch_list_get_item(List, size_t, uint64_t*);
int32_t torch_new_list_reserve_size(size_t, List*);
int32_t torch_list_push_back(List, uint64_t);
int32_t torch_delete_list(List);
int32_t aoti_torch_dtype_uint8();
}

namespace quant2e {

void layer_norm(const Run&, const Step&);
void attention(const Run&, const Step&);
void softmax(const Run&, const Step&);

namespace {

struct Header {
  int64_t version, tensors, steps, arena, inputs, outputs, rows, reserved;
};

thread_local Memory arena;
std::atomic<bool> shares_all{false};

// What lies around an image holds its zero point.
void fill_border(const Run& run, int64_t tensor) {
  const Tensor& t = run.tensors[tensor];
  if (!t.pad_h && !t.pad_w) return;
  const View x = run.view(tensor);
  const int64_t edge = x.pad_w * x.c, outer = x.pad_h * x.row() + edge;
  uint8_t* data = (uint8_t*)x.data;
  std::memset(data, (int)t.zero, outer);
  for (int64_t i = 1; i < x.h; ++i) std::memset(data + (x.pad_h + i) * x.row() - edge, (int)t.zero, 2 * edge);
  std::memset(data + (x.pad_h + x.h) * x.row() - edge, (int)t.zero, outer);
}

void run_step(const Run& run, const Step& step) {
  const bool first = !step.from_h && !step.from_w;  // of the steps that write the parts of y
  if (step.y >= 0 && first && run.tensors[step.y].place >= 0) fill_border(run, step.y);
  switch (step.kind) {
    case kQuantize: return quantize(run, step);
    case kDequantize: return dequantize(run, step);
    case kConvolution: return convolution(run, step);
    case kDepthwise: return depthwise(run, step);
    case kBinary: return binary(run, step);
    case kUnary: return unary(run, step);
    case kPool: return pool(run, step);
    case kConcat: return concat(run, step);
    case kLayerNorm: return layer_norm(run, step);
    case kAttention: return attention(run, step);
    case kSoftmax: return softmax(run, step);
    default: throw std::runtime_error("quant2e: the plan of a region has a step that this library does not know");
  }
}

struct Region {
  const Header& header;
  const Step* steps;
  Run run;
  int64_t images, samples;

  void image(int64_t at, int64_t threads, Team* team) const {
    Run own = run;
    own.image = at, own.threads = threads, own.team = team, own.arena = arena.of(header.arena);
    if (header.rows) own.image = at * header.rows, own.rows = std::min(header.rows, samples - own.image);
    for (int64_t s = 0; s < header.steps; ++s) run_step(own, steps[s]);
  }

  // How many of the `threads` have something to do: as many as the largest step has parts, or the steps of all images.
  int64_t worth(int64_t threads) const {
    if (threads == 1 || run.shares_all) return threads;
    Run own = run;
    own.rows = std::min(header.rows, samples);
    const auto values = [&](int64_t tensor) {
      if (tensor < 0) return int64_t(0);
      const View view = own.view(tensor);
      return view.pixels() * view.c;
    };
    int64_t largest = 0, all = 0;
    for (int64_t i = 0; i < header.steps; ++i) {
      const Step& s = steps[i];
      const int64_t out = std::max(values(s.y), values(s.z)), most = std::max(out, values(s.x));
      const int64_t parts = s.kind == kConvolution ? out * s.inner * s.taps / kPartProducts : most / kPartValues;
      largest = std::max(largest, parts), all += parts;
    }
    return std::max<int64_t>(1, std::min(threads, images < threads ? largest : all * images));
  }
};

// Every thread has whole images while there are enough; the others are computed by all threads together.
struct Images {
  const Region& region;
  int64_t threads, alone;

  void compute(Team* team) const {
    if (team && alone)
      team->share(threads, [](const void* given, int64_t part) {
        const Images& all = *(const Images*)given;
        const int64_t each = all.alone / all.threads;
        for (int64_t i = part * each; i < (part + 1) * each; ++i) all.region.image(i, 1, nullptr);
      }, this);
    for (int64_t i = team ? alone : 0; i < region.images; ++i) region.image(i, threads, team);
  }
};

void run_images(const Region& region, int64_t given) {
  const int64_t threads = region.worth(given);
  const Images all{region, threads, region.images / threads * threads};
  if (threads == 1) return all.compute(nullptr);
  Team(threads).run([](const void* given, Team& team) { ((const Images*)given)->compute(&team); }, &all);
}

Given given_of(Handle tensor) {
  int64_t rank = 0, *sizes = nullptr, *strides = nullptr;
  void* data = nullptr;
  must(aoti_torch_get_dim(tensor, &rank));
  must(aoti_torch_get_sizes(tensor, &sizes));
  must(aoti_torch_get_strides(tensor, &strides));
  must(aoti_torch_get_data_ptr(tensor, &data));
  Given given{(char*)data, rank ? strides[0] : 0, 1, 0, 0};
  if (rank == 4) given.channel = strides[1], given.row = strides[2], given.column = strides[3];
  else if (rank >= 2) given.channel = strides[rank - 1], given.column = rank >= 3 ? strides[rank - 2] : strides[0];
  return given;
}

// An output. `sizes`: its type, and the sizes of a sample; an image is returned as it is computed, channels last.
Handle output_of(const int64_t* sizes, int64_t rank, int64_t samples) {
  int64_t shape[8], strides[8], step = 1;
  for (int64_t d = 0; d < rank; ++d) shape[d] = d ? sizes[d] : samples;
  const auto place = [&](int64_t d) { strides[d] = step, step *= shape[d]; };
  if (rank == 4)
    for (int64_t d : {1, 3, 2, 0}) place(d);
  else
    for (int64_t d = rank - 1; d >= 0; --d) place(d);
  Handle made = nullptr;
  const int32_t dtype = sizes[0] == kUint8 ? aoti_torch_dtype_uint8() : aoti_torch_dtype_float32();
  must(aoti_torch_empty_strided(rank, shape, strides, dtype, aoti_torch_device_type_cpu(), 0, &made));
  return made;
}

// The tensors of a list, ours to release.
struct Tensors {
  std::vector<Handle> handles;
  explicit Tensors(List list) {
    size_t count = 0;
    must(torch_list_size(list, &count));
    handles.resize(count);
    for (size_t i = 0; i < count; ++i) must(torch_list_get_item(list, i, (uint64_t*)&handles[i]));
    must(torch_delete_list(list));
  }
  ~Tensors() {
    for (Handle handle : handles) aoti_torch_delete_tensor_object(handle);
  }
};

std::vector<int64_t> numbers_of(List list) {
  size_t count = 0;
  must(torch_list_size(list, &count));
  std::vector<int64_t> found(count);
  for (size_t i = 0; i < count; ++i) must(torch_list_get_item(list, i, (uint64_t*)&found[i]));
  must(torch_delete_list(list));
  return found;
}

// (Tensor[] inputs, Tensor plan, Tensor constants, int[] outputs) -> Tensor[]
void int8_region(uint64_t* stack, uint64_t, uint64_t) {
  Tensors inputs((List)stack[0]);
  Argument plan(stack[1]), constants(stack[2]);
  const std::vector<int64_t> outputs = numbers_of((List)stack[3]);
  const Header& header = *plan.data<Header>();
  const Tensor* tensors = (const Tensor*)(&header + 1);
  if (header.version != kVersion || header.inputs != (int64_t)inputs.handles.size())
    throw std::runtime_error("quant2e: the plan of a region was made by another version");
  int64_t* sizes = nullptr;
  must(aoti_torch_get_sizes(inputs.handles[0], &sizes));
  const int64_t samples = sizes[0];
  std::vector<Given> given;
  for (int64_t i = 0; i < header.inputs; ++i) given.push_back(given_of(inputs.handles[i]));
  List made = nullptr;
  must(torch_new_list_reserve_size(header.outputs, &made));
  const int64_t* out = outputs.data();
  for (int64_t i = 0; i < header.outputs; ++i, out += 1 + out[0]) {
    Handle tensor = output_of(out + 1, out[0], samples);
    void* data = nullptr;
    must(aoti_torch_get_data_ptr(tensor, &data));
    int64_t image = 1;
    for (int64_t d = 1; d < out[0]; ++d) image *= out[1 + d];
    given.push_back({(char*)data, image, 1, 0, 0});
    must(torch_list_push_back(made, (uint64_t)tensor));
  }
  uint32_t threads = 1;
  must(torch_get_num_threads(&threads));
  Run run{tensors, given.data(), constants.data<char>(), nullptr, 0, 0, 1, nullptr, shares_all};
  const int64_t images = header.rows ? (samples + header.rows - 1) / header.rows : samples;
  const Region region{header, (const Step*)(tensors + header.tensors), run, images, samples};
  run_images(region, threads);
  stack[0] = (uint64_t)made;
}

}  // namespace
}  // namespace quant2e

// For tests, whose steps are small: whether all are computed by several threads.
extern "C" __attribute__((visibility("default"))) void quant2e_share_all(int wish) { quant2e::shares_all = wish; }

// Gives the op, which op.py has declared as quant2e::`name`, to torch; returns 0, or the step that failed.
extern "C" __attribute__((visibility("default"))) int quant2e_register(const char* name) {
  Handle library = nullptr;
  if (aoti_torch_library_init_impl("quant2e", "CPU", __FILE__, __LINE__, &library)) return 1;
  return aoti_torch_library_impl(library, name, quant2e::int8_region) ? 2 : 0;
}
