// Runs the kernels of kernels.cu on a CPU: g++ compiles the same file with -DCUDA_ON_CPU (g++ 12 or later,
// for its _Float16).
//
// The blocks of a launch run one after the other. The threads of a block are coroutines that take turns: one
// runs until it comes to a barrier or to an instruction of a whole warp, then the next. So a run is always
// the same, a debugger can step through it, and what a GPU would hide is an error here: threads that wait at
// different barriers, or a copy to shared memory that is read before it was waited for (it is made only
// then). In every second block the threads take turns backwards, so that a forgotten barrier shows.
#pragma once
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <algorithm>
#include <functional>
#include <type_traits>
#include <utility>
#include <vector>
#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(threads)
using std::max;
using std::min;
using cudaStream_t = void*;
inline int cudaGetLastError() { return 0; }
inline const char* cudaGetErrorString(int) { return ""; }
struct dim3 {
  int x, y, z;
  dim3(int x = 1, int y = 1, int z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// ---------------------------------------------------------------------------- threads

enum Waiting { RUNNING, AT_WARP, AT_BLOCK, ENDED };
struct Copy { void* to; const void* from; bool valid; };
struct Thread {
  ucontext_t start;       // first entry, on a stack of its own
  jmp_buf here;           // where it stopped; longjmp is far faster than swapcontext
  bool started = false;
  Waiting waiting = RUNNING;
  uint32_t given[2][6];   // what it hands to its warp, in turns, so that one barrier an instruction is enough
  int turn = 0;
  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> groups;
  std::vector<char> stack = std::vector<char>(64 << 10);
};
inline std::vector<Thread> threads;
inline jmp_buf scheduler;
inline std::function<void()> body;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "block (%d, %d), thread %d: %s\n", blockIdx.x, blockIdx.y, threadIdx.x, what);
  abort();
}
inline Thread& self() { return threads[threadIdx.x]; }
inline void wait(Waiting where) {
  self().waiting = where;
  if (_setjmp(self().here) == 0) _longjmp(scheduler, 1);
}
inline void run_body() {
  body();
  self().waiting = ENDED;
  _longjmp(scheduler, 1);
}

inline void resume(int i) {
  Thread& t = threads[i];
  threadIdx.x = i;
  if (_setjmp(scheduler) != 0) return;  // back from wait() or the end
  if (t.started) _longjmp(t.here, 1);
  t.started = true;
  getcontext(&t.start);
  t.start.uc_stack.ss_sp = t.stack.data();
  t.start.uc_stack.ss_size = t.stack.size();
  makecontext(&t.start, run_body, 0);
  setcontext(&t.start);
}

// Let those who wait at `where` go on, if all of first..last that have not ended wait there.
inline bool release(int first, int last, Waiting where) {
  int here = 0, ended = 0;
  for (int i = first; i < last; i++) {
    here += threads[i].waiting == where;
    ended += threads[i].waiting == ENDED;
  }
  if (here == 0 || here + ended < last - first) return false;
  if (where == AT_WARP && ended) fail("the whole warp is needed here, but some of its threads have ended");
  for (int i = first; i < last; i++)
    if (threads[i].waiting == where) threads[i].waiting = RUNNING;
  return true;
}

// Each warp goes as far as it can before the next one: so it overtakes the others wherever no barrier holds
// it.
inline void run_block(int count, bool backwards) {
  for (Thread& t : threads) t.started = false, t.waiting = RUNNING, t.copies.clear(), t.groups.clear();
  bool all_ended = false;
  while (!all_ended) {
    for (int i = 0; i < count; i += 32) {
      int first = backwards ? (count - 1 - i) / 32 * 32 : i, last = min(first + 32, count);
      do
        for (int j = first; j < last; j++) {
          int at = backwards ? first + last - 1 - j : j;
          if (threads[at].waiting == RUNNING) resume(at);
        }
      while (release(first, last, AT_WARP));
    }
    all_ended = true;
    for (int i = 0; i < count; i++) all_ended &= threads[i].waiting == ENDED;
    if (!all_ended && !release(0, count, AT_BLOCK)) fail("the threads of a block wait at different barriers");
  }
}

template <class... P, class... Args>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t, Args... args) {
  gridDim = grid, blockDim = block;
  if ((int)threads.size() < block.x) threads = std::vector<Thread>(block.x);
  body = [=] { kernel(args...); };
  for (int y = 0; y < grid.y; y++)
    for (int x = 0; x < grid.x; x++) {
      blockIdx = dim3(x, y);
      run_block(block.x, (x + y) % 2);
    }
}

// ---------------------------------------------------------------------------- what threads do together

inline void __syncthreads() { wait(AT_BLOCK); }
inline void __threadfence() {}
inline void __nanosleep(unsigned) {}
inline int atomicAdd(int* p, int v) { return (*p += v) - v; }

inline Thread* exchange() {  // after filling given[turn]: the 32 threads of the warp, all of which have
  wait(AT_WARP);
  self().turn ^= 1;
  return &threads[threadIdx.x / 32 * 32];
}
inline float shuffle(float v, int from) {
  int turn = self().turn;
  memcpy(self().given[turn], &v, 4);
  Thread* warp = exchange();
  memcpy(&v, warp[from].given[turn], 4);
  return v;
}
inline float __shfl_xor_sync(unsigned, float v, int step) { return shuffle(v, threadIdx.x % 32 ^ step); }
inline float __shfl_sync(unsigned, float v, int lane, int width) {
  return shuffle(v, threadIdx.x % 32 / width * width + lane);
}

inline void copy_async(void* shared, const void* global, bool valid) {
  if ((size_t)shared % 16 || (size_t)global % 16) fail("copy_async needs addresses that are multiples of 16");
  self().copies.push_back({shared, global, valid});
}
inline void copy_commit() { self().groups.push_back(std::exchange(self().copies, {})); }
template <int N> void copy_wait() {
  for (; self().groups.size() > N; self().groups.pop_front())
    for (Copy c : self().groups.front()) c.valid ? memcpy(c.to, c.from, 16) : memset(c.to, 0, 16);
}

// ---------------------------------------------------------------------------- numbers

inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }
inline float __uint_as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t bytes = (uint64_t)b << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) r |= (uint32_t)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return r;
}

struct __half { _Float16 v; };
inline float __half2float(__half h) { return h.v; }
inline __half __float2half(float f) { return {(_Float16)f}; }

struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 b) { return __uint_as_float((uint32_t)b.bits << 16); }
inline __nv_bfloat16 __float2bfloat16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if (f != f) return {0x7fff};
  return {(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};  // to the nearest, ties to even
}

inline float number(uint16_t bits, __nv_bfloat16) { return __bfloat162float({bits}); }
inline float number(uint16_t bits, __half) { __half h; memcpy(&h, &bits, 2); return __half2float(h); }
inline uint16_t bits_of(float f, __nv_bfloat16) { return __float2bfloat16(f).bits; }
inline uint16_t bits_of(float f, __half) {
  __half h = __float2half(f);
  uint16_t u;
  memcpy(&u, &h, 2);
  return u;
}

template <class T> uint32_t pair(float low, float high, T t) {
  return bits_of(low, t) | (uint32_t)bits_of(high, t) << 16;
}
inline uint32_t plus(uint32_t a, uint32_t b) {
  __nv_bfloat16 t;
  return pair(number(a & 0xffff, t) + number(b & 0xffff, t), number(a >> 16, t) + number(b >> 16, t), t);
}

// mma.m16n8k16 as its documentation lays the tiles over the lanes. a (16, 16): register i of lane 4 g + t
// holds row g + 8 (i % 2), columns 8 (i / 2) + 2 t and the next. b (16, 8): register i, rows 8 i + 2 t and
// the next, column g. d (16, 8): row g + 8 (i / 2), column 2 t + i % 2.
template <class T> void mma(float* d, const uint32_t* a, const uint32_t* b, T type) {
  int turn = self().turn, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  memcpy(self().given[turn], a, 16);
  memcpy(self().given[turn] + 4, b, 8);
  Thread* warp = exchange();
  for (int i = 0; i < 4; i++) {
    int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    for (int k = 0; k < 16; k++) {
      uint32_t from_a = warp[row % 8 * 4 + k % 8 / 2].given[turn][row / 8 + 2 * (k / 8)];
      uint32_t from_b = warp[column * 4 + k % 8 / 2].given[turn][4 + k / 8];
      d[i] += number(from_a >> 16 * (k % 2), type) * number(from_b >> 16 * (k % 2), type);
    }
  }
}
