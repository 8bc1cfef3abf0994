// One pass over a tensor: range, values that must not count, and histogram, on all threads.
//
// The results are those of quant2e/ranges.py and quant2e/histogram.py bit for bit: minimum, maximum and counts do not
// depend on the order of the values, and growing a histogram is exact. No header of torch is used, so that this file
// compiles in about a second with any C++ compiler.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int64_t kChunk = 8192;    // floats of one chunk stay in the first-level cache
constexpr int64_t kSerial = 32768;  // smaller tensors are not worth waking other threads for
constexpr int kLanes = 32;
constexpr int kCopies = 4;  // equal neighbours (the zeros after a relu) go to different copies: no waiting for stores
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

// As window() in histogram.py.
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
template <class Count>
void add_widened(const Count* from, Window old, int64_t* to, Window now, int bins) {
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

// The histogram of one thread: its own window, which grows as values come.
struct Local {
  int bins, copies;
  int64_t* total;
  uint32_t* fast;
  float low, high;
  Window win;
  bool started = false;

  bool make(int n, int64_t values) {
    bins = n;
    copies = values < kChunk ? 1 : kCopies;
    total = (int64_t*)std::calloc(bins, sizeof(int64_t));
    fast = (uint32_t*)std::calloc((size_t)bins * copies, sizeof(uint32_t));
    return total && fast;
  }
  void drop() {
    std::free(total);
    std::free(fast);
  }
  void start(float a, float b) {
    low = a, high = b, win = window_of(a, b, bins), started = true;
  }
  void settle() {
    for (int c = 0; c < copies; ++c)
      for (int i = 0; i < bins; ++i) total[i] += fast[(size_t)c * bins + i];
    std::memset(fast, 0, (size_t)bins * copies * sizeof(uint32_t));
  }
  bool cover(float a, float b) {
    if (!started) return start(a, b), true;
    if (a >= low && b <= high) return true;
    low = a < low ? a : low, high = b > high ? b : high;
    Window now = window_of(low, high, bins);
    if (now.exponent != win.exponent || now.first != win.first) {
      settle();
      int64_t* grown = (int64_t*)std::calloc(bins, sizeof(int64_t));
      if (!grown) return false;
      add_widened(total, win, grown, now, bins);
      std::free(total);
      total = grown, win = now;
    }
    return true;
  }
  void count(const float* x, int64_t n) {
    const float inverse = (float)std::ldexp(1.0, -win.exponent);
    const int32_t first = (int32_t)win.first;
    int32_t number[kChunk];
    for (int64_t i = 0; i < n; ++i) number[i] = (int32_t)(x[i] * inverse) - first;
    int64_t i = 0;
    if (copies == kCopies) {
      uint32_t *a = fast, *b = a + bins, *c = b + bins, *d = c + bins;
      for (; i + 4 <= n; i += 4) ++a[number[i]], ++b[number[i + 1]], ++c[number[i + 2]], ++d[number[i + 3]];
    }
    for (; i < n; ++i) ++fast[number[i]];
  }
};

// Looks at x[begin:end]; false when memory ran out.
bool scan(const float* x, int64_t begin, int64_t end, float limit, Tally* tally, Local* local) {
  float kept[kChunk];
  for (int64_t at = begin; at < end; at += kChunk) {
    int64_t n = end - at < kChunk ? end - at : kChunk;
    const float* values = x + at;
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
      if (!local->cover(low, high)) return false;
      local->count(values, n);
    }
  }
  return true;
}

constexpr int kMostThreads = 64;

int team(int64_t n, int threads) {
  if (n < kSerial || threads < 1) return 1;
  int64_t most = n / (kSerial / 2);
  int wanted = threads < most ? threads : (int)most;
  return wanted < kMostThreads ? wanted : kMostThreads;
}

// Tallies of all threads; `locals` may be null.
bool scan_all(const float* x, int64_t n, float limit, int threads, Tally* tallies, Local* locals) {
  bool fine[kMostThreads];
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int t = 0; t < threads; ++t) {
    int64_t begin = n * t / threads, end = n * (t + 1) / threads;
    fine[t] = scan(x, begin, end, limit, tallies + t, locals ? locals + t : nullptr);
  }
  for (int t = 0; t < threads; ++t)
    if (!fine[t]) return false;
  return true;
}

Tally together(const Tally* tallies, int threads, int64_t* counts, int64_t n) {
  Tally all;
  for (int t = 0; t < threads; ++t) {
    const Tally& one = tallies[t];
    all.low = one.low < all.low ? one.low : all.low;
    all.high = one.high > all.high ? one.high : all.high;
    all.nan += one.nan, all.posinf += one.posinf, all.masked += one.masked, all.usable += one.usable;
  }
  counts[0] += n, counts[1] += all.nan, counts[2] += all.posinf, counts[3] += all.masked;
  return all;
}

constexpr int kSlots = 256;

// As in exact_sum.py.
void add_exactly(int64_t* slots, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  int exponent = (bits >> 23) & 0xFF;
  int64_t mantissa = (int64_t)(bits & 0x7FFFFF) + ((int64_t)(exponent > 0) << 23);
  slots[exponent] += bits >> 31 ? -mantissa : mantissa;
  ++slots[kSlots - 1];
}

float towards(float average, float value, float constant) {
  float step = value - average;
  float moved = constant * step;
  moved = average + moved;
  if (std::isfinite(moved)) return moved;
  return std::isinf(average) ? value : std::isinf(value) ? average : moved;
}

}  // namespace

extern "C" {

// min_val, max_val: float[1]; counts: int64[4], see TALLY in ranges.py; changed in place. Returns 0, or 1 without memory.
int quant2e_minmax(const float* x, int64_t n, float limit, int threads, float* min_val, float* max_val,
                   int64_t* counts) {
  Tally tallies[kMostThreads];
  threads = team(n, threads);
  scan_all(x, n, limit, threads, tallies, nullptr);
  Tally all = together(tallies, threads, counts, n);
  if (all.low < *min_val) *min_val = all.low;
  if (all.high > *max_val) *max_val = all.high;
  return 0;
}

// As MovingAverage.update in ranges.py.
int quant2e_average(const float* x, int64_t n, float limit, int threads, float* min_val, float* max_val,
                    int64_t* counts, float constant) {
  Tally tallies[kMostThreads];
  threads = team(n, threads);
  scan_all(x, n, limit, threads, tallies, nullptr);
  Tally all = together(tallies, threads, counts, n);
  *min_val = towards(*min_val, all.low, constant);
  *max_val = towards(*max_val, all.high, constant);
  return 0;
}

// As Histogram.update in histogram.py; histogram: int64[bins], peaks: int64[2][256].
int quant2e_histogram(const float* x, int64_t n, float limit, int threads, float* min_val, float* max_val,
                      int64_t* counts, int64_t* histogram, int64_t* peaks, int bins) {
  Tally tallies[kMostThreads];
  Local locals[kMostThreads];
  threads = team(n, threads);
  bool empty = *min_val > *max_val, fine = true;
  for (int t = 0; t < threads; ++t) {
    fine = locals[t].make(bins, n) && fine;
    // Beginning with the window of before, most batches never change it.
    if (fine && !empty) locals[t].start(*min_val, *max_val);
  }
  fine = fine && scan_all(x, n, limit, threads, tallies, locals);
  if (fine) {
    Tally all = together(tallies, threads, counts, n);
    if (all.usable) {
      float low = all.low < *min_val ? all.low : *min_val, high = all.high > *max_val ? all.high : *max_val;
      Window now = window_of(low, high, bins);
      if (!empty) {
        Window old = window_of(*min_val, *max_val, bins);
        if (old.exponent != now.exponent || old.first != now.first) {
          int64_t* before = (int64_t*)std::malloc(bins * sizeof(int64_t));
          fine = before != nullptr;
          if (fine) {
            std::memcpy(before, histogram, bins * sizeof(int64_t));
            std::memset(histogram, 0, bins * sizeof(int64_t));
            add_widened(before, old, histogram, now, bins);
            std::free(before);
          }
        }
      }
      for (int t = 0; fine && t < threads; ++t)
        if (locals[t].started) {
          locals[t].settle();
          add_widened(locals[t].total, locals[t].win, histogram, now, bins);
        }
      *min_val = low, *max_val = high;
      add_exactly(peaks, all.low + 0.0f);
      add_exactly(peaks + kSlots, all.high + 0.0f);
    }
  }
  for (int t = 0; t < threads; ++t) locals[t].drop();
  return fine ? 0 : 1;
}

}  // extern "C"
