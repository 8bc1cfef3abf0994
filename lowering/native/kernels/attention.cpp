// Attention: softmax(q k^T * scale + mask) v, head by head, in blocks of rows of q.
//
// Scores of a block stay in the L2 cache between the two products of multiply.cpp: of floats, or of bytes where both
// sides are quantized.

#include "dot.h"
#include "epilogue.h"
#include "memory.h"
#include "multiply.h"
#include "softmax.h"

namespace quant2e {
namespace {

constexpr int64_t kScoreBytes = 128 * 1024;  // of the rows of a block
constexpr int64_t kMostRows = 96;
constexpr int64_t kRows = 12;  // blocks are multiples of it

thread_local Memory memory;

// Heads side by side in the rows of a tensor: `count` of them, each `first.size` wide.
struct Heads {
  Rows first;
  int64_t count;

  Rows of(int64_t h) const {
    Rows rows = first;
    rows.data += h * first.size * (first.bytes ? 1 : 4);
    return rows;
  }
};

// `begin`: channel at which they begin.
Heads heads_of(const Run& run, int64_t tensor, int64_t begin, int64_t count, int64_t size, float scale, int64_t zero) {
  const View x = run.view(tensor);
  return {{x.at(0, 0) + begin * x.size, x.size == 1, x.c, x.w, size, scale, zero}, count};
}

// What is added to scores: an image with a channel per head, or one, and rows of keys, or one.
struct Mask {
  const float* data;
  int64_t head, row, column;

  // Of one row of one head; in `room` where its values do not lie one behind the other.
  const float* of(int64_t h, int64_t i, int64_t n, float* room) const {
    if (!data) return nullptr;
    const float* from = data + h * head + i * row;
    if (column == 1) return from;
    for (int64_t k = 0; k < n; ++k) room[k] = from[k * column];
    return room;
  }
};

Mask mask_of(const Run& run, int64_t tensor) {
  if (tensor < 0) return {nullptr, 0, 0, 0};
  const View x = run.view(tensor);
  const int64_t place = run.tensors[tensor].place;
  Given given{x.data, 0, 1, x.row(), x.c};
  if (place < 0) given = run.given[-1 - place];
  return {(const float*)x.at(0, 0), x.c > 1 ? given.channel : 0, x.h > 1 ? given.row : 0, given.column};
}

// Probabilities are rounded where `scale` is not 0.
struct Rounding {
  float scale, inverse;
  int64_t zero;
  Range range;
  float low, high;  // of integers without zero point

  explicit Rounding(const Step& s)
      : scale(s.softmax_scale()), inverse(scale ? 1 / scale : 0), zero(s.softmax_zero),
        range(s.softmax_zero, s.softmax_low, s.softmax_high), low((float)(s.softmax_low - s.softmax_zero)),
        high((float)(s.softmax_high - s.softmax_zero)) {}
};

struct Attention {
  Heads q, k, v;
  Mask mask;
  View y, z;
  float scale;
  bool causal, bytes_of_scores, bytes_of_values;
  Rounding rounding;
  Range range;  // of y
  float inverse;
  int64_t rows;  // of a block

  int64_t keys() const { return k.first.count; }
  int64_t size() const { return v.first.size; }

  // That the rows before `end` see, whole vectors of them but for the last.
  int64_t seen(int64_t end) const {
    if (!causal || (bytes_of_values && rounding.zero)) return keys();
    return std::min(keys(), whole_lanes(end));
  }
};

// What a thread works with: a packed head, and the rows of a block.
struct Room {
  Panels keys, values;
  float *scores, *out, *q, *mask, *factors, *sums;
  uint8_t* bytes;  // of probabilities
  int64_t keys_row, bytes_row, out_row, q_row;

  explicit Room(const Attention& a) {
    keys_row = whole_lanes(a.keys()), bytes_row = (keys_row + 63) / 64 * 64, out_row = whole_lanes(a.size()), q_row = whole_lanes(a.q.first.size);
    const int64_t sizes[] = {panel_bytes(a.bytes_of_scores, a.q.first.size, a.keys()), keys_row * 4,
                             panel_bytes(a.bytes_of_values, a.keys(), a.size()), out_row * 4, a.rows * keys_row * 4,
                             a.rows * out_row * 4, a.rows * q_row * 4, keys_row * 4, a.rows * 4, a.rows * 4, a.rows * bytes_row};
    constexpr int kParts = sizeof sizes / sizeof *sizes;
    int64_t places[kParts], total = 0;
    for (int i = 0; i < kParts; ++i) places[i] = total, total += (sizes[i] + 127) / 64 * 64;
    char* data = memory.of(total);
    keys = {data + places[0], (int32_t*)(data + places[1]), a.q.first.size, a.keys()};
    values = {data + places[2], (int32_t*)(data + places[3]), a.keys(), a.size()};
    scores = (float*)(data + places[4]), out = (float*)(data + places[5]), q = (float*)(data + places[6]);
    mask = (float*)(data + places[7]), factors = (float*)(data + places[8]), sums = (float*)(data + places[9]);
    bytes = (uint8_t*)(data + places[10]);
  }
};

void pack_head(const Attention& a, const Room& room, int64_t h) {
  if (a.bytes_of_scores) pack_transposed_bytes(a.k.of(h), a.q.first.zero, room.keys);
  else pack_transposed(a.k.of(h), room.keys);
  if (a.bytes_of_values) pack_bytes(a.v.of(h), a.rounding.zero, room.values);
  else pack(a.v.of(h), room.values);
}

// scores = q k^T, of the first `keys` keys.
void score(const Attention& a, const Room& room, const Rows& q, int64_t begin, int64_t rows, int64_t keys) {
  if (a.bytes_of_scores)
    return multiply((const uint8_t*)q.at(begin), q.row, rows, room.keys, q.size, keys,
                    (int32_t*)room.scores, room.keys_row);
  if (!q.bytes)
    return multiply((const float*)q.at(begin), q.row, rows, room.keys, q.size, keys, room.scores, room.keys_row);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < q.size; c += kLanes)
      store(room.q + i * room.q_row + c, q.values(begin + i, c, (int)std::min<int64_t>(kLanes, q.size - c)), kLanes);
  multiply(room.q, room.q_row, rows, room.keys, q.size, keys, room.scores, room.keys_row);
}

// Probabilities of a row as rounded integers, without their zero point.
void round_floats(const Attention& a, float* x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; i += kLanes)
    store(x + i, clamped(whole(load(x + i) * set(factor)), a.rounding.low, a.rounding.high), kLanes);
}

// The same as bytes, with zero point; returns the sum of the integers.
float round_bytes(const Attention& a, const float* x, int64_t n, float factor, uint8_t* to) {
  for (int64_t i = 0; i < n; i += 4 * kLanes) {
    I integers[4];
    const int count = (int)std::min<int64_t>(4 * kLanes, n - i);
    for (int v = 0; v < 4; ++v)
      integers[v] = v * kLanes < count ? rounded(load(x + i + v * kLanes) * set(factor)) : set_int(0);
    store_bytes<4>(to + i, integers, a.rounding.range, count);
  }
  if (a.v.first.zero == 128) return 0;
  int32_t sums[kLanes], total = 0;
  I sum_of_fours = set_int(0);
  for (int64_t i = n; i % 64; ++i) to[i] = 0;
  for (int64_t i = 0; i < n; i += 64) sum_of_fours = dot_lanes(sum_of_fours, load_weights((const int8_t*)to + i), repeated(0x01010101));
  store_int(sums, sum_of_fours);
  for (int lane : sums) total += lane;
  return (float)(total - n * a.rounding.zero);
}

// Probabilities of the rows of a block, of which `keys` are computed. What is left to do is a product with `factors`.
void probabilities(const Attention& a, const Room& room, int64_t h, int64_t begin, int64_t rows, int64_t keys) {
  const int64_t whole_keys = whole_lanes(keys);
  const auto seen = [&](int64_t i) { return a.causal ? std::min(keys, begin + i + 1) : keys; };
  const auto row = [&](int64_t i) { return room.scores + i * room.keys_row; };
  const bool scaled = a.mask.data || a.bytes_of_scores;
  for (int64_t i = 0; i < rows && scaled; ++i) {
    const float* mask = a.mask.of(h, begin + i, seen(i), room.mask);
    if (a.bytes_of_scores) scale_row<true>(row(i), seen(i), a.scale, mask);
    else scale_row<false>(row(i), seen(i), a.scale, mask);
  }
  for (int64_t i = 0; i < rows; ++i) room.factors[i] = largest_of(row(i), seen(i));
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t n = seen(i);
    const float total = exponentials(row(i), n, scaled ? 1 : a.scale, room.factors[i]);
    // behind `n`, powers of minus infinity are not quite 0
    if (n < whole_keys) std::memset(row(i) + n, 0, (whole_keys - n) * 4);
    room.factors[i] = total ? 1 / total : 0;
  }
  if (!a.rounding.scale) return;
  for (int64_t i = 0; i < rows; ++i) {
    const float factor = room.factors[i] * a.rounding.inverse;
    if (a.bytes_of_values) room.sums[i] = round_bytes(a, row(i), whole_keys, factor, room.bytes + i * room.bytes_row);
    else round_floats(a, row(i), whole_keys, factor);
    room.factors[i] = a.rounding.scale;
  }
}

// A row of the result.
void write(const Attention& a, const Room& room, int64_t h, int64_t i, int64_t row) {
  const float* from = room.out + row * room.out_row;
  const float factor = room.factors[row] * (a.bytes_of_values ? a.v.first.scale : 1);
  const float offset = a.bytes_of_values ? (float)(128 - a.v.first.zero) * room.sums[row] : 0;
  const int64_t size = a.size();
  for (int64_t c = 0; c < size; c += 4 * kLanes) {
    I integers[4];
    const int n = (int)std::min<int64_t>(4 * kLanes, size - c);
    for (int v = 0; v < 4; ++v) {
      const int count = std::min(kLanes, n - v * kLanes);
      if (count <= 0) {
        integers[v] = set_int(0);
        continue;
      }
      const float* at = from + c + v * kLanes;
      const F sums = a.bytes_of_values ? to_float(load_int((const int32_t*)at)) : load(at);
      const F value = (sums + set(offset)) * set(factor);
      if (a.z.data) store(a.z.floats(0, i) + h * size + c + v * kLanes, value, count);
      integers[v] = rounded(clamped(value * set(a.inverse), -1e9f, 1e9f));
    }
    if (a.y.data) store_bytes<4>(a.y.bytes(0, i) + h * size + c, integers, a.range, n);
  }
}

void block(const Attention& a, const Room& room, int64_t h, int64_t begin, int64_t end) {
  const int64_t rows = end - begin, keys = a.seen(end);
  score(a, room, a.q.of(h), begin, rows, keys);
  probabilities(a, room, h, begin, rows, keys);
  if (a.bytes_of_values)
    multiply(room.bytes, room.bytes_row, rows, room.values, keys, a.size(), (int32_t*)room.out, room.out_row);
  else
    multiply(room.scores, room.keys_row, rows, room.values, keys, a.size(), room.out, room.out_row);
  for (int64_t i = 0; i < rows; ++i) write(a, room, h, begin + i, i);
}

int64_t rows_of_block(const Run& run, const Attention& a) {
  const int64_t fit = kScoreBytes / (whole_lanes(a.keys()) * 4) / kRows * kRows;
  const int64_t parts = std::max<int64_t>(1, run.threads / a.q.count);  // where there are fewer heads than threads
  const int64_t share = (a.q.first.count + parts - 1) / parts;
  return std::max<int64_t>(1, std::min({std::max(fit, kRows), kMostRows, share}));
}

}  // namespace

// x, other, third, fourth: q, k, v, mask. `groups`: heads of q; `inputs`: of k and v, where fewer serve several of q;
// `outputs`, `inner`: width of a head of q and k, and of v. `extra_number`: the scale of scores. `mode` 1: causal.
void attention(const Run& run, const Step& s) {
  const View none{};
  Attention a{heads_of(run, s.x, s.x_first, s.groups, s.outputs, s.x_scale(), s.x_zero),
              heads_of(run, s.other, s.other_first, s.inputs, s.outputs, s.other_scale(), s.other_zero),
              heads_of(run, s.third, s.third_first, s.inputs, s.inner, s.third_scale(), s.third_zero),
              mask_of(run, s.fourth),
              s.y >= 0 ? run.view(s.y) : none,
              s.z >= 0 ? run.view(s.z) : none,
              s.extra_number(),
              s.mode == 1,
              false,
              false,
              Rounding(s),
              Range(s.zero, s.low, s.high),
              s.inverse(),
              0};
  a.bytes_of_scores = a.q.first.bytes && a.k.first.bytes;
  a.bytes_of_values = a.v.first.bytes && a.rounding.scale != 0;
  if (a.bytes_of_scores) a.scale *= a.q.first.scale * a.k.first.scale;
  a.rows = rows_of_block(run, a);
  const int64_t blocks = (a.q.first.count + a.rows - 1) / a.rows, shared = a.q.count / a.k.count;
  const int64_t most = a.q.count * a.q.first.count * a.keys() * (s.outputs + s.inner) / kPartProducts;
  in_parallel(run, a.q.count * blocks, 1, most, [&](int64_t from, int64_t to) {
    const Room room(a);
    for (int64_t item = from, packed = -1; item < to; ++item) {
      const int64_t h = item / blocks, begin = item % blocks * a.rows;
      if (packed != h / shared) pack_head(a, room, packed = h / shared);
      block(a, room, h, begin, std::min(begin + a.rows, a.q.first.count));
    }
  });
}

}  // namespace quant2e
