// Products on a CPU (sections V.B and V.C): W x and B (A x) with W in 4, 8, 16 or 32 bits.
//
// Decoding a token reads every weight once and multiplies it once, so the time is that of reading. For that:
//   - little work for a weight. Where W has integers, x is rounded to integers, too, of 16 bits, with a scale
//     for each 128 or fewer (better than float16): then 32 products and their sums are one instruction, or
//     64 of int4 with a byte of x, for which x is taken apart into its low and its high bytes (AVX-512 VNNI);
//   - four rows of W side by side, whose sums do not wait for each other, and prefetch (1.6 times as fast);
//   - what all rows of W share, divisions too, is computed once, and weights are unpacked for four rows of x;
//   - everything else where the numbers already are: the conversion of x, s and o, the bias, and for
//     y = B (A x) both products in one call, with one barrier of the threads after each;
//   - nothing waits for memory that can be asked for before: W, and the y that another thread has read.
// A row of y does not depend on the other rows of x, to the last bit: they are tiled, and never added.
// cpu_kernels.py compiles step_cpu.cpp, which includes this file, and calls it through ctypes.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include <omp.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

// W (rows, width): q in rows of row_bytes, s and o (rows, width / group) in float16, as in kernels.cu.
struct Matrix {
  const uint8_t* q;
  const _Float16 *scale, *offset;
  int rows, width, group, row_bytes;
};

static inline float as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline uint32_t bits_of(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

// ------------------------------------------------------------------------- a vector of weights at a time

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define AVX512
constexpr int BYTES = 64;  // of a vector
#elif defined(__AVX2__) && defined(__F16C__)
#define AVX2
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int LANES = BYTES / 4;
typedef float floats __attribute__((vector_size(BYTES)));
typedef int32_t ints __attribute__((vector_size(BYTES)));
typedef int16_t shorts __attribute__((vector_size(BYTES)));
typedef uint16_t ushorts __attribute__((vector_size(BYTES)));

template <class T> static inline T load(const void* from) { T v; memcpy(&v, from, sizeof(T)); return v; }

// What g++ does not find by itself; the loops say what the instructions do.

// sum + a b, of neighbours two by two: 16 bits each.
static inline ints dot(ints sum, ints a, ints b) {
#if defined(AVX512)
  return (ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(AVX2)
  return sum + (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  shorts c = (shorts)a, d = (shorts)b;
  for (int i = 0; i < LANES; i++) sum[i] += c[2 * i] * d[2 * i] + c[2 * i + 1] * d[2 * i + 1];
  return sum;
#endif
}

constexpr bool BYTEWISE = BYTES == 64;
// int4, a byte each, in a[0] and a[1], times x: its low bytes in b[0] and b[1], its high ones in the others.
static inline ints dot_bytes(const ints* a, const ints* b) {
#if defined(AVX512)
  auto plus = [](ints sum, ints a, ints b) {
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
  };
  ints low = plus(ints{}, a[0], b[0]), high = plus(ints{}, a[0], b[2]);
  return plus(low, a[1], b[1]) + (plus(high, a[1], b[3]) << 8);
#endif
}

static inline floats from_half(const _Float16* h) {
#if defined(AVX512)
  return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)h));
#elif defined(AVX2)
  return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)h));
#else
  floats f;
  for (int i = 0; i < LANES; i++) f[i] = (float)h[i];
  return f;
#endif
}

// Halves, then quarters, ... are added: one lane after the other would take four times as long.
static inline float add_up(floats v) {
#if defined(AVX512)
  return _mm512_reduce_add_ps((__m512)v);
#else
  for (int step = LANES / 2; step > 0; step /= 2)
    for (int i = 0; i < step; i++) v[i] += v[i + step];
  return v[0];
#endif
}

// A lane of a vector has 4 bytes of a row of W: 8 int4 in the order of quant.py's pack(), 4 int8, 2 bfloat16
// or a float. They are taken out in parts: integers by two, 16 bits each, or int4 by four, floats one by one.
// A chunk is as many weights as have one scale of x; int8 with one scale for the row can do with fewer.
template <int BITS, bool GROUPS> struct Format {
  static constexpr int in_lane = 32 / BITS, in_part = BITS > 8 ? 1 : 2, of_x = in_lane / in_part;
  static constexpr int of_vector = BITS == 4 && BYTEWISE ? 2 : of_x, vectors = BITS == 8 && !GROUPS ? 2 : 1;
  using number = std::conditional_t<BITS <= 8, int16_t, float>;  // of x
  static constexpr int bytes = vectors * BYTES, weights = vectors * LANES * in_lane;
};

template <int BITS> static inline ints part(ints lanes, int i) {
  if (BITS == 32) return lanes;
  if (BITS == 16) return i ? lanes & (int)0xffff0000 : lanes << 16;
  if (BITS == 8) return (ints)((i ? (shorts)lanes : (shorts)lanes << 8) >> 8);  // weights 0, 2; then 1, 3
  if (BYTEWISE) return (i ? lanes >> 4 : lanes) & 0x0f0f0f0f;                   // 0, 4, 1, 5; 2, 6, 3, 7
  return (ints)((ushorts)lanes >> 4 * i & (uint16_t)15);                        // 0, 1; 2, 3; ...: 0 to 15
}

// What all rows of W need of one x: its chunks in the order of the parts of W, as integers with a scale for
// each chunk if W has integers; and the sum over each group.
struct Input {
  std::vector<ints> x;
  std::vector<float> scale, sums, rounded;

  template <int BITS, bool GROUPS> void read(const float* from, int width, int group) {
    using F = Format<BITS, GROUPS>;
    constexpr int N = F::weights, S = F::of_x, X = F::vectors * S;
    int chunks = (width + N - 1) / N;
    x.resize((size_t)chunks * X), scale.resize(chunks), rounded.resize(chunks * N);
    sums.assign(width / group + LANES, 0);
    for (int c = 0; c < chunks; c++) {
      float v[N] = {};
      typename F::number numbers[N];
      memcpy(v, from + c * N, sizeof(float) * std::min(N, width - c * N));
      scale[c] = round(v, numbers, N);
      for (int i = 0; i < N; i++) rounded[c * N + i] = scale[c] * numbers[i];
      for (int i = 1; i < N && BITS == 8; i += 4) std::swap(numbers[i], numbers[i + 1]);  // 0, 2, 1, 3
      int words[LANES * X];  // a float each, or two integers
      memcpy(words, numbers, sizeof words);
      ints* to = &x[c * X];
      for (int i = 0; i < X; i++)
        for (int lane = 0; lane < LANES; lane++) to[i][lane] = words[(i / S * LANES + lane) * S + i % S];
      for (int i = 0; i < 2 && BITS == 4 && BYTEWISE; i++) {
        shorts a = (shorts)to[i], b = (shorts)to[i + 2];  // of a lane 0, 1 and 4, 5; then 2, 3 and 6, 7
        to[i] = (ints)(a & 255 | b << 8);                 // the low bytes of 0, 4, 1, 5
        to[i + 2] = (ints)((a + 128) >> 8 & 255 | (b + 128) & (int16_t)0xff00);  // and the high ones
      }
    }
    for (int g = 0; g < width / group && BITS <= 8; g++) {
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int i = 0; i < group; i++) sum += rounded[g * group + i];
      sums[g] = sum;
    }
  }

  // To integers of at most 32767 - 128. Returns their scale; NaN where a number is not finite.
  static float round(const float* v, int16_t* to, int n) {
    uint32_t most = 0;  // floats without a sign are in order as integers; infinity and NaN are the largest
    for (int i = 0; i < n; i++) most = std::max(most, bits_of(v[i]) & 0x7fffffff);
    float largest = as_float(most), inverse = largest > 1e-30f ? 32639 / largest : 0;
    bool finite = largest - largest == 0;
    for (int i = 0; i < n; i++) to[i] = finite ? (int)rintf(v[i] * inverse) : 0;
    return finite ? largest / 32639 : NAN;
  }

  static float round(const float* v, float* to, int n) { return memcpy(to, v, n * sizeof *v), 1; }
};

// Rows of W side by side; bytes between a read and its prefetch; rows of x that each thread reads for itself.
constexpr int ROWS = 4, AHEAD = 6144, FEW = 4;

// What all rows of W have in common. Its divisions would take as long as a short row.
struct Plan {
  int groups, chunks, next;
  int span;  // chunks whose scales, one a group, fill a vector
  float groups_in_lane;
};

// y[m rows + r] = row n + r of W times row m of x, and the bias. GROUPS: W has several scales in a row.
// Where the last chunk ends beyond the row x is 0; cpu_kernels.py keeps reads inside its memory.
template <int BITS, bool GROUPS, int M> __attribute__((always_inline))
static inline void multiply(const Matrix& W, const Plan& plan, int n, const Input* in, const float* bias,
                            float* y) {
  using F = Format<BITS, GROUPS>;
  constexpr int P = F::vectors * F::of_vector, X = F::vectors * F::of_x;
  const uint8_t* q[ROWS];
  const _Float16 *scale[ROWS], *offset[ROWS];
  const ints* x[M];
  floats sum[ROWS][M] = {}, s[ROWS], first_lane;
  for (int i = 0; i < LANES; i++) first_lane[i] = i + 0.5f;
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
    size_t row = std::min(n + r, W.rows - 1);
    q[r] = W.q + row * W.row_bytes;
    scale[r] = W.scale + row * plan.groups, offset[r] = W.offset + row * plan.groups;
  }
  for (int m = 0; m < M; m++) x[m] = in[m].x.data();

  for (int begin = 0, group_begin = 0; begin < plan.chunks; begin += plan.span, group_begin += LANES) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS && GROUPS; r++) {
      s[r] = from_half(scale[r] + group_begin);
      floats o = from_half(offset[r] + group_begin) - (BITS == 4 ? 8.0f : 0.0f) * s[r];
      for (int m = 0; m < M; m++) sum[r][m] += o * load<floats>(&in[m].sums[group_begin]);
    }
    floats lane = first_lane;
    for (int c = begin; c < std::min(begin + plan.span, plan.chunks); c++, lane += LANES) {
      ints group = __builtin_convertvector(lane * plan.groups_in_lane, ints);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        const uint8_t* at = q[r] + c * F::bytes;
        ints w[P];
        for (int i = 0; i < F::bytes; i += BYTES) __builtin_prefetch(at + plan.next + i);
        for (int i = 0; i < P; i++)
          w[i] = part<BITS>(load<ints>(at + i / F::of_vector * BYTES), i % F::of_vector);
        floats of_lane = GROUPS ? __builtin_shuffle(s[r], group) : floats{} + 1;
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
          if constexpr (BITS > 8) {
            for (int i = 0; i < P; i++) sum[r][m] += (floats)w[i] * (floats)x[m][c * X + i];
          } else {
            ints d = {};
            for (int i = 0; i < X; i++)
              if (P == X) d = dot(d, w[i], x[m][c * X + i]);
            if (P < X) d = dot_bytes(w, x[m] + c * X);  // int4, BYTEWISE: two vectors of W, four of x
            floats both = GROUPS ? of_lane * in[m].scale[c] : floats{} + in[m].scale[c];
            sum[r][m] += __builtin_convertvector(d, floats) * both;
          }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      float total = add_up(sum[r][m]);
      if (BITS <= 8 && !GROUPS) {
        float s = scale[r][0], o = (float)offset[r][0] - (BITS == 4 ? 8 : 0) * s;
        total = total * s + o * in[m].sums[0];
      }
      if (n + r < W.rows) y[(size_t)m * W.rows + r] = total + (bias ? bias[n + r] : 0);
    }
}

// What the threads of a product share: x, if it has many rows, which they read together; and A x.
struct Shared { std::vector<Input> in; std::vector<float> h; };

// This thread's share of y (M, rows) = x W^T + bias: tiles of four rows of W by four of x, or by one.
template <int BITS, bool GROUPS>
static void share(const float* x, int M, const Matrix& W, const float* bias, float* y, Shared& shared) {
  constexpr int BLOCK = 64;  // rows of x that stay in the cache for all rows of W
  static thread_local std::vector<Input> own(FEW);
  const bool few = M <= FEW;  // rows, which each thread reads for itself: that is quicker than to wait
  auto& in = few ? own : shared.in;
  long thread = omp_get_thread_num(), threads = omp_get_num_threads(), tiles = (W.rows + 3) / 4;
  for (int m = few ? 0 : thread; m < M; m += few ? 1 : threads)
    in[m].read<BITS, GROUPS>(x + (size_t)m * W.width, W.width, W.group);
  if (!few) {
#pragma omp barrier
  }
  int first = tiles * thread / threads * 4, last = std::min<int>(tiles * (thread + 1) / threads * 4, W.rows);
  const int in_lane = Format<BITS, GROUPS>::in_lane, weights = Format<BITS, GROUPS>::weights;
  const int chunks = (W.width + weights - 1) / weights, tile = ROWS * W.row_bytes;
  const Plan plan{W.width / W.group, chunks, (AHEAD / tile + 1) * tile, GROUPS ? W.group / in_lane : chunks,
                  (float)in_lane / W.group};
  for (int block = 0; block < M; block += BLOCK)
    for (int n = first; n < last; n += 4)
      for (int m = block, count; m < std::min(block + BLOCK, M); m += count) {
        float* to = y + (size_t)m * W.rows + n;
        __builtin_prefetch(to + 64, 1);  // to be written
        count = M - m < 4 ? 1 : 4;
        if (count == 4) multiply<BITS, GROUPS, 4>(W, plan, n, &in[m], bias, to);
        else multiply<BITS, GROUPS, 1>(W, plan, n, &in[m], bias, to);
      }
}

template <int BITS>
static void product(const float* x, int M, const Matrix& W, const float* bias, float* y, Shared& shared) {
  (W.group < W.width ? share<BITS, true> : share<BITS, false>)(x, M, W, bias, y, shared);
#pragma omp barrier
}

// y (M, rows) = x W^T + bias, W = A, or B A if B is not null; bias may be null. All threads call it.
static void product(const float* x, int M, const Matrix* A, const Matrix* B, int bits, const float* bias,
                    float* y, Shared& shared) {
  auto times = bits == 4 ? product<4> : bits == 8 ? product<8> : bits == 16 ? product<16> : product<32>;
  if (!B) return times(x, M, *A, bias, y, shared);
  times(x, M, *A, nullptr, shared.h.data(), shared);
  times(shared.h.data(), M, *B, bias, y, shared);
}

extern "C" void product(const float* x, int M, const Matrix* A, const Matrix* B, int bits, const float* bias,
                        float* y) {
  static thread_local Shared memory;
  Shared& shared = memory;  // of the thread that calls
  shared.in.resize(M > FEW ? M : 0), shared.h.resize(B ? (size_t)M * A->rows : 0);
#pragma omp parallel
  product(x, M, A, B, bits, bias, y, shared);
}
