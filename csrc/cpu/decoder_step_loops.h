// The loops of decoder_step.cpp, included once for each instruction set as quant_linear_loops.h is: QWEN2VL_TARGET
// names it, and the namespace has vectors, `multiply_add` and `total` in its words. No include guard, and no includes,
// on purpose.

#define QWEN2VL_INLINE QWEN2VL_TARGET inline __attribute__((always_inline))

QWEN2VL_INLINE Floats load_floats(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

QWEN2VL_INLINE void store_floats(float* to, const Floats& value) { std::memcpy(to, &value, sizeof value); }

QWEN2VL_INLINE Floats load_bf16(const uint16_t* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return (Floats)(__builtin_convertvector(halves, Ints) << 16);
}

// Within two units in the last place. The power of two is taken in two steps, so that what is too large becomes
// infinite, what is too small zero, and what is no number stays none.
QWEN2VL_INLINE Floats exponential(Floats x) {
  x = x > 90.0f ? Floats{} + 90.0f : x;
  x = x < -104.0f ? Floats{} - 104.0f : x;
  constexpr float kWhole = 0x1.8p23f;  // a sum with it is rounded to whole numbers
  const Floats shifted = x * 0x1.715476p0f + kWhole;
  const Floats n = shifted - kWhole;
  const Ints power = (Ints)shifted - (Ints)(Floats{} + kWhole);
  const Floats r = multiply_add(n, Floats{} - 0x1.7f7d1cp-20f, multiply_add(n, Floats{} - 0x1.62e4p-1f, x));
  Floats p = Floats{} + 1.0f / 720;
  p = multiply_add(p, r, Floats{} + 1.0f / 120);
  p = multiply_add(p, r, Floats{} + 1.0f / 24);
  p = multiply_add(p, r, Floats{} + 1.0f / 6);
  p = multiply_add(p, r, Floats{} + 0.5f);
  p = multiply_add(p, r, Floats{} + 1.0f);
  p = multiply_add(p, r, Floats{} + 1.0f);
  const Ints half = power >> 1;
  return p * (Floats)((half + 127) << 23) * (Floats)((power - half + 127) << 23);
}

// Rounded to nearest, ties to even, as to_bf16.
QWEN2VL_INLINE Halves to_halves(const Floats& x) {
  const Ints bits = (Ints)x;
  const Ints rounded = (Ints)(((Words)bits + 0x7fffu + (((Words)bits >> 16) & 1u)) >> 16);
  const Ints none = ((bits >> 16) & 0xffff) | 0x40;
  return __builtin_convertvector(x != x ? none : rounded, Halves);
}

template <int M>
QWEN2VL_INLINE void scores_of(const KeySplit& p, int64_t head, int64_t room) {
  const float* q = p.q + head * p.columns;
  for (int64_t key = 0; key < p.keys; ++key) {
    const uint16_t* k = p.k + key * p.k_stride;
    // Rows of one key head lie apart, further than processors look ahead; the values are wanted next.
    const uint16_t* ahead = p.k + std::min(key + kKeysAhead, p.keys - 1) * p.k_stride;
    for (int64_t c = 0; c < p.columns; c += kLine) {
      __builtin_prefetch(ahead + c);
      __builtin_prefetch(p.v + key * p.v_stride + c, 0, 2);
    }
    Floats sums[M] = {};
    for (int64_t c = 0; c < p.columns; c += kLanes) {
      const Floats values = load_bf16(k + c);
      for (int m = 0; m < M; ++m) sums[m] = multiply_add(values, load_floats(q + m * p.columns + c), sums[m]);
    }
    for (int m = 0; m < M; ++m) p.scores[(head + m) * room + key] = total(sums[m]);
  }
}

template <int M, int N>
QWEN2VL_INLINE void values_of(const KeySplit& p, int64_t head, int64_t column, int64_t room) {
  Floats sums[M][N] = {};
  const float* weights = p.scores + head * room;
  for (int64_t key = 0; key < p.keys; ++key) {
    const uint16_t* v = p.v + key * p.v_stride + column;
    Floats values[N];
    for (int n = 0; n < N; ++n) values[n] = load_bf16(v + n * kLanes);
    for (int m = 0; m < M; ++m) {
      const Floats weight = Floats{} + weights[m * room + key];
      for (int n = 0; n < N; ++n) sums[m][n] = multiply_add(weight, values[n], sums[m][n]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) store_floats(p.out + (head + m) * p.columns + column + n * kLanes, sums[m][n]);
  }
}

template <int M>
QWEN2VL_INLINE void heads_of(const KeySplit& p, int64_t head, int64_t room) {
  scores_of<M>(p, head, room);
  for (int m = 0; m < M; ++m) {
    float* scores = p.scores + (head + m) * room;
    for (int64_t key = p.keys; key < room; ++key) scores[key] = -std::numeric_limits<float>::infinity();
    Floats most = load_floats(scores);
    for (int64_t key = kLanes; key < room; key += kLanes) {
      const Floats more = load_floats(scores + key);
      most = more > most ? more : most;
    }
    float lanes[kLanes];
    store_floats(lanes, most);
    float largest = lanes[0];
    for (int64_t lane = 1; lane < kLanes; ++lane) largest = std::max(largest, lanes[lane]);
    Floats sums = {};
    for (int64_t key = 0; key < room; key += kLanes) {
      const Floats weights = exponential(load_floats(scores + key) - largest);
      sums += weights;
      store_floats(scores + key, weights);
    }
    p.largest[head + m] = largest;
    p.sum[head + m] = total(sums);
  }
  int64_t column = 0;
  for (; column + 2 * kLanes <= p.columns; column += 2 * kLanes) values_of<M, 2>(p, head, column, room);
  for (; column < p.columns; column += kLanes) values_of<M, 1>(p, head, column, room);
}

template <int M>
QWEN2VL_INLINE void heads_by(const KeySplit& p, int64_t head, int64_t count, int64_t room) {
  if (count == M) return heads_of<M>(p, head, room);
  if constexpr (M > 1) heads_by<M - 1>(p, head, count, room);
}

// Query heads are taken in groups of even size, as few as there can be: a key is read once for all of a group.
QWEN2VL_TARGET void attend(const KeySplit& p) {
  const int64_t room = (p.keys + kLanes - 1) / kLanes * kLanes;
  for (int64_t head = 0, groups = (p.heads + kMost - 1) / kMost; groups > 0; --groups) {
    const int64_t count = (p.heads - head + groups - 1) / groups;
    heads_by<kMost>(p, head, count, room);
    head += count;
  }
}

QWEN2VL_TARGET void swiglu(const uint16_t* gate, const uint16_t* up, uint16_t* y, int64_t count) {
  for (int64_t n = 0; n < count; n += kLanes) {
    uint16_t parts[2][kLanes] = {};
    const bool whole = n + kLanes <= count;
    const size_t bytes = static_cast<size_t>(std::min(kLanes, count - n)) * sizeof(uint16_t);
    if (!whole) {
      std::memcpy(parts[0], gate + n, bytes);
      std::memcpy(parts[1], up + n, bytes);
    }
    const Floats g = load_bf16(whole ? gate + n : parts[0]), u = load_bf16(whole ? up + n : parts[1]);
    const Halves result = to_halves(g / (1.0f + exponential(-g)) * u);
    std::memcpy(y + n, &result, bytes);
  }
}

#undef QWEN2VL_INLINE
