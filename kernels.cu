// The products of quant.py on a GPU: int8 and int4 weights, with s and o of each vector (section V.B).
//
// Read it from the top: the product is computed first by the plainest kernel that is right, then by faster
// ones, each with the reason why. tests/test_kernels.py runs all on a CPU, in a debugger too (cuda_on_cpu.h).
//
//   1. the format, and reading one weight of it
//   2. dequantize                            q, s, o -> W
//   3. y = x W^T for any number of rows      one thread a number of y; then one warp a row of W
//   4. y = x W^T for up to 16 rows of x      tensor cores fed from registers; limited by reading W once
//   5. y = B (A x) in one launch, and y = W x + scale B (A x)
//   6. y = x W^T for more rows               tensor cores fed from shared memory, copied ahead (cp.async)
//   7. g W, the gradient of x
//   8. what beyond/gpu_kernels.py calls
//
// Names: x (M, K), W (N, K), y (M, N) row by row; M rows of x (tokens), K the input's width, N the output's.
// T is the type of x and y: bfloat16 or half. Every sum is kept in float.
#ifdef CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <algorithm>
#include <cstdint>
#include <type_traits>

// The few instructions that C++ has no operator for; tests/cuda_on_cpu.h has each of them in plain C++.

// d += a b for a tile of 16 x 8 numbers and a depth of 16, spread over the registers of a warp (see part 4).
#define DEFINE_MMA(T, NAME)                                                                      \
  __device__ inline void mma(float* d, const uint32_t* a, const uint32_t* b, T) {                \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 "                  \
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                         \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));            \
  }
DEFINE_MMA(__nv_bfloat16, "bf16")
DEFINE_MMA(__half, "f16")
// Start copying 16 bytes to shared memory, zeros if !valid; copy_wait waits for all but the last N groups.
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
  auto to = (uint32_t)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0));
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;"); }
template <int N> __device__ inline void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N)); }

// (a & b) | c as one instruction, also where b and c are constants.
__device__ inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// a + b of two bfloat16 in a register.
__device__ inline uint32_t plus(uint32_t a, uint32_t b) {
  auto sum = __hadd2(reinterpret_cast<__nv_bfloat162&>(a), reinterpret_cast<__nv_bfloat162&>(b));
  return reinterpret_cast<uint32_t&>(sum);
}

template <class... P, class... Args>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t stream, Args... args) {
  if (grid.x == 0 || grid.y == 0) return;
  kernel<<<grid, block, 0, stream>>>(args...);
}
#endif

__host__ __device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
template <class T> __device__ T from_float(float v);
template <> __device__ inline float from_float(float v) { return v; }
template <> __device__ inline __half from_float(float v) { return __float2half(v); }
template <> __device__ inline __nv_bfloat16 from_float(float v) { return __float2bfloat16(v); }

// ============================================================================ 1. the format

// W (rows, width): q in rows of row_bytes, a multiple of 16 (quant.py's pack); s and o (rows, width / group).
struct Matrix {
  const uint8_t* q;
  const __half* scale;
  const __half* offset;
  int rows, width, group, row_bytes;
};

template <int BITS> constexpr int IN_WORD = 32 / BITS;  // weights in a 32-bit word

// Weight k of a word: a byte, or four bits (the even weights are in the lower half of the word).
template <int BITS> __device__ int integer(uint32_t word, int k) {
  if (BITS == 8) return (int8_t)(word >> 8 * k);
  return (int)(word >> (16 * (k & 1) + 4 * (k >> 1)) & 15) - 8;
}

template <int BITS> __device__ uint32_t word_of(const Matrix& W, int row, int k) {
  return ((const uint32_t*)(W.q + (size_t)row * W.row_bytes))[k / IN_WORD<BITS>];
}

__device__ inline float of_vector(const __half* values, const Matrix& W, int row, int k) {
  return __half2float(values[(size_t)row * (W.width / W.group) + k / W.group]);
}
__device__ inline float scale_of(const Matrix& W, int row, int k) { return of_vector(W.scale, W, row, k); }
__device__ inline float offset_of(const Matrix& W, int row, int k) { return of_vector(W.offset, W, row, k); }
template <int BITS> __device__ float weight_of(const Matrix& W, int row, int k, uint32_t word) {  // s q + o
  return scale_of(W, row, k) * integer<BITS>(word, k % IN_WORD<BITS>) + offset_of(W, row, k);
}

// ============================================================================ 2. dequantize

// A thread to each word, which is read once (s and o too, in one vector); its weights are written at once.
template <class T, int BITS> __global__ void dequantize(Matrix W, T* out) {
  constexpr int n = IN_WORD<BITS>;
  int k = (blockIdx.y * blockDim.x + threadIdx.x) * n, row = blockIdx.x;
  if (k >= W.width) return;
  uint32_t word = word_of<BITS>(W, row, k);
  struct alignas(n * sizeof(T) > 16 ? 16 : n * sizeof(T)) { T value[n]; } values;
  float s, o;
  for (int j = 0; j < n && k + j < W.width; j++) {
    if (j == 0 || W.group % n) s = scale_of(W, row, k + j), o = offset_of(W, row, k + j);
    values.value[j] = from_float<T>(s * integer<BITS>(word, j) + o);
  }
  T* to = out + (size_t)row * W.width + k;
  if (W.width % n == 0) *(decltype(values)*)to = values;
  else for (int j = 0; j < n && k + j < W.width; j++) to[j] = values.value[j];
}

// ============================================================================ 3. y = x W^T, plainly

// Naive: a thread to each number of y. The threads of a warp walk along 32 rows of W, in 32 lines of memory.
template <class T, int BITS> __global__ void product_naive(const T* x, Matrix W, T* y) {
  int n = blockIdx.x * blockDim.x + threadIdx.x, m = blockIdx.y;
  if (n >= W.rows) return;
  float sum = 0;
  for (int k = 0; k < W.width; k++)
    sum += to_float(x[(size_t)m * W.width + k]) * weight_of<BITS>(W, n, k, word_of<BITS>(W, n, k));
  y[(size_t)m * W.rows + n] = from_float<T>(sum);
}

// A warp to each row of W, which reads a line of memory at a time and unpacks a weight once for 16 rows of x.
template <class T, int BITS> __global__ void product_warp(const T* x, int M, Matrix W, T* y) {
  int n = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32, first = blockIdx.y * 16;
  if (n >= W.rows) return;  // a whole warp leaves
  float sum[16] = {};
  for (int k = lane * IN_WORD<BITS>; k < W.width; k += 32 * IN_WORD<BITS>) {
    uint32_t word = word_of<BITS>(W, n, k);
    for (int j = 0; j < IN_WORD<BITS> && k + j < W.width; j++) {
      float weight = weight_of<BITS>(W, n, k + j, word);
#pragma unroll
      for (int m = 0; m < 16; m++)
        if (first + m < M) sum[m] += to_float(x[(size_t)(first + m) * W.width + k + j]) * weight;
    }
  }
#pragma unroll
  for (int m = 0; m < 16; m++) {
    for (int step = 16; step > 0; step /= 2) sum[m] += __shfl_xor_sync(0xffffffff, sum[m], step);
    if (lane == 0 && first + m < M) y[(size_t)(first + m) * W.rows + n] = from_float<T>(sum[m]);
  }
}

// ======================================================================= 4. y = x W^T for up to 16 rows of x
//
// Now the time should be that of reading W once. At 3 TB/s an H100 reads 6e12 int4 a second, and has about
// four instructions for each: the kernel above spends twenty. Three things bring that down.
//
// Tensor cores. One mma multiplies 16 rows of W by 8 rows of x over a depth of 16. Lane 4 g + t has
//
//     a, of W      depth 2t, 2t+1   2t+8, 2t+9    b, of x          row g of x    d, of y      x row 2t  2t+1
//     row g of W        a[0]           a[2]       depth 2t, 2t+1      b[0]       W row g       d[0]     d[1]
//     row g + 8         a[1]           a[3]       depth 2t+8, 2t+9    b[1]       W row g + 8   d[2]     d[3]
//
// The order along the depth is free, if W and x agree on it. So each lane takes weights that are neighbours
// in memory, up to 16 bytes in one load, and the x that go with them. No lane needs another's weights.
//
// Cheap unpacking. A bfloat16 of 128..255 has steps of 1, so the four bits u of an int4, put into the lowest
// bits of 0x4300 (128), are 128 + u: (word >> 4 i & 0x000f000f) | 0x43004300 makes two at a time. A half of
// 64..127 has steps of 1/16: u goes four bits further left, into 0x5400. What is multiplied is q + CENTRE;
// CENTRE sum(x) is taken off with the offset. The bytes of int8 fit 0x6400, a half of 1024. A bfloat16 lacks
// one bit for them: the lower seven make 128..255, the sign -128 or -256, and their sum is q.
//
// s and o stay out of it: y = s ((q + CENTRE) x) + (o - CENTRE s) sum(x), added up at the end of each chunk.
// The sum over x comes from the tensor cores too, as a product with ones: 8% of the instructions, which costs
// less than to make it once, in a launch of its own, or to wait for it.
//
// A block has 16 rows of W and 8 warps that share the depth, so that even W^O of 4096 x 4096 makes 256 blocks
// x 8 warps, each with several loads on the way: at 3 TB/s and 600 ns, 1.8 MB must be on the way always.

constexpr int WARPS = 8;  // of a block

template <class T> constexpr bool IS_HALF = std::is_same<T, __half>::value;
template <class T> constexpr uint32_t MAGIC = IS_HALF<T> ? 0x54005400 : 0x43004300;
template <class T> constexpr uint32_t ONES = IS_HALF<T> ? 0x3c003c00 : 0x3f803f80;
template <class T, int BITS>
constexpr float CENTRE = IS_HALF<T> ? (BITS == 8 ? 1024 + 128 : 64 + 8) : (BITS == 8 ? 0 : 128 + 8);

// One word -> its weights + CENTRE in order, two to a register: 2 registers of int8 or 4 of int4.
template <class T, int BITS> __device__ void unpack(uint32_t word, uint32_t* pairs) {
  constexpr int left = IS_HALF<T> ? 4 : 0;
#pragma unroll
  for (int i = 0; i < IN_WORD<BITS> / 2; i++) {
    if (BITS == 4) {
      uint32_t moved = 4 * i < left ? word << left : word >> (4 * i - left);
      pairs[i] = and_or(moved, 0x000f000f << left, MAGIC<T>);
    } else if (IS_HALF<T>) {
      pairs[i] = __byte_perm(word ^ 0x80808080, 0x64646464, i ? 0x4342 : 0x4140);
    } else {
      uint32_t bytes = __byte_perm(word, 0, i ? 0x4342 : 0x4140);  // one in each half of the register
      pairs[i] = plus(and_or(bytes, 0x007f007f, MAGIC<T>), and_or(bytes, 0x00800080, 0xc300c300));
    }
  }
}

template <int WORDS> struct alignas(4 * WORDS) Words { uint32_t word[WORDS]; };

// The work of a block: 16 rows of W from `first` on times M <= 8 TILES rows of x, or one of several pieces of
// it along the depth. Leaves the sum of each warp's share in part[warp][x row][W row]. A lane loads WORDS
// words at a time; 4 lanes make a chunk, which must lie in one group. Rows of x begin at 16 bytes. before_x
// is called when the first weights are on their way.
template <class T, int BITS, int WORDS, int TILES, class Wait>
__device__ void multiply_16_rows(const T* x, int M, const Matrix& W, int first, int piece, int pieces,
                                 float (*part)[8 * TILES][16], Wait before_x) {
  constexpr int n = IN_WORD<BITS>, CHUNK = 4 * WORDS * n, LOADS = WORDS == 4 ? 4 : 8;  // loads under way
  int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  int K = W.width, chunks = ceil_div(K, CHUNK), start = piece * WARPS + warp, apart = pieces * WARPS;
  float groups = W.group == K ? 0 : (float)CHUNK / W.group;  // in a chunk
  int row[2] = {min(first + g, W.rows - 1), min(first + g + 8, W.rows - 1)};  // never beyond the last
  // lanes 0 and 1 of four load s of the two rows, lanes 2 and 3 load o
  const __half* vectors = (t < 2 ? W.scale : W.offset) + (size_t)(t % 2 ? row[1] : row[0]) * (K / W.group);
  const uint32_t ones[4] = {ONES<T>, ONES<T>, ONES<T>, ONES<T>};
  float y[TILES][4] = {};

  for (int chunk = start; chunk < chunks || chunk == start; chunk += apart * LOADS) {  // once, for before_x
    Words<WORDS> words[LOADS][2] = {};
    float vector[LOADS] = {};
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      int at = chunk + i * apart, byte = (at * 4 + t) * 4 * WORDS;
      for (int half = 0; half < 2; half++) {
        const uint8_t* from = W.q + (size_t)row[half] * W.row_bytes + byte;
        if (byte < W.row_bytes) words[i][half] = *(const Words<WORDS>*)from;
      }
      if (at < chunks) vector[i] = __half2float(vectors[(int)((at + 0.5f) * groups)]);  // exact; no division
    }
    if (chunk == start) before_x();
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      int k = (chunk + i * apart) * CHUNK;
      if (k >= K) break;  // the same for the whole warp
      float d[TILES][4] = {}, sum_x[TILES][4] = {};
#pragma unroll
      for (int w = 0; w < WORDS; w++) {
        alignas(16) uint32_t weights[2][n / 2];
        unpack<T, BITS>(words[i][0].word[w], weights[0]);
        unpack<T, BITS>(words[i][1].word[w], weights[1]);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          int m = 8 * tile + g, from = k + (t * WORDS + w) * n;
          Words<n / 2> xs = {};
          if (m < M && from < K) xs = *(const Words<n / 2>*)(x + (size_t)m * K + from);
#pragma unroll
          for (int j = 0; j < n / 2; j += 2) {
            uint32_t a[4] = {weights[0][j], weights[1][j], weights[0][j + 1], weights[1][j + 1]};
            mma(d[tile], a, xs.word + j, T());
            mma(sum_x[tile], ones, xs.word + j, T());
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {  // y += s d + o sum(x)
        float s = __shfl_sync(0xffffffff, vector[i], half, 4);
        float o = __shfl_sync(0xffffffff, vector[i], half + 2, 4) - CENTRE<T, BITS> * s;
        for (int tile = 0; tile < TILES; tile++)
          for (int c = 2 * half; c < 2 * half + 2; c++)
            y[tile][c] = fmaf(o, sum_x[tile][c], fmaf(s, d[tile][c], y[tile][c]));
      }
    }
  }
  for (int tile = 0; tile < TILES; tile++)
    for (int i = 0; i < 4; i++) part[warp][8 * tile + 2 * t + i % 2][g + i / 2 * 8] = y[tile][i];
  __syncthreads();
}

// Number i of the block's 16 x 8 TILES, from the shares of its warps.
template <int TILES> __device__ float add_parts(float (*part)[8 * TILES][16], int i) {
  float sum = 0;
  for (int warp = 0; warp < WARPS; warp++) sum += part[warp][i / 16][i % 16];
  return sum;
}

template <class T, int BITS, int WORDS, int TILES>
__global__ void __launch_bounds__(32 * WARPS) matvec(const T* x, int M, Matrix W, T* y) {
  __shared__ float part[WARPS][8 * TILES][16];
  int first = blockIdx.x * 16;
  multiply_16_rows<T, BITS, WORDS, TILES>(x, M, W, first, 0, 1, part, [] {});
  int i = threadIdx.x, m = i / 16, row = first + i % 16;
  if (m < M && m < 8 * TILES && row < W.rows)
    y[(size_t)m * W.rows + row] = from_float<T>(add_parts<TILES>(part, i));
}

// ================================================ 5. y = B (A x), and y = W x + scale B (A x), in one launch
//
// Plainly these are two or three launches of the kernels above. A pair of 4096 x 512 factors at int4 takes
// 0.7 us to read and a launch some 2 us, so the second product has to begin inside the first one's launch,
// when all of h = A x is there. A block takes a ticket when it starts: the first ones compute h, the later
// ones y, and wait until h is complete. This can't hang, however few blocks fit on the GPU, as h's tickets
// were all handed out before. The waiting blocks have asked for their share of B already: memory never rests.

constexpr int MOST_TILES = 253;
struct Counters { int ticket, done, finished, arrived[MOST_TILES]; };  // 0 between launches: the last sets it

__device__ inline int take_ticket(Counters* c) {
  __shared__ int ticket;
  if (threadIdx.x == 0) ticket = atomicAdd(&c->ticket, 1);
  __syncthreads();
  return ticket;
}
__device__ inline void report_done(Counters* c) {
  __threadfence();  // what this thread wrote is seen by all before the count is
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(&c->done, 1);
}
__device__ inline void wait_until_done(Counters* c, int count) {
  if (threadIdx.x == 0) {
    while (*(volatile int*)&c->done < count) __nanosleep(20);  // a plain read: an atomic one would queue up
    __threadfence();  // what is read from here on is not older than the count
  }
  __syncthreads();
}
__device__ inline void leave(Counters* c) {
  if (threadIdx.x == 0 && atomicAdd(&c->finished, 1) == (int)gridDim.x - 1)
    c->ticket = c->done = c->finished = 0;
}
// Whether this block is the last of so many to come here. It sees what the others wrote before.
__device__ inline bool arrives_last(int* arrived, int blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0 && (last = atomicAdd(arrived, 1) == blocks - 1)) *arrived = 0;
  __syncthreads();
  __threadfence();
  return last;
}

// A has few rows: a block for each 16 of them would leave most of the GPU idle. So several share their
// columns, and the last to end adds up what they leave in `shares`, float (pieces, M, r), in a fixed order.
// h (M, r) is scratch. WORDS must suit the groups of both factors.
template <class T, int BITS, int WORDS, int TILES>
__global__ void __launch_bounds__(32 * WARPS)
lowrank(const T* x, int M, Matrix A, Matrix B, int pieces, float* shares, T* h, T* y, Counters* counters) {
  __shared__ float part[WARPS][8 * TILES][16];
  int tiles_of_h = ceil_div(A.rows, 16), ticket = take_ticket(counters), i = threadIdx.x, m = i / 16;
  bool makes_h = ticket < tiles_of_h * pieces, complete = true;
  Matrix W = makes_h ? A : B;
  int tile = makes_h ? ticket / pieces : ticket - tiles_of_h * pieces, row = 16 * tile + i % 16;
  int piece = makes_h ? ticket % pieces : 0, of = makes_h ? pieces : 1;
  auto wait_for_h = [&] { if (!makes_h) wait_until_done(counters, tiles_of_h); };
  multiply_16_rows<T, BITS, WORDS, TILES>(makes_h ? x : h, M, W, 16 * tile, piece, of, part, wait_for_h);
  bool mine = m < M && m < 8 * TILES && row < W.rows;
  float sum = mine ? add_parts<TILES>(part, i) : 0;
  if (of > 1) {
    volatile float* share = shares + (size_t)m * W.rows + row;  // volatile: L1 may lack what others wrote
    if (mine) share[(size_t)piece * M * W.rows] = sum;
    complete = arrives_last(&counters->arrived[tile], pieces);
    sum = 0;
    for (int p = 0; p < pieces && complete && mine; p++) sum += share[(size_t)p * M * W.rows];
  }
  if (complete && mine) (makes_h ? h : y)[(size_t)m * W.rows + row] = from_float<T>(sum);
  if (complete && makes_h) report_done(counters);
  leave(counters);
}

// A (r, K) and B (N, r) of the adapter in T. h is scratch, in float: (pieces, M, r), what each PIECE of the
// columns adds to A x. A lane reads 16 bytes of A once for all rows of x.
constexpr int PIECE = 1024;
template <class T, int BITS, int WORDS, int TILES>
__global__ void __launch_bounds__(32 * WARPS)
lora(const T* x, int M, Matrix W, const T* A, const T* B, int r, float scale, float* h, T* y, Counters* c) {
  struct alignas(16) Eight { T value[8]; };
  __shared__ float part[WARPS][8 * TILES][16], some_h[16][16];
  int K = W.width, pieces = ceil_div(K, PIECE), ticket = take_ticket(c), i = threadIdx.x, m = i / 16;
  if (ticket < pieces) {
    for (int j = i / 32; j < r; j += WARPS) {  // a warp to each row of A
      float sum[8 * TILES] = {};
      for (int k = ticket * PIECE + i % 32 * 8; k < min(K, (ticket + 1) * PIECE); k += 32 * 8) {
        Eight a = *(const Eight*)(A + (size_t)j * K + k);
#pragma unroll
        for (int m = 0; m < 8 * TILES; m++) {
          Eight b = *(const Eight*)(x + (size_t)min(m, M - 1) * K + k);
          for (int e = 0; e < 8; e++) sum[m] += to_float(a.value[e]) * to_float(b.value[e]);
        }
      }
#pragma unroll
      for (int m = 0; m < 8 * TILES; m++) {
        for (int step = 16; step > 0; step /= 2) sum[m] += __shfl_xor_sync(0xffffffff, sum[m], step);
        if (i % 32 == 0 && m < M) h[(ticket * M + m) * r + j] = sum[m];
      }
    }
    report_done(c);
  } else {
    int first = 16 * (ticket - pieces), row = first + i % 16;
    multiply_16_rows<T, BITS, WORDS, TILES>(x, M, W, first, 0, 1, part, [] {});
    wait_until_done(c, pieces);  // long since: h is a small part of the work
    float sum = 0;
    for (int from = 0; from < r; from += 16) {  // 16 columns of h and of B
      int j = from + i % 16;
      float all = 0;
      for (int piece = 0; piece < pieces && m < M && j < r; piece++) all += h[(piece * M + m) * r + j];
      some_h[m][i % 16] = all;
      __syncthreads();
      for (int e = 0; e < min(16, r - from) && row < W.rows; e++)
        sum += to_float(B[(size_t)row * r + from + e]) * some_h[m][e];
      __syncthreads();
    }
    if (m < M && m < 8 * TILES && row < W.rows)
      y[(size_t)m * W.rows + row] = from_float<T>(add_parts<TILES>(part, i) + scale * sum);
  }
  leave(c);
}

// =========================================================================== 6. y = x W^T for more rows of x
//
// With more rows each weight is used more often than a register can serve. A block computes 64 rows of W
// times 64 rows of x, in steps of 64 along the depth, through shared memory, where two warps read a number.
// The copies of later steps run while the tensor cores work (cp.async), into a ring of STAGES buffers.
//
//     step          0        1        2        3
//     buffer 0    work     fill 3     .      work
//     buffer 1    arrived  work     fill 4     .
//     buffer 2    on its   arrived  work     fill 5
//                 way
//
// The four warps take quarters, 32 x 32. A lane's weights are neighbours again: depth 16 t .. 16 t + 15.

constexpr int TILE = 64, STEP = 64;
constexpr int X_STRIDE = STEP + 8;  // 16 bytes more a row of x: then the lanes of a load hit different banks

// A warp's quarter, from (m, n) on, of the result y (M, N); d[i][tile]: 16 n times 8 m, as mma leaves them.
template <class T> __device__ void store_quarter(float (*d)[4][4], T* y, int M, int N, int m, int n) {
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 2; i++)
    for (int tile = 0; tile < 4; tile++)
      for (int c = 0; c < 4; c++) {
        int row = m + 8 * tile + 2 * t + c % 2, column = n + 16 * i + 8 * (c / 2) + g;
        if (row < M && column < N) y[(size_t)row * N + column] = from_float<T>(d[i][tile][c]);
      }
}

template <class T, int BITS>
__global__ void __launch_bounds__(128) matmul(const T* x, int M, Matrix W, T* y) {
  constexpr int STAGES = BITS == 8 ? 3 : 4, ROW = STEP * BITS / 8, n = IN_WORD<BITS>;
  alignas(16) __shared__ T xs[STAGES][TILE][X_STRIDE];
  alignas(16) __shared__ uint8_t ws[STAGES][TILE][ROW];
  int K = W.width, steps = ceil_div(K, STEP), first_row = blockIdx.x * TILE, first_m = blockIdx.y * TILE;
  int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  int warp_row = warp % 2 * 32, warp_m = warp / 2 * 32;

  auto fill = [&](int step) {  // always ends a group of copies, so that all waits are alike
    int stage = step % STAGES;
    for (int i = threadIdx.x; i < TILE * ROW / 16 && step < steps; i += 128) {
      int row = i / (ROW / 16), byte = i % (ROW / 16) * 16, from = step * ROW + byte;
      bool valid = first_row + row < W.rows && from < W.row_bytes;
      const uint8_t* q = valid ? W.q + (size_t)(first_row + row) * W.row_bytes + from : W.q;
      copy_async(&ws[stage][row][byte], q, valid);
    }
    for (int i = threadIdx.x; i < TILE * STEP / 8 && step < steps; i += 128) {
      int m = i / (STEP / 8), k = i % (STEP / 8) * 8, from = step * STEP + k;
      bool valid = first_m + m < M && from < K;
      copy_async(&xs[stage][m][k], valid ? x + (size_t)(first_m + m) * K + from : x, valid);
    }
    copy_commit();
  };

  const uint32_t ones[4] = {ONES<T>, ONES<T>, ONES<T>, ONES<T>};
  float out[2][4][4] = {}, d[2][4][4] = {}, sum_x[4][4] = {};  // 2 x 16 rows of W, 4 x 8 rows of x
  for (int step = 0; step < STAGES - 1; step++) fill(step);
  for (int step = 0; step < steps; step++) {
    copy_wait<STAGES - 2>();
    __syncthreads();  // this step has arrived for all, and all are done with the buffer that is filled next
    fill(step + STAGES - 1);
    int stage = step % STAGES;
    uint32_t weights[2][2][8];
#pragma unroll
    for (int i = 0; i < 2; i++)
      for (int half = 0; half < 2; half++) {
        auto words = *(const Words<16 / n>*)&ws[stage][warp_row + 16 * i + 8 * half + g][t * ROW / 4];
#pragma unroll
        for (int w = 0; w < 16 / n; w++) unpack<T, BITS>(words.word[w], weights[i][half] + w * n / 2);
      }
#pragma unroll
    for (int tile = 0; tile < 4; tile++) {
      const T* from = &xs[stage][warp_m + 8 * tile + g][16 * t];
      alignas(16) uint32_t b[8];
      *(Words<4>*)b = *(const Words<4>*)from;
      *(Words<4>*)(b + 4) = *(const Words<4>*)(from + 8);
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        mma(sum_x[tile], ones, b + j, T());
        for (int i = 0; i < 2; i++) {
          uint32_t a[4] = {weights[i][0][j], weights[i][1][j], weights[i][0][j + 1], weights[i][1][j + 1]};
          mma(d[i][tile], a, b + j, T());
        }
      }
    }
    if ((step + 1) * STEP % W.group == 0 || step == steps - 1) {  // the end of a group: out += s d + o sum(x)
#pragma unroll
      for (int i = 0; i < 2; i++)
        for (int half = 0; half < 2; half++) {
          int row = min(first_row + warp_row + 16 * i + 8 * half + g, W.rows - 1);
          float s = scale_of(W, row, step * STEP), o = offset_of(W, row, step * STEP) - CENTRE<T, BITS> * s;
          for (int tile = 0; tile < 4; tile++)
            for (int c = 2 * half; c < 2 * half + 2; c++) {
              out[i][tile][c] += s * d[i][tile][c] + o * sum_x[tile][c];
              d[i][tile][c] = 0;
            }
        }
      for (int tile = 0; tile < 4; tile++)
        for (int c = 0; c < 4; c++) sum_x[tile][c] = 0;
    }
  }
  store_quarter(out, y, M, W.rows, first_m + warp_m, first_row + warp_row);
}

// ============================================================= 7. g W, the gradient of x: g (M, N) -> (M, K)

// Now the depth runs along the rows of W, and so does s: it can't be taken out of the product. A tile of W is
// dequantized and turned on its way into shared memory; meanwhile the next one's integers are being read.
template <class T, int BITS>
__global__ void __launch_bounds__(128) matmul_back(const T* gradient, int M, Matrix W, T* out) {
  constexpr int DEPTH = 32, STRIDE = DEPTH + 8, n = IN_WORD<BITS>, PER_THREAD = DEPTH * TILE / n / 128;
  alignas(16) __shared__ T ws[TILE][STRIDE], gs[TILE][STRIDE];  // W turned: (k, row); g: (m, row)
  int N = W.rows, first_k = blockIdx.x * TILE, first_m = blockIdx.y * TILE;
  int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  int warp_k = warp % 2 * 32, warp_m = warp / 2 * 32;
  float d[2][4][4] = {};
  uint32_t words[PER_THREAD];
  T numbers[DEPTH * TILE / 128];

  auto load = [&](int first_row) {
    for (int i = 0; i < PER_THREAD; i++) {
      int at = threadIdx.x + 128 * i, row = first_row + at / (TILE / n), k = first_k + at % (TILE / n) * n;
      words[i] = row < N && k < W.width ? word_of<BITS>(W, row, k) : 0;
    }
    for (int i = 0; i < DEPTH * TILE / 128; i++) {
      int at = threadIdx.x + 128 * i, m = first_m + at / DEPTH, row = first_row + at % DEPTH;
      numbers[i] = m < M && row < N ? gradient[(size_t)m * N + row] : from_float<T>(0);
    }
  };
  auto store = [&](int first_row) {
    for (int i = 0; i < PER_THREAD; i++) {
      int at = threadIdx.x + 128 * i, row = at / (TILE / n), k = at % (TILE / n) * n;
      for (int j = 0; j < n; j++) {
        bool valid = first_row + row < N && first_k + k + j < W.width;
        float weight = valid ? weight_of<BITS>(W, first_row + row, first_k + k + j, words[i]) : 0;
        ws[k + j][row] = from_float<T>(weight);
      }
    }
    for (int i = 0; i < DEPTH * TILE / 128; i++) {
      int at = threadIdx.x + 128 * i;
      gs[at / DEPTH][at % DEPTH] = numbers[i];
    }
  };

  load(0);
  for (int first_row = 0; first_row < N; first_row += DEPTH) {
    __syncthreads();  // all are done with the tile before
    store(first_row);
    __syncthreads();
    if (first_row + DEPTH < N) load(first_row + DEPTH);
#pragma unroll
    for (int depth = 0; depth < DEPTH; depth += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++)
          a[i][j] = *(const uint32_t*)&ws[warp_k + 16 * i + 8 * (j % 2) + g][depth + 8 * (j / 2) + 2 * t];
#pragma unroll
      for (int tile = 0; tile < 4; tile++) {
        uint32_t b[2];
        for (int j = 0; j < 2; j++)
          b[j] = *(const uint32_t*)&gs[warp_m + 8 * tile + g][depth + 8 * j + 2 * t];
        for (int i = 0; i < 2; i++) mma(d[i][tile], a[i], b, T());
      }
    }
  }
  store_quarter(d, out, M, W.width, first_m + warp_m, first_k + warp_k);
}

// ====================================================================== 8. what beyond/gpu_kernels.py calls
//
// Plain C, with types as numbers. Each function picks a kernel for arguments that were checked there.

enum Type { BFLOAT16, HALF, FLOAT };
enum Step { NAIVE, WARP, FAST };  // how far down this file

// call(T(), Int<BITS>())
template <int N> using Int = std::integral_constant<int, N>;
template <class T, class F> void with_bits(int bits, F call) {
  bits == 8 ? call(T(), Int<8>()) : call(T(), Int<4>());
}
template <class F> void with_type(int type, int bits, F call) {
  type == BFLOAT16 ? with_bits<__nv_bfloat16>(bits, call) : with_bits<__half>(bits, call);
}

// Words that a lane of multiply_16_rows may load so that four lanes stay in one group; 0: none, or x is not
// where 16 bytes begin.
inline int words_for(const Matrix& W, int bits, const void* x) {
  int words = W.width % 8 || (size_t)x % 16 ? 0 : 4;
  while (words && W.group != W.width && W.group % (4 * words * 32 / bits)) words /= 2;
  return words;
}
// call(T(), Int<BITS>(), Int<WORDS>(), Int<TILES>()); 0 words are taken for 1.
template <class F> void with_words(int type, int bits, int words, int M, F call) {
  with_type(type, bits, [&](auto t, auto b) {
    auto with_tiles = [&](auto w) { M <= 8 ? call(t, b, w, Int<1>()) : call(t, b, w, Int<2>()); };
    if (words == 4) with_tiles(Int<4>());
    else if (words == 2) with_tiles(Int<2>());
    else with_tiles(Int<1>());
  });
}

extern "C" {

const char* problem() {  // of the launches since the last call, or null
  auto error = cudaGetLastError();
  return error ? cudaGetErrorString(error) : nullptr;
}

void run_dequantize(int type, int bits, const void*, int, Matrix W, void* out, cudaStream_t stream) {
  auto run = [&](auto t, auto b) {
    using T = decltype(t);
    dim3 grid(W.rows, ceil_div(W.width, 128 * IN_WORD<b()>));
    launch(dequantize<T, b()>, grid, 128, stream, W, (T*)out);
  };
  type == FLOAT ? with_bits<float>(bits, run) : with_type(type, bits, run);
}

void run_product(int type, int bits, const void* x, int M, Matrix W, int step, void* y, cudaStream_t stream) {
  int words = words_for(W, bits, x);
  with_words(type, bits, words, M, [&](auto t, auto b, auto w, auto tiles) {
    using T = decltype(t);
    constexpr int BITS = b();
    auto X = (const T*)x;
    auto Y = (T*)y;
    if (step == NAIVE) launch(product_naive<T, BITS>, dim3(ceil_div(W.rows, 128), M), 128, stream, X, W, Y);
    else if (step == FAST && M <= 16 && words)
      launch(matvec<T, BITS, w(), tiles()>, ceil_div(W.rows, 16), 32 * WARPS, stream, X, M, W, Y);
    else if (step == FAST && M > 16 && words && (W.group == W.width || W.group % STEP == 0))
      launch(matmul<T, BITS>, dim3(ceil_div(W.rows, TILE), ceil_div(M, TILE)), 128, stream, X, M, W, Y);
    else launch(product_warp<T, BITS>, dim3(ceil_div(W.rows, 4), ceil_div(M, 16)), 128, stream, X, M, W, Y);
  });
}

// Blocks that share 16 rows of A, so that some 128 are at work, each warp with a chunk at least. `shares`
// must hold as many numbers as this times M times A's rows.
int pieces_of(Matrix A, int bits, int words) {
  int tiles = ceil_div(A.rows, 16), chunks = ceil_div(A.width, words * 128 / bits);
  return tiles > MOST_TILES ? 1 : std::max(1, std::min(128 / tiles, chunks / WARPS));
}

void run_lowrank(int type, int bits, const void* x, int M, Matrix A, Matrix B, void* shares, void* h,
                 void* counters, void* y, cudaStream_t stream) {
  int words = std::min(words_for(A, bits, x), words_for(B, bits, h)), pieces = pieces_of(A, bits, words);
  with_words(type, bits, words, M, [&](auto t, auto b, auto w, auto tiles) {
    using T = decltype(t);
    int blocks = ceil_div(A.rows, 16) * pieces + ceil_div(B.rows, 16);
    launch(lowrank<T, b(), w(), tiles()>, blocks, 32 * WARPS, stream, (const T*)x, M, A, B, pieces,
           (float*)shares, (T*)h, (T*)y, (Counters*)counters);
  });
}

void run_lora(int type, int bits, const void* x, int M, Matrix W, const void* A, const void* B, int r,
              float scale, void* h, void* counters, void* y, cudaStream_t stream) {
  with_words(type, bits, words_for(W, bits, x), M, [&](auto t, auto b, auto w, auto tiles) {
    using T = decltype(t);
    int blocks = ceil_div(W.width, PIECE) + ceil_div(W.rows, 16);
    launch(lora<T, b(), w(), tiles()>, blocks, 32 * WARPS, stream, (const T*)x, M, W, (const T*)A,
           (const T*)B, r, scale, (float*)h, (T*)y, (Counters*)counters);
  });
}

void run_matmul_back(int type, int bits, const void* g, int M, Matrix W, void* out, cudaStream_t stream) {
  with_type(type, bits, [&](auto t, auto b) {
    using T = decltype(t);
    dim3 tiles(ceil_div(W.width, TILE), ceil_div(M, TILE));
    launch(matmul_back<T, b()>, tiles, 128, stream, (const T*)g, M, W, (T*)out);
  });
}

}  // extern "C"
