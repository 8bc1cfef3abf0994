// Memory of one thread, which grows and is kept: the same region needs it again at the next call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace quant2e {

class Memory {
 public:
  ~Memory() { std::free(data); }

  char* of(int64_t bytes) {
    if (bytes > size) {
      std::free(data);
      size = (bytes + 4095) / 4096 * 4096;
      data = (char*)std::aligned_alloc(4096, size);
      if (!data) throw std::bad_alloc();
    }
    return data;
  }

 private:
  char* data = nullptr;
  int64_t size = 0;
};

}  // namespace quant2e
