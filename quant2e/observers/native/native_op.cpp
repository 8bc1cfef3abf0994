// What our ops share: torch's stable C interface (torch/csrc/stable/c/shim.h), and the arguments of an op. Included by
// native.cpp and by the kernels of lowering. No header of torch is used, so that any C++ compiler does, in about a second.

#include <cstdint>
#include <stdexcept>

extern "C" {
typedef void* Handle;
int32_t aoti_torch_delete_tensor_object(Handle);
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*);
int32_t aoti_torch_get_data_ptr(Handle, void**);
int32_t aoti_torch_get_dim(Handle, int64_t*);
int32_t aoti_torch_get_numel(Handle, int64_t*);
int32_t aoti_torch_get_sizes(Handle, int64_t**);
int32_t aoti_torch_get_strides(Handle, int64_t**);
int32_t aoti_torch_library_impl(Handle, const char*, void (*)(uint64_t*, uint64_t, uint64_t));
int32_t aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, Handle*);
int32_t torch_get_num_threads(uint32_t*);
int32_t torch_parallel_for(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
}

namespace {

void must(int32_t code) {
  if (code) throw std::runtime_error("quant2e: a call into torch failed");
}

// An argument of an op; the tensor is ours to release.
struct Argument {
  Handle handle;
  explicit Argument(uint64_t value) : handle((Handle)value) {}
  Argument(const Argument&) = delete;
  ~Argument() { aoti_torch_delete_tensor_object(handle); }

  template <class T>
  T* data() const {
    void* found = nullptr;
    must(aoti_torch_get_data_ptr(handle, &found));
    return (T*)found;
  }
};

}  // namespace
