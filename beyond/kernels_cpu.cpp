// Decoding on a CPU (sections V.B and V.C): W x and B (A x) with int8 or int4 weights, and a whole step.
//
// Decoding a token reads every weight once and multiplies it once, so the time is that of reading. For that:
//   - little work for a weight. x is rounded to integers, too, of 16 bits, with a scale for each 64 (that is
//     better than bfloat16): then 32 products of integers and their sums are one or two instructions;
//   - four rows of W side by side, whose sums do not wait for each other, and prefetch (1.6 times as fast);
//   - everything else where the numbers already are: the conversion of x, s and o, the bias, and for
//     y = B (A x) both products in one call, with one barrier of the threads between them.
//
// cpu_kernels.py compiles this file at the first use and calls it through ctypes; cpu_step.py calls `step`.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>
#include <omp.h>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

// W (rows, width): q in rows of row_bytes, s and o (rows, width / group) in float16, as in kernels.cu.
struct Matrix {
  const uint8_t* q;
  const _Float16 *scale, *offset;
  int rows, width, group, row_bytes;
};

struct bfloat16 { uint16_t bits; };
static inline float as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline uint32_t bits_of(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }
static inline float to_float(float v) { return v; }
static inline float to_float(bfloat16 v) { return as_float((uint32_t)v.bits << 16); }
static inline void store(float& to, float v) { to = v; }
static inline void store(bfloat16& to, float v) {  // to the nearest, ties to even
  uint32_t u = bits_of(v);
  to.bits = v != v ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

// ---------------------------------------------------------------------------- 64 weights at a time

constexpr int CHUNK = 64;
typedef float floats __attribute__((vector_size(64)));                // 16 numbers
typedef int32_t ints __attribute__((vector_size(64)));
typedef int16_t shorts __attribute__((vector_size(64), aligned(2)));  // 32, anywhere in memory

// Half j (0 or 1) of a chunk of W. g++ does not find these instructions; the loop below says what they do.
template <int BITS> static inline shorts weights(const uint8_t* q, int j) {
#ifdef __AVX512BW__
  if (BITS == 8) return (shorts)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)q + j));
  __m512i words = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)q));  // 8 words, twice
  const __m512i shift = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4);
  words = _mm512_srlv_epi32(words, _mm512_add_epi32(shift, _mm512_set1_epi32(8 * j)));
  words = _mm512_and_si512(words, _mm512_set1_epi32(0x000f000f));
  return (shorts)_mm512_sub_epi16(words, _mm512_set1_epi16(8));
#else
  shorts w;
  for (int i = 0; i < 32; i++)
    w[i] = BITS == 8 ? (int8_t)q[32 * j + i] : (q[i / 2 % 8 * 4 + i % 2 * 2 + j] >> i / 16 * 4 & 15) - 8;
  return w;
#endif
}

// The position in a chunk of weight i of these: int4 are taken out of words as in quant.py's pack().
template <int BITS> static constexpr int position(int i) {
  return BITS == 8 ? i : 8 * (i % 16 / 2) + 2 * (i / 16) + i % 2;
}

// sum + a b, of neighbours two by two.
static inline ints dot(ints sum, shorts a, shorts b) {
#ifdef __AVX512VNNI__
  return (ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
  for (int i = 0; i < 16; i++) sum[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sum;
#endif
}

static inline float add_up(floats v) {
  float sum = 0;
  for (int i = 0; i < 16; i++) sum += v[i];
  return sum;
}

// What all rows of W need of one x: its chunks as integers in the order of the weights, their scales, and the
// sum of x over each group.
struct Input {
  std::vector<int16_t> x;
  std::vector<float> scale, sums;

  template <int BITS> void round(const float* from, int width, int group) {
    int chunks = (width + CHUNK - 1) / CHUNK;
    x.resize((size_t)chunks * CHUNK), scale.resize(chunks), sums.assign(width / group, 0);
    for (int c = 0; c < chunks; c++) {
      float v[CHUNK] = {};
      memcpy(v, from + c * CHUNK, sizeof(float) * std::min(CHUNK, width - c * CHUNK));
      uint32_t most = 0;  // floats without a sign are in order as integers; infinity and NaN are the largest
      for (int i = 0; i < CHUNK; i++) most = std::max(most, bits_of(v[i]) & 0x7fffffff);
      float largest = as_float(most), inverse = largest > 0 ? 32767 / largest : 0;
      int sum = 0;
      for (int i = 0; i < CHUNK; i++) x[c * CHUNK + i] = (int)rintf(v[position<BITS>(i)] * inverse);
      for (int i = 0; i < CHUNK; i++) sum += x[c * CHUNK + i];
      scale[c] = largest - largest == 0 ? largest / 32767 : NAN;
      sums[c * CHUNK / group] += scale[c] * sum;
    }
  }
};

// y[m][r] = row n + r of W (or the last one) times row m of x. A group is a multiple of 64, or the whole row,
// whose last chunk may end beyond it: there x is 0, and cpu_kernels.py keeps what is read inside its memory.
template <int BITS, int M>
static void multiply(const Matrix& W, int n, const Input* in, float (*y)[4]) {
  constexpr int BYTES = CHUNK * BITS / 8, AHEAD = 4096, ROWS = 4;
  const int groups = W.width / W.group, in_group = (W.group + CHUNK - 1) / CHUNK;
  const int next = (AHEAD / (ROWS * W.row_bytes) + 1) * ROWS * W.row_bytes;  // some rows ahead
  const uint8_t* q[ROWS];
  const shorts* x[M];
  floats sum[ROWS][M] = {}, of_group[ROWS][M];
  size_t row[ROWS];
  for (int r = 0; r < ROWS; r++) row[r] = std::min(n + r, W.rows - 1), q[r] = W.q + row[r] * W.row_bytes;
  for (int m = 0; m < M; m++) x[m] = (const shorts*)in[m].x.data();

  for (int g = 0; g < groups; g++) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS * M; i++) of_group[i / M][i % M] = floats{};
    for (int c = g * in_group; c < (g + 1) * in_group; c++) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        const uint8_t* at = q[r] + c * BYTES;
        __builtin_prefetch(at + next);
        shorts w[2] = {weights<BITS>(at, 0), weights<BITS>(at, 1)};
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
          ints sum = dot(dot(ints{}, w[0], x[m][2 * c]), w[1], x[m][2 * c + 1]);
          of_group[r][m] += __builtin_convertvector(sum, floats) * in[m].scale[c];
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) sum[r][m] += of_group[r][m] * (float)W.scale[row[r] * groups + g];
  }
  for (int r = 0; r < ROWS; r++)
    for (int m = 0; m < M; m++) {
      const _Float16* o = W.offset + row[r] * groups;
      y[m][r] = add_up(sum[r][m]);
      for (int g = 0; g < groups; g++) y[m][r] += (float)o[g] * in[m].sums[g];
    }
}

// This thread's share of y (M, rows) = x W^T + bias: four rows of W by four of x at a time, or by one.
template <int BITS>
static void share(const Matrix& W, const std::vector<Input>& in, const float* bias, float* y) {
  int thread = omp_get_thread_num(), threads = omp_get_num_threads(), fours = (W.rows + 3) / 4, M = in.size();
  int first = (long)fours * thread / threads * 4, last = (long)fours * (thread + 1) / threads * 4;
  for (int n = first; n < last && n < W.rows; n += 4)
    for (int m = 0, count; m < M; m += count) {  // the four rows of W stay in the cache for all rows of x
      float sum[4][4];
      count = M - m < 4 ? 1 : 4;
      (count == 4 ? multiply<BITS, 4> : multiply<BITS, 1>)(W, n, &in[m], sum);
      for (int i = 0; i < count; i++)
        for (int r = 0; r < 4 && n + r < W.rows; r++)
          y[(size_t)(m + i) * W.rows + n + r] = sum[i][r] + (bias ? bias[n + r] : 0);
    }
}

template <int BITS>
static void run(const float* x, int M, const Matrix* A, const Matrix* B, const float* bias, float* y) {
  static thread_local std::vector<Input> in, middle;
  static thread_local std::vector<float> h;
  auto round = [&](std::vector<Input>& to, const float* from, const Matrix* W) {
    to.resize(M);
    for (int m = 0; m < M; m++) to[m].round<BITS>(from + (size_t)m * W->width, W->width, W->group);
  };
  round(in, x, A);
  if (B) h.resize((size_t)M * A->rows);
  auto& inputs = in;  // the vectors of the thread that calls, for all threads
  float* hidden = h.data();
#pragma omp parallel
  if (B) {
    share<BITS>(*A, inputs, nullptr, hidden);
#pragma omp barrier
    round(middle, hidden, B);  // every thread for itself: that is quicker than waiting for one that does it
    share<BITS>(*B, middle, bias, y);
  } else
    share<BITS>(*A, inputs, bias, y);
}

// y (M, rows) = x W^T + bias, W = A, or B A if B is not null; bias may be null.
extern "C" void product(const float* x, int M, const Matrix* A, const Matrix* B, int bits, const float* bias,
                        float* y) {
  (bits == 8 ? run<8> : run<4>)(x, M, A, B, bias, y);
}

// ------------------------------------------- a whole step: one token of each row through all blocks (Fig. 2)

struct Norm { const float *weight, *bias; };  // no bias: RMSNorm
struct Layer { const Matrix *A, *B; const float* bias; int bits; };  // B (A x) + bias; no B: A x + bias
struct Block {
  Norm norm1, norm2;
  Layer in[3], o, gate, up, down;  // in: q, k, v, or all of them in one; no gate: GELU
  void *K, *V;                     // the cache: (rows, kv_heads, capacity, d)
};
struct Network {
  const Block* blocks;
  const int* lengths;     // (rows): slots of the cache that are taken
  const float *cos, *sin; // (rows, d / 2): RoPE, or null
  int count, rows, width, heads, kv_heads, d, ffn, capacity, float_cache;
  float eps;
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
    for (int i = 0; norm.bias && i < n; i++) mean += x[i];
    mean /= n;
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

// Equation 1 for one query: y = softmax(q K^T / sqrt(d)) V over `length` keys.
template <class T>
static void answer(const float* q, const T* keys, const T* values, int length, int d, float* y) {
  static thread_local std::vector<float> memory;
  memory.resize(length);
  float *p = memory.data(), most = -INFINITY, total = 0;
  for (int j = 0; j < length; j++, keys += d) {
    float score = 0;
    for (int c = 0; c < d; c++) score += q[c] * to_float(keys[c]);
    p[j] = score / sqrtf(d);
    most = p[j] > most ? p[j] : most;
  }
  for (int j = 0; j < length; j++) total += p[j] = exponential(p[j] - most);
  for (int c = 0; c < d; c++) y[c] = 0;
  for (int j = 0; j < length; j++, values += d)
    for (int c = 0; c < d; c++) y[c] += p[j] / total * to_float(values[c]);
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
    T* keys = (T*)block.K + (size_t)i * net.capacity * d;
    T* values = (T*)block.V + (size_t)i * net.capacity * d;
    for (int c = 0; c < d; c++) {
      store(keys[(size_t)length * d + c], k.data[row * k.stride + head * d + c]);
      store(values[(size_t)length * d + c], v.data[row * v.stride + head * d + c]);
    }
    for (int h = head * queries; h < (head + 1) * queries; h++) {
      float* to = y + ((size_t)row * net.heads + h) * d;
      answer(q.data + row * q.stride + h * d, keys, values, length + 1, d, to);
    }
  }
}

// x (rows, width): from the embedding to what the last norm reads.
extern "C" void step(const Network* network, float* x) {
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
}
