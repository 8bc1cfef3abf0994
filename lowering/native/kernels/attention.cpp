// Attention: softmax(q k^T * scale + mask) v, head by head, in blocks of rows of q.
//
// Scores of a block stay in the L2 cache between the two products of multiply.cpp: of floats, or of bytes where both
// sides are quantized.

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

// [rows, heads * size] of the arena, or [heads, rows, size] that the caller gave, with any strides.
struct Heads {
  Rows first;
  int64_t count, apart;  // in values

  Rows of(int64_t h) const {
    Rows rows = first;
    rows.data += h * apart * (first.bytes ? 1 : 4);
    return rows;
  }
};

Heads heads_of(const Run& run, int64_t tensor, int64_t count, float scale, int64_t zero) {
  const View x = run.view(tensor);
  const bool bytes = x.size == 1;
  const int64_t place = run.tensors[tensor].place, size = x.c / count;
  if (place >= 0) return {{x.at(0, 0), bytes, x.c, x.w, size, scale, zero}, count, size};
  const Given& given = run.given[-1 - place];
  if (given.row) return {{x.data, bytes, given.row, x.w, x.c, scale, zero}, x.h, given.channel};
  return {{x.data, bytes, given.column, x.w, size, scale, zero}, count, size};
}

// What is added to scores: an argument [heads or 1, rows or 1, keys].
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
  const Given& given = run.given[-1 - run.tensors[tensor].place];
  const View x = run.view(tensor);
  return {(const float*)x.data, x.h > 1 ? given.channel : 0, x.w > 1 ? given.row : 0, given.column};
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

  ALWAYS_INLINE F integers(F probability) const { return clamped(whole(probability * set(inverse)), low, high); }
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
  float *scores, *out, *q, *mask, *sums;
  uint8_t* bytes;  // of probabilities
  int64_t keys_row, out_row, q_row;

  explicit Room(const Attention& a) {
    keys_row = whole_lanes(a.keys()), out_row = whole_lanes(a.size()), q_row = whole_lanes(a.q.first.size);
    const int64_t sizes[] = {panel_bytes(a.bytes_of_scores, a.q.first.size, a.keys()), keys_row * 4,
                             panel_bytes(a.bytes_of_values, a.keys(), a.size()), out_row * 4, a.rows * keys_row * 4,
                             a.rows * out_row * 4, a.rows * q_row * 4, keys_row * 4, a.rows * 4, a.rows * keys_row};
    constexpr int kParts = sizeof sizes / sizeof *sizes;
    int64_t places[kParts], total = 0;
    for (int i = 0; i < kParts; ++i) places[i] = total, total += (sizes[i] + 127) / 64 * 64;
    char* data = memory.of(total);
    keys = {data + places[0], (int32_t*)(data + places[1]), a.q.first.size, a.keys()};
    values = {data + places[2], (int32_t*)(data + places[3]), a.keys(), a.size()};
    scores = (float*)(data + places[4]), out = (float*)(data + places[5]), q = (float*)(data + places[6]);
    mask = (float*)(data + places[7]), sums = (float*)(data + places[8]), bytes = (uint8_t*)(data + places[9]);
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
    return multiply((const uint8_t*)q.at(begin), q.row, rows, room.keys, q.size, keys, room.scores, room.keys_row);
  if (!q.bytes)
    return multiply((const float*)q.at(begin), q.row, rows, room.keys, q.size, keys, room.scores, room.keys_row);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < q.size; c += kLanes)
      store(room.q + i * room.q_row + c, q.values(begin + i, c, (int)std::min<int64_t>(kLanes, q.size - c)), kLanes);
  multiply(room.q, room.q_row, rows, room.keys, q.size, keys, room.scores, room.keys_row);
}

// Probabilities of a row, rounded: as floats where they are, or as bytes; returns the sum of the integers.
float round_row(const Attention& a, const Room& room, int64_t row, int64_t n, float factor) {
  float* x = room.scores + row * room.keys_row;
  F total = set(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const F value = a.rounding.integers(load(x + i) * set(factor));
    total = total + value;
    if (!a.bytes_of_values) {
      store(x + i, value, kLanes);
      continue;
    }
    const I integers = rounded(value);
    store_bytes<1>(room.bytes + row * room.keys_row + i, &integers, a.rounding.range, kLanes);
  }
  return sum(total);
}

// Softmax of one row, of which `n` keys are seen and `keys` computed. What is left to do is a product with `sums`.
void probabilities(const Attention& a, const Room& room, int64_t h, int64_t at, int64_t row, int64_t keys) {
  const int64_t n = a.causal ? std::min(keys, at + 1) : keys;
  float* x = room.scores + row * room.keys_row;
  const float total = exponentials(x, n, a.scale, a.mask.of(h, at, n, room.mask));
  // behind `n`, the exponentials of minus infinity are not quite 0
  if (n < room.keys_row) std::memset(x + n, 0, (room.keys_row - n) * 4);
  const float factor = total ? 1 / total : 0;
  room.sums[row] = a.rounding.scale ? round_row(a, room, row, whole_lanes(keys), factor) : factor;
}

// A row of the result.
void write(const Attention& a, const Room& room, int64_t h, int64_t at, int64_t row) {
  const float* from = room.out + row * room.out_row;
  float factor = room.sums[row], offset = 0;
  if (a.rounding.scale) factor = a.rounding.scale;
  if (a.bytes_of_values) {
    factor *= a.v.first.scale;
    offset = (float)(128 - a.v.first.zero) * room.sums[row];
  }
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
      const F value = (load(from + c + v * kLanes) + set(offset)) * set(factor);
      if (a.z.data) store(a.z.floats(0, at) + h * size + c + v * kLanes, value, count);
      integers[v] = rounded(clamped(value * set(a.inverse), -1e9f, 1e9f));
    }
    if (a.y.data) store_bytes<4>(a.y.bytes(0, at) + h * size + c, integers, a.range, n);
  }
}

void block(const Attention& a, const Room& room, int64_t h, int64_t begin, int64_t end) {
  const int64_t rows = end - begin, keys = a.seen(end);
  score(a, room, a.q.of(h), begin, rows, keys);
  for (int64_t i = 0; i < rows; ++i) probabilities(a, room, h, begin + i, i, keys);
  if (a.bytes_of_values)
    multiply(room.bytes, room.keys_row, rows, room.values, keys, a.size(), room.out, room.out_row);
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

// x, other, third, fourth: q, k, v, mask. `groups`: heads of q; `inputs`: of k and v, where fewer serve several of q.
// `extra_number`: the scale of scores. `mode` 1: causal.
void attention(const Run& run, const Step& s) {
  const View none{};
  Attention a{heads_of(run, s.x, s.groups, s.x_scale(), s.x_zero),
              heads_of(run, s.other, s.inputs, s.other_scale(), s.other_zero),
              heads_of(run, s.third, s.inputs, s.third_scale(), s.third_zero),
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
  in_parallel(run, a.q.count * blocks, 1, [&](int64_t from, int64_t to) {
    const Room room(a);
    for (int64_t item = from, packed = -1; item < to; ++item) {
      const int64_t h = item / blocks, begin = item % blocks * a.rows;
      if (packed != h / shared) pack_head(a, room, packed = h / shared);
      block(a, room, h, begin, std::min(begin + a.rows, a.q.first.count));
    }
  });
}

}  // namespace quant2e
