// A whole step of decoding on a CPU: a token of each row through the model (Fig. 2, equations 1 to 3).
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
  int count, rows, width, heads, kv_heads, d, ffn, rank, size, in_table, float_cache;  // rank: the largest
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

static float silu(float x) { return x / (1 + exponential(-x)); }
static float gelu(float x) { return x / (1 + exponential(-1.5957691216f * (x + 0.044715f * x * x * x))); }

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

static void rotate(const Network& net, int row, float* x) {  // q or k of a head
  for (int c = 0, half = net.d / 2; net.cos && c < half; c++) {
    float cos = net.cos[row * half + c], sin = net.sin[row * half + c], a = x[c], b = x[c + half];
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
  // visit(j, its d numbers) for each of the first `length`, which are neighbours inside a block; `then`: what
  // is read next, and comes to the cache meanwhile.
  template <class F> void each(int length, Slots then, F visit) const {
    for (int begin = 0; begin < length; begin += size) {
      const T *at = (*this)[begin], *next = then[begin];
      for (int j = begin; j < std::min(begin + size, length); j++, at += d, next += d) {
        for (int c = 0; c < d; c += 64 / sizeof(T)) __builtin_prefetch(next + c);
        visit(j, at);
      }
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
  keys.each(length, values, [&](int j, const T* key) {
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
  keys.head++;  // while values are read, the next head's keys come to the cache
  values.each(length, keys, [&](int j, const T* value) {
    for (int c = 0; c < d; c++) sum[c] += p[j] * to_float(value[c]);
  });
  for (int c = 0; c < d; c++) y[c] = sum[c] / total;
}

// q, k or v of all rows; `stride` numbers from row to row.
struct Rows { float* data; size_t stride; };

// Each row's k and v go to its next slot in the cache, then its queries see all slots.
template <class T>
static void attend(const Network& net, const Block& block, Rows q, Rows k, Rows v, float* y) {
#pragma omp for
  for (int i = 0; i < net.rows * net.kv_heads; i++) {
    int row = i / net.kv_heads, head = i % net.kv_heads, d = net.d, length = net.lengths[row];
    int queries = net.heads / net.kv_heads;  // that share a key
    const int* table = net.table + row * net.in_table;
    Slots<T> keys{(T*)block.K, table, net.size, net.kv_heads, head, d}, values = keys;
    values.data = (T*)block.V;
    rotate(net, row, k.data + row * k.stride + head * d);
    for (int c = 0; c < d; c++) {
      store(keys[length][c], k.data[row * k.stride + head * d + c]);
      store(values[length][c], v.data[row * v.stride + head * d + c]);
    }
    for (int h = head * queries; h < (head + 1) * queries; h++) {
      float *query = q.data + row * q.stride + h * d, *to = y + ((size_t)row * net.heads + h) * d;
      rotate(net, row, query);
      auto one = d == 64 ? answer<64, T> : d == 128 ? answer<128, T> : answer<0, T>;
      one(query, keys, values, length + 1, to);
    }
  }
}

// embedded (rows, width), logits (rows, vocabulary). All threads walk through a step together and share rows
// of a matrix, and heads; what takes less time than to wait for each other, each computes for itself.
// A product ends with a barrier, and what it wrote is not written again before the next one's.
extern "C" void step(const Network* network, const float* embedded, float* logits) {
  const Network& net = *network;
  const size_t rows = net.rows, q_size = net.heads * net.d, kv_size = net.kv_heads * net.d;
  const size_t all = q_size + 2 * kv_size;
  std::vector<float> b(rows * all), y(rows * q_size), sum(rows * net.width), up(rows * net.ffn), gate(up);
  Shared shared{std::vector<Input>(rows), std::vector<float>(rows * net.rank)};
#pragma omp parallel
  {
    std::vector<float> x(embedded, embedded + rows * net.width), a(x), f(rows * net.ffn);
    auto times = [&](const Layer& l, const std::vector<float>& from, float* to) {
      product(from.data(), rows, l.A, l.B, l.bits, l.bias, to, shared);
    };
    auto add = [&] { for (size_t i = 0; i < x.size(); i++) x[i] += sum[i]; };

    for (const Block* block = net.blocks; block < net.blocks + net.count; block++) {
      normalize(net, block->norm1, x.data(), a.data());
      times(block->in[0], a, b.data());
      Rows q{b.data(), all}, k{b.data() + q_size, all}, v{b.data() + q_size + kv_size, all};  // in one matrix
      if (block->in[1].A) {  // or in three
        q = {b.data(), q_size}, k = {b.data() + rows * q_size, kv_size};
        v = {k.data + rows * kv_size, kv_size};
        times(block->in[1], a, k.data);
        times(block->in[2], a, v.data);
      }
      (net.float_cache ? attend<float> : attend<bfloat16>)(net, *block, q, k, v, y.data());
      times(block->o, y, sum.data());
      add();
      normalize(net, block->norm2, x.data(), a.data());
      times(block->up, a, up.data());
      if (block->gate.A) {
        times(block->gate, a, gate.data());
        for (size_t i = 0; i < f.size(); i++) f[i] = up[i] * silu(gate[i]);
      } else
        for (size_t i = 0; i < f.size(); i++) f[i] = gelu(up[i]);
      times(block->down, f, sum.data());
      add();
    }
    normalize(net, net.norm, x.data(), a.data());
    times(net.head, a, logits);
  }
}
