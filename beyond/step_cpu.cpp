// A whole step of decoding on a CPU: one token of each row through all blocks (Fig. 2, equations 1 to 3).
//
// Beside the products only attention takes time: q and y of a head stay in registers, and slots of the cache
// that are neighbours are walked along. cpu_step.py writes down where everything is and calls `step`.
#include "kernels_cpu.cpp"

// K and V are stored as float or bfloat16.
struct bfloat16 { uint16_t bits; };
static inline float to_float(float v) { return v; }
static inline float to_float(bfloat16 v) { return as_float((uint32_t)v.bits << 16); }
static inline void store(float& to, float v) { to = v; }
static inline void store(bfloat16& to, float v) {  // to the nearest, ties to even
  uint32_t u = bits_of(v);
  to.bits = v != v ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
template <class T> static inline floats floats_of(const T* from) {
  floats f;
  for (int i = 0; i < LANES; i++) f[i] = to_float(from[i]);
  return f;
}

struct Norm { const float *weight, *bias; };  // no bias: RMSNorm
struct Layer { const Matrix *A, *B; const float* bias; int bits; };  // B (A x) + bias; no B: A x + bias
struct Block {
  Norm norm1, norm2;
  Layer in[3], o, gate, up, down;  // in: q, k, v, or all of them in one; no gate: GELU
  void *K, *V;                     // the cache: (blocks of slots, kv_heads, size of a block, d)
};
struct Network {
  const Block* blocks;
  const int *lengths, *table;  // (rows): slots of the cache that are taken; (rows, in_table): blocks of a row
  const float *cos, *sin; // (rows, d / 2): RoPE, or null
  int count, rows, width, heads, kv_heads, d, ffn, size, in_table, float_cache;
  float eps;
  Norm norm;
  Layer head;
};

static inline float exponential(float x) {  // 2^n times a polynomial, of whole vectors at a time
  x = x < -87 ? -87 : x > 88 ? 88 : x;
  float n = rintf(x * 1.44269504f), r = x - n * 0.693147181f;
  float p = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r / 720)))));
  return p * as_float((uint32_t)((int)n + 127) << 23);
}

static void normalize(const Network& net, const Norm& norm, const float* x, float* y) {
  for (int row = 0, n = net.width; row < net.rows; row++, x += n, y += n) {
    float mean = 0, squares = 0;
    if (norm.bias)
#pragma omp simd reduction(+ : mean)
      for (int i = 0; i < n; i++) mean += x[i];
    mean /= n;
#pragma omp simd reduction(+ : squares)
    for (int i = 0; i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
    float scale = 1 / sqrtf(squares / n + net.eps);
    for (int i = 0; i < n; i++) y[i] = (x[i] - mean) * scale * norm.weight[i];
    for (int i = 0; norm.bias && i < n; i++) y[i] += norm.bias[i];
  }
}

static void rotate(const Network& net, float* x, int heads) {  // (rows, heads, d)
  for (int i = 0, half = net.d / 2; i < net.rows * heads; i++, x += net.d)
    for (int c = 0; c < half; c++) {
      float cos = net.cos[i / heads * half + c], sin = net.sin[i / heads * half + c];
      float a = x[c], b = x[c + half];
      x[c] = a * cos - b * sin, x[c + half] = b * cos + a * sin;
    }
}

// The keys or values of a row and a head, slot by slot.
template <class T> struct Slots {
  T* data;
  const int* table;
  int size, heads, head, d;
  T* operator[](int j) const {
    return data + (((size_t)table[j / size] * heads + head) * size + j % size) * d;
  }
  // visit(j, its d numbers) for each of the first `length`, which are neighbours inside a block.
  template <class F> void each(int length, F visit) const {
    for (int begin = 0; begin < length; begin += size) {
      const T* at = (*this)[begin];
      for (int j = begin; j < std::min(begin + size, length); j++, at += d) visit(j, at);
    }
  }
};

// Equation 1, softmax(q K^T / sqrt(d)) V, for one query over `length` keys. D: d, if the compiler is to know
// it, so that q and y stay in registers; 0: any other.
template <int D, class T>
static void answer(const float* q, Slots<T> keys, Slots<T> values, int length, float* y) {
  static thread_local std::vector<float> memory;
  const int d = D ? D : keys.d;
  const float scale = 1 / sqrtf(d);
  float most = -INFINITY, total = 0, own[D + 1] = {}, *sum = D ? own : y;
  memory.resize(length);
  float* p = memory.data();
  keys.each(length, [&](int j, const T* key) {
    floats products = {};
    int c = 0;
    for (; c + LANES <= d; c += LANES) products += load<floats>(q + c) * floats_of(key + c);
    float score = add_up(products);
    for (; c < d; c++) score += q[c] * to_float(key[c]);
    p[j] = score * scale;
    most = p[j] > most ? p[j] : most;
  });
#pragma omp simd reduction(+ : total)
  for (int j = 0; j < length; j++) total += p[j] = exponential(p[j] - most);
  for (int c = 0; c < d; c++) sum[c] = 0;
  values.each(length, [&](int j, const T* value) {
    for (int c = 0; c < d; c++) sum[c] += p[j] * to_float(value[c]);
  });
  for (int c = 0; c < d; c++) y[c] = sum[c] / total;
}

// q, k or v of all rows; `stride` numbers from row to row.
struct Rows { float* data; size_t stride; };

// Each row's k and v go to its next slot in the cache, then its queries see all slots.
template <class T>
static void attend(const Network& net, const Block& block, Rows q, Rows k, Rows v, float* y) {
#pragma omp parallel for
  for (int i = 0; i < net.rows * net.kv_heads; i++) {
    int row = i / net.kv_heads, head = i % net.kv_heads, d = net.d, length = net.lengths[row];
    int queries = net.heads / net.kv_heads;  // that share a key
    const int* table = net.table + row * net.in_table;
    Slots<T> keys{(T*)block.K, table, net.size, net.kv_heads, head, d}, values = keys;
    values.data = (T*)block.V;
    for (int c = 0; c < d; c++) {
      store(keys[length][c], k.data[row * k.stride + head * d + c]);
      store(values[length][c], v.data[row * v.stride + head * d + c]);
    }
    for (int h = head * queries; h < (head + 1) * queries; h++) {
      float* to = y + ((size_t)row * net.heads + h) * d;
      (d == 64 ? answer<64, T> : d == 128 ? answer<128, T> : answer<0, T>)(
          q.data + row * q.stride + h * d, keys, values, length + 1, to);
    }
  }
}

// x (rows, width): of the embedding. logits (rows, vocabulary).
extern "C" void step(const Network* network, float* x, float* logits) {
  const Network& net = *network;
  const size_t rows = net.rows, q_size = net.heads * net.d, kv_size = net.kv_heads * net.d;
  const size_t all = q_size + 2 * kv_size;
  std::vector<float> a(rows * net.width), b(rows * all), y(rows * q_size), up(rows * net.ffn), gate(up);
  auto times = [&](const Layer& l, const std::vector<float>& from, float* to) {
    product(from.data(), rows, l.A, l.B, l.bits, l.bias, to);
  };
  auto add = [&](const std::vector<float>& y) { for (size_t i = 0; i < y.size(); i++) x[i] += y[i]; };

  for (const Block* block = net.blocks; block < net.blocks + net.count; block++) {
    normalize(net, block->norm1, x, a.data());
    times(block->in[0], a, b.data());
    Rows q{b.data(), all}, k{b.data() + q_size, all}, v{b.data() + q_size + kv_size, all};  // in one matrix
    if (block->in[1].A) {  // or in three
      q = {b.data(), q_size}, k = {b.data() + rows * q_size, kv_size}, v = {k.data + rows * kv_size, kv_size};
      times(block->in[1], a, k.data);
      times(block->in[2], a, v.data);
    }
    if (net.cos) rotate(net, q.data, net.heads), rotate(net, k.data, net.kv_heads);
    (net.float_cache ? attend<float> : attend<bfloat16>)(net, *block, q, k, v, y.data());
    times(block->o, y, a.data());
    add(a);
    normalize(net, block->norm2, x, a.data());
    times(block->up, a, up.data());
    if (block->gate.A) {
      times(block->gate, a, gate.data());
      for (size_t i = 0; i < up.size(); i++) up[i] *= gate[i] / (1 + exponential(-gate[i]));
    } else
      for (float& u : up) u /= 1 + exponential(-1.5957691216f * (u + 0.044715f * u * u * u));
    times(block->down, up, a.data());
    add(a);
  }
  normalize(net, net.norm, x, a.data());
  times(net.head, a, logits);
}
