// The ops of torch that observe: quant2e::observe_minmax, observe_average and observe_histogram.
//
// Each is one pass over a tensor, on all threads of torch, that updates the statistics in place.

#include "native_kernel.cpp"
#include "native_op.cpp"

namespace {

// What an argument holds.
Values values_of(const Argument& argument) {
  Values x{argument.data<float>(), 0, {}};
  int64_t rank = 0, *sizes = nullptr, *strides = nullptr;
  must(aoti_torch_get_numel(argument.handle, &x.count));
  must(aoti_torch_get_dim(argument.handle, &rank));
  must(aoti_torch_get_sizes(argument.handle, &sizes));
  must(aoti_torch_get_strides(argument.handle, &strides));
  bool row_major = true;
  int64_t wanted = 1;
  for (int64_t d = rank - 1; d >= 0; --d)
    if (sizes[d] != 1) row_major = row_major && strides[d] == wanted, wanted *= sizes[d];
  if (row_major || x.count < 2) return x;
  std::vector<Values::Dim> dims;
  for (int64_t d = 0; d < rank; ++d)
    if (sizes[d] != 1) {
      auto place = dims.begin();
      while (place != dims.end() && place->stride <= strides[d]) ++place;
      dims.insert(place, {sizes[d], strides[d]});
    }
  wanted = 1;
  bool dense = true;
  for (const auto& dim : dims) dense = dense && dim.stride == wanted, wanted *= dim.size;
  if (!dense) x.dims = std::move(dims);
  return x;
}

float number(uint64_t value) {  // floats of a schema are doubles
  double found;
  std::memcpy(&found, &value, sizeof found);
  return (float)found;
}

// Tallies of a whole tensor. `locals` holds `parts` histograms, or is null.
Tally look(const Values& x, float limit, int parts, Local* locals, int64_t* counts) {
  Tally tallies[kMostThreads];
  Work work{&x, limit, parts, tallies, locals};
  if (parts == 1)
    scan_parts(0, 1, &work);
  else
    must(torch_parallel_for(0, parts, 1, scan_parts, &work));
  Tally all;
  for (int t = 0; t < parts; ++t) {
    const Tally& one = tallies[t];
    all.low = one.low < all.low ? one.low : all.low;
    all.high = one.high > all.high ? one.high : all.high;
    all.nan += one.nan, all.posinf += one.posinf, all.masked += one.masked, all.usable += one.usable;
  }
  counts[0] += x.count, counts[1] += all.nan, counts[2] += all.posinf, counts[3] += all.masked;
  return all;
}

int parts_of(const Values& x) {
  if (x.count < kSerial) return 1;
  uint32_t threads = 1;
  must(torch_get_num_threads(&threads));
  int64_t most = x.count / (kSerial / 2), wanted = threads < most ? threads : most;
  return (int)(wanted < 1 ? 1 : wanted < kMostThreads ? wanted : kMostThreads);
}

// As MinMax.update in ranges.py.
void observe_minmax(uint64_t* stack, uint64_t, uint64_t) {
  Argument x(stack[0]), low(stack[2]), high(stack[3]), counts(stack[4]);
  const Values values = values_of(x);
  if (values.count == 0) return;
  Tally all = look(values, number(stack[1]), parts_of(values), nullptr, counts.data<int64_t>());
  float *min_val = low.data<float>(), *max_val = high.data<float>();
  if (all.low < *min_val) *min_val = all.low;
  if (all.high > *max_val) *max_val = all.high;
}

// As MovingAverage.update in ranges.py.
void observe_average(uint64_t* stack, uint64_t, uint64_t) {
  Argument x(stack[0]), low(stack[2]), high(stack[3]), counts(stack[4]);
  const Values values = values_of(x);
  if (values.count == 0) return;
  Tally all = look(values, number(stack[1]), parts_of(values), nullptr, counts.data<int64_t>());
  float *min_val = low.data<float>(), *max_val = high.data<float>(), constant = number(stack[5]);
  *min_val = towards(*min_val, all.low, constant);
  *max_val = towards(*max_val, all.high, constant);
}

// As Histogram.update in histogram.py.
void observe_histogram(uint64_t* stack, uint64_t, uint64_t) {
  Argument x(stack[0]), low_of(stack[2]), high_of(stack[3]), counts(stack[4]), bins_of(stack[5]);
  const Values values = values_of(x);
  if (values.count == 0) return;
  float *min_val = low_of.data<float>(), *max_val = high_of.data<float>();
  int64_t *histogram = bins_of.data<int64_t>(), size = 0;
  must(aoti_torch_get_numel(bins_of.handle, &size));
  const int bins = (int)size, parts = parts_of(values);
  const bool empty = *min_val > *max_val;
  Local locals[kMostThreads];
  for (int t = 0; t < parts; ++t) {
    locals[t].make(bins, values.count / parts);
    // Beginning with the window of before, most batches never change it.
    if (!empty) locals[t].start(*min_val, *max_val);
  }
  Tally all = look(values, number(stack[1]), parts, locals, counts.data<int64_t>());
  if (!all.usable) return;
  const float low = all.low < *min_val ? all.low : *min_val, high = all.high > *max_val ? all.high : *max_val;
  const Window now = window_of(low, high, bins);
  if (!empty) {
    const Window old = window_of(*min_val, *max_val, bins);
    if (old.exponent != now.exponent || old.first != now.first) {
      const std::vector<int64_t> before(histogram, histogram + bins);
      std::memset(histogram, 0, bins * sizeof(int64_t));
      add_widened(before.data(), old, histogram, now, bins);
    }
  }
  for (int t = 0; t < parts; ++t) locals[t].hand_over(histogram, now);
  *min_val = low, *max_val = high;
}

}  // namespace

// Gives the ops, which native.py has declared, to torch; returns 0, or the step that failed.
extern "C" int quant2e_register() {
  Handle library = nullptr;
  if (aoti_torch_library_init_impl("quant2e", "CPU", __FILE__, __LINE__, &library)) return 1;
  if (aoti_torch_library_impl(library, "observe_minmax", observe_minmax)) return 2;
  if (aoti_torch_library_impl(library, "observe_average", observe_average)) return 3;
  return aoti_torch_library_impl(library, "observe_histogram", observe_histogram) ? 4 : 0;
}
