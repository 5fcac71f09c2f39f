// The products of quant.py for a few rows of x on a CPU: y = W x and y = B (A x) with int8 or int4 weights (section V.B).
//
// Decoding a token reads every weight once and multiplies it once, so the time is that of reading. What it takes to read as fast as the
// memory can: vectors of 16 weights, four rows of W side by side (their sums do not wait for each other), and asking for the rows to come
// ahead of time (prefetch; 1.5 times as fast here). Everything else happens where the numbers already are: the conversion of x, s and o, the bias, and
// for y = B (A x) both products in one go, with one barrier of the threads between them.
//
// quant.py compiles this file with g++ in a second, at the first use, and calls it through ctypes. Without a compiler torch's products take over.
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
static float to_float(float v) { return v; }
static float to_float(bfloat16 v) {
  uint32_t u = (uint32_t)v.bits << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static void store(float& to, float v) { to = v; }
static void store(bfloat16& to, float v) {
  uint32_t u;
  memcpy(&u, &v, 4);
  to.bits = v != v ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;  // to the nearest, ties to even
}

// ---------------------------------------------------------------------------- 64 weights at a time

constexpr int CHUNK = 64;
typedef float floats __attribute__((vector_size(64), aligned(4)));  // 16 numbers, anywhere in memory

// Weights 16 j .. 16 j + 15 of a chunk, as float; of int4, bits 4 j .. 4 j + 3 of its 16 half-words, looked up in a table of the 16 numbers.
template <int BITS> static inline floats weights(const uint8_t* q, int j) {
#ifdef __AVX512BW__  // g++ does not find these instructions by itself
  if (BITS == 8) return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)q + j)));
  __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)q));
  const __m512 numbers = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return (floats)_mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * j), numbers);  // it looks at the lowest four bits
#else
  floats w;
  for (int i = 0; i < 16; i++) w[i] = BITS == 8 ? (int8_t)q[16 * j + i] : (q[2 * i + j / 2] >> 4 * (j % 2) & 15) - 8;
  return w;
#endif
}

// sum[r][m] += 64 weights of row r times 64 numbers of row m of x, in 16 parts each. A weight is turned into a float once for all M rows of x,
// which lie in the order of `arrange`.
template <int BITS, int ROWS, int M> static inline void chunk(const uint8_t* const* q, size_t byte, const float* const* x, size_t k, floats (*sum)[M]) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      floats w = weights<BITS>(q[r] + byte, j);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) sum[r][m] += ((const floats*)(x[m] + k))[j] * w;
    }
}

// The place in a chunk of the weight that meets x[at]: int4 are taken out of 16 half-words, four bits of each in turn (quant.py's pack()).
template <int BITS> static int place(int at) { return BITS == 8 ? at : 8 * (at % 16 / 2) + 2 * (at / 16) + at % 2; }

// What all rows of W need of one x: its numbers in the order of the chunks, with zeros at the end, and its sum over each group.
struct Input {
  std::vector<float> x, sums;
  template <int BITS, class T> void arrange(const T* from, int width, int group) {
    int chunks = (width + CHUNK - 1) / CHUNK;
    x.assign((size_t)chunks * CHUNK, 0);
    sums.assign(width / group, 0);
    for (int i = 0; i < chunks * CHUNK; i++) {
      int k = i / CHUNK * CHUNK + place<BITS>(i % CHUNK);
      if (k < width) x[i] = to_float(from[k]);
    }
    for (int k = 0; k < width; k++) sums[k / group] += to_float(from[k]);
  }
};

static float add_up(floats v) {
  float sum = 0;
  for (int i = 0; i < 16; i++) sum += v[i];
  return sum;
}

// y[m][r] = row n + r of W times row m of x. A group is a multiple of 64, or the whole row.
template <int BITS, int ROWS, int M> static void multiply(const Matrix& W, int n, const Input* in, float (*y)[4]) {
  constexpr int CHUNK_BYTES = CHUNK * BITS / 8, AHEAD = 4096;
  int groups = W.width / W.group, whole = W.width / CHUNK, in_group = W.group / CHUNK;  // chunks
  const uint8_t* q[ROWS];
  const _Float16* s[ROWS];
  const float* x[M];
  floats sum[ROWS][M] = {};
  for (int r = 0; r < ROWS; r++) q[r] = W.q + (size_t)(n + r) * W.row_bytes, s[r] = W.scale + (size_t)(n + r) * groups;
  for (int m = 0; m < M; m++) x[m] = in[m].x.data();
  int next = (AHEAD / (ROWS * W.row_bytes) + 1) * ROWS * W.row_bytes;  // the rows after next, or further where rows are short
  for (int g = 0; g < groups; g++) {
    floats of_group[ROWS][M] = {};
    for (int c = g * in_group; c < (g + 1) * in_group; c++) {
      for (int r = 0; r < ROWS; r++) __builtin_prefetch(q[r] + c * CHUNK_BYTES + next);
      chunk<BITS, ROWS, M>(q, c * CHUNK_BYTES, x, c * CHUNK, of_group);
    }
    if (W.width % CHUNK) {  // the last numbers of a whole row
      uint8_t rest[ROWS][CHUNK] = {};
      const uint8_t* rows[ROWS];
      for (int r = 0; r < ROWS; r++) rows[r] = rest[r], memcpy(rest[r], q[r] + whole * CHUNK_BYTES, W.row_bytes - whole * CHUNK_BYTES);
      chunk<BITS, ROWS, M>(rows, 0, x, whole * CHUNK, of_group);
    }
    for (int r = 0; r < ROWS; r++)
      for (int m = 0; m < M; m++) sum[r][m] += (float)s[r][g] * of_group[r][m];
  }
  for (int r = 0; r < ROWS; r++) {
    const _Float16* o = W.offset + (size_t)(n + r) * groups;
    for (int m = 0; m < M; m++) {
      y[m][r] = add_up(sum[r][m]);
      for (int g = 0; g < groups; g++) y[m][r] += (float)o[g] * in[m].sums[g];
    }
  }
}

// This thread's share of y (M, rows) = x W^T + bias: four rows of W by four rows of x at a time, then what is left.
template <int BITS, class T, class Y> static void share(const Matrix& W, const std::vector<Input>& in, const T* bias, Y* y) {
  int thread = omp_get_thread_num(), threads = omp_get_num_threads(), fours = (W.rows + 3) / 4, M = in.size();
  int first = (long)fours * thread / threads * 4, last = (long)fours * (thread + 1) / threads * 4;
  for (int n = first; n < last && n < W.rows; n += 4)
    for (int m = 0, count; m < M; m += count) {  // the four rows of W stay in the cache for all rows of x
      float sum[4][4];
      int rows = W.rows - n < 4 ? 1 : 4;
      count = M - m < 4 ? 1 : 4;
      for (int r = 0; r < 4 && n + r < W.rows; r += rows) {
        if (rows == 4) (count == 4 ? multiply<BITS, 4, 4> : multiply<BITS, 4, 1>)(W, n, &in[m], sum);
        else (count == 4 ? multiply<BITS, 1, 4> : multiply<BITS, 1, 1>)(W, n + r, &in[m], sum);
        for (int i = 0; i < count; i++)
          for (int j = 0; j < rows; j++) store(y[(size_t)(m + i) * W.rows + n + r + j], sum[i][j] + (bias ? to_float(bias[n + r + j]) : 0));
      }
    }
}

template <int BITS, class T> static void run(const T* x, int M, const Matrix* A, const Matrix* B, const T* bias, T* y) {
  static thread_local std::vector<Input> in, middle;
  static thread_local std::vector<float> h;
  in.resize(M);
  for (int m = 0; m < M; m++) in[m].arrange<BITS>(x + (size_t)m * A->width, A->width, A->group);
  if (B) middle.resize(M), h.resize((size_t)M * A->rows);
  auto &inputs = in, &inner = middle;  // the vectors of the thread that calls, for all threads
  auto* hidden = h.data();
#pragma omp parallel
  {
    if (!B) share<BITS>(*A, inputs, bias, y);
    else {
      share<BITS>(*A, inputs, (const T*)nullptr, hidden);
#pragma omp barrier
#pragma omp single
      for (int m = 0; m < M; m++) inner[m].template arrange<BITS>(hidden + (size_t)m * A->rows, B->width, B->group);
      share<BITS>(*B, inner, bias, y);
    }
  }
}

// y (M, rows) = x W^T + bias with W = A, or B A where B is not null. x, bias (or null) and y are all float32, or all bfloat16.
extern "C" void product(const void* x, int M, const Matrix* A, const Matrix* B, int bits, int is_float, const void* bias, void* y) {
  if (is_float) (bits == 8 ? run<8, float> : run<4, float>)((const float*)x, M, A, B, (const float*)bias, (float*)y);
  else (bits == 8 ? run<8, bfloat16> : run<4, bfloat16>)((const bfloat16*)x, M, A, B, (const bfloat16*)bias, (bfloat16*)y);
}
