// One pass over values: range, those that must not count, and histogram. Included by native.cpp.
//
// The results are those of quant2e/ranges/minmax.py and quant2e/ranges/histogram.py bit for bit: minimum, maximum and counts do not
// depend on the order of the values, and growing a histogram is exact.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kChunk = 2048;    // a chunk, its bin numbers and the histogram stay in the first-level cache
constexpr int64_t kSerial = 32768;  // smaller tensors are not worth waking other threads for
constexpr int kLanes = 32;
constexpr int kCopies = 4;  // equal neighbours (the zeros after a relu) go to different copies: no waiting for stores
constexpr int kPadding = 16;  // so that equal bins of different copies do not share a cache set
constexpr int kMostThreads = 64;
constexpr float kInf = INFINITY;

struct Tally {
  float low = kInf, high = -kInf;
  int64_t nan = 0, posinf = 0, masked = 0, usable = 0;
};

struct Window {
  int exponent;
  int64_t first;
};

int64_t number_of(double x, int exponent) { return (int64_t)std::trunc(std::ldexp(x, -exponent)); }

int exponent_of(double x) {
  int e;
  std::frexp(x, &e);
  return e;
}

// As windows() in histogram.py, for one row.
Window window_of(float low, float high, int bins) {
  double largest = std::fmax(std::fabs((double)low), std::fabs((double)high));
  int e = -120;
  if (largest != 0 && exponent_of(largest) - 24 > e) e = exponent_of(largest) - 24;
  if (high > low) {
    int wide = exponent_of(((double)high - (double)low) / (bins + 1)) - 2;
    if (wide > e) e = wide;
  }
  while (number_of(high, e) - number_of(low, e) >= bins) ++e;
  return {e, number_of(low, e)};
}

// Range of a chunk; true when every value is ordinary (NaN fails the comparison).
bool range_of(const float* x, int64_t n, float limit, float* low, float* high) {
  float lo[kLanes], hi[kLanes];
  int32_t odd[kLanes];
  for (int j = 0; j < kLanes; ++j) lo[j] = kInf, hi[j] = -kInf, odd[j] = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      float v = x[i + j];
      lo[j] = v < lo[j] ? v : lo[j];
      hi[j] = v > hi[j] ? v : hi[j];
      odd[j] |= !(std::fabs(v) < limit);
    }
  for (; i < n; ++i) {
    float v = x[i];
    lo[0] = v < lo[0] ? v : lo[0];
    hi[0] = v > hi[0] ? v : hi[0];
    odd[0] |= !(std::fabs(v) < limit);
  }
  int32_t any = 0;
  float a = kInf, b = -kInf;
  for (int j = 0; j < kLanes; ++j) {
    a = lo[j] < a ? lo[j] : a;
    b = hi[j] > b ? hi[j] : b;
    any |= odd[j];
  }
  *low = a + 0.0f;  // -0.0 becomes 0.0
  *high = b + 0.0f;
  return !any;
}

// Copies the ordinary values to `kept`, counts the others; returns how many were kept.
int64_t sort_out(const float* x, int64_t n, float limit, float* kept, Tally* tally) {
  int64_t m = 0;
  for (int64_t i = 0; i < n; ++i) {
    float v = x[i];
    if (std::fabs(v) < limit)
      kept[m++] = v;
    else if (v != v)
      ++tally->nan;
    else if (v == kInf)
      ++tally->posinf;
    else
      ++tally->masked;
  }
  return m;
}

// As widen() in histogram.py, added to `to`.
void add_widened(const int64_t* from, Window old, int64_t* to, Window now, int bins) {
  int shift = now.exponent - old.exponent < 62 ? now.exponent - old.exponent : 62;
  int64_t factor = (int64_t)1 << shift;
  if (shift == 0) {
    int64_t offset = old.first - now.first;
    for (int i = 0; i < bins; ++i)
      if (from[i]) to[i + offset] += from[i];
    return;
  }
  for (int i = 0; i < bins; ++i)
    if (from[i]) to[(i + old.first) / factor - now.first] += from[i];
}

// Bin numbers of `n` values. Those of zero, half of all values behind a relu, may be counted here, in `a`, and left out:
// returns how many numbers were written. `number` has room for 16 more than `n`.
int64_t numbers_of(const float* x, int64_t n, float inverse, int32_t first, uint32_t* number, uint32_t* a) {
  int64_t i = 0, m = 0;
#ifdef __AVX512F__
  const __m512 factor = _mm512_set1_ps(inverse);
  const __m512i offset = _mm512_set1_epi32(first), zero = _mm512_set1_epi32(-first);
  for (; i + 16 <= n; i += 16) {
    const __m512i bin = _mm512_sub_epi32(_mm512_cvttps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), factor)), offset);
    const __mmask16 others = _mm512_cmpneq_epi32_mask(bin, zero);
    _mm512_storeu_si512(number + m, _mm512_maskz_compress_epi32(others, bin));
    m += __builtin_popcount(others);
  }
  if (i > m) a[-first] += (uint32_t)(i - m);  // no value has this number when the window is elsewhere
#endif
  for (; i < n; ++i) number[m++] = (uint32_t)((int32_t)(x[i] * inverse) - first);
  return m;
}

// The histogram of one thread: its own window, which grows as values come.
struct Local {
  int bins = 0, copies = 1;
  int64_t counted = 0;                   // since the counts in `fast` were last emptied
  std::unique_ptr<uint32_t[]> fast;      // [copies][bins + kPadding]
  std::unique_ptr<int64_t[]> total;      // what was counted in narrower windows; none while the window never grew
  float low = 0, high = 0;
  Window win{};
  bool started = false;

  void make(int n, int64_t values) {
    bins = n;
    copies = values < 4 * (int64_t)bins || bins > 4096 ? 1 : kCopies;
    fast.reset(new uint32_t[(size_t)copies * (bins + kPadding)]());
  }
  void start(float a, float b) { low = a, high = b, win = window_of(a, b, bins), started = true; }
  // Adds the counts to `to`, whose bins are those of the window, and forgets them.
  void settle(int64_t* to) {
    uint32_t* a = fast.get();
    const size_t next = bins + kPadding;
    if (copies == kCopies)
      for (int i = 0; i < bins; ++i)
        to[i] += (int64_t)a[i] + a[i + next] + a[i + 2 * next] + a[i + 3 * next];
    else
      for (int i = 0; i < bins; ++i) to[i] += a[i];
    if (counted) std::memset(a, 0, copies * next * sizeof(uint32_t));
    counted = 0;
  }
  int64_t* totals() {
    if (!total) total.reset(new int64_t[bins]());
    return total.get();
  }
  void cover(float a, float b) {
    if (!started) return start(a, b);
    if (a >= low && b <= high) return;
    low = a < low ? a : low, high = b > high ? b : high;
    Window now = window_of(low, high, bins);
    if (now.exponent == win.exponent && now.first == win.first) return;
    if (counted || total) {
      settle(totals());
      std::unique_ptr<int64_t[]> grown(new int64_t[bins]());
      add_widened(total.get(), win, grown.get(), now, bins);
      total.swap(grown);
    }
    win = now;
  }
  void count(const float* x, int64_t n) {
    if (counted > INT32_MAX) settle(totals());
    counted += n;
    const float inverse = (float)std::ldexp(1.0, -win.exponent);
    const int32_t first = (int32_t)win.first;
    alignas(64) uint32_t number[kChunk + 16];
    uint32_t* a = fast.get();
    n = numbers_of(x, n, inverse, first, number, a);
    int64_t i = 0;
    if (copies == kCopies) {
      uint32_t *b = a + bins + kPadding, *c = b + bins + kPadding, *d = c + bins + kPadding;
      for (; i + 4 <= n; i += 4) {
        uint64_t one, two;  // two numbers in a load: loads are what this loop waits for
        std::memcpy(&one, number + i, 8);
        std::memcpy(&two, number + i + 2, 8);
        ++a[(uint32_t)one], ++b[one >> 32], ++c[(uint32_t)two], ++d[two >> 32];
      }
    }
    for (; i < n; ++i) ++a[number[i]];
  }
  // Adds everything to `to`, whose window covers this one.
  void hand_over(int64_t* to, Window now) {
    if (!started) return;
    if (!total && now.exponent == win.exponent && now.first == win.first) return settle(to);
    settle(totals());
    add_widened(total.get(), win, to, now, bins);
  }
};

// The values of a tensor, in any order. `dims` is empty where memory holds each of them once, side by side.
struct Values {
  struct Dim {
    int64_t size, stride;
  };
  const float* data;
  int64_t count;
  std::vector<Dim> dims;  // innermost first

  // `n` values from number `begin` on: a view, or a copy in `room`.
  const float* read(int64_t begin, int64_t n, float* room) const {
    if (dims.empty()) return data + begin;
    int64_t index[64], rest = begin, at = 0;
    const size_t rank = dims.size();
    for (size_t d = 0; d < rank; ++d) {
      index[d] = rest % dims[d].size, rest /= dims[d].size;
      at += index[d] * dims[d].stride;
    }
    for (int64_t i = 0; i < n;) {
      for (; i < n && index[0] < dims[0].size; ++i, ++index[0], at += dims[0].stride) room[i] = data[at];
      for (size_t d = 0; d < rank && index[d] == dims[d].size; ++d) {
        at -= index[d] * dims[d].stride, index[d] = 0;
        if (d + 1 < rank) ++index[d + 1], at += dims[d + 1].stride;
      }
    }
    return room;
  }
};

// Looks at the values from `begin` to `end`.
void scan(const Values& x, int64_t begin, int64_t end, float limit, Tally* tally, Local* local) {
  float room[kChunk], kept[kChunk];
  for (int64_t at = begin; at < end; at += kChunk) {
    int64_t n = end - at < kChunk ? end - at : kChunk;
    const float* values = x.read(at, n, room);
    float low, high;
    if (!range_of(values, n, limit, &low, &high)) {
      n = sort_out(values, n, limit, kept, tally);
      values = kept;
      range_of(values, n, limit, &low, &high);
    }
    if (n == 0) continue;
    tally->usable += n;
    tally->low = low < tally->low ? low : tally->low;
    tally->high = high > tally->high ? high : tally->high;
    if (local) {
      local->cover(low, high);
      local->count(values, n);
    }
  }
}

struct Work {
  const Values* x;
  float limit;
  int parts;
  Tally* tallies;
  Local* locals;  // may be null
};

void scan_parts(int64_t first, int64_t last, void* context) {
  const Work& work = *(const Work*)context;
  const int64_t n = work.x->count;
  for (int64_t t = first; t < last; ++t)
    scan(*work.x, n * t / work.parts, n * (t + 1) / work.parts, work.limit, work.tallies + t,
         work.locals ? work.locals + t : nullptr);
}

float towards(float average, float value, float constant) {
  float step = value - average;
  float moved = constant * step;
  moved = average + moved;
  if (std::isfinite(moved)) return moved;
  return std::isinf(average) ? value : std::isinf(value) ? average : moved;
}

}  // namespace
