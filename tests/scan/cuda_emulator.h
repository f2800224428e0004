// What `cuda_kernels.cu` needs of CUDA, on a host: the threads of a block are fibers that change
// over at each exchange, so that a wrong barrier, or a lane that misses an exchange, shows.
#include <csetjmp>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { int x, y, z; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline float __uint_as_float(unsigned v) { float f; memcpy(&f, &v, 4); return f; }
static inline unsigned __float_as_uint(float v) { unsigned u; memcpy(&u, &v, 4); return u; }
static inline float power_of_2(float v) { return exp2f(v); }
static inline float inverse(float v) { return 1.0f / v; }

static Index threadIdx, blockIdx, gridDim;
float4 kept[232448 / 16];  // what a block of an H100 can have
static void poison();      // fills shared memory with NaN

namespace emulator {
enum State { RUNS, EXCHANGES, AT_BARRIER, ENDED };
struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 << 10);
  jmp_buf place;  // where it goes on: contexts save signals at each change, which is slow
  State state;
  int exchanges;
  bool started;
};
static std::vector<Fiber> fibers;
static std::vector<float> slots;  // [warp][parity][lane]
static jmp_buf scheduler_place;
static void (*body)();

static void wait(State state) {
  const Index mine = threadIdx;
  Fiber& fiber = fibers[mine.x];
  fiber.state = state;
  if (!_setjmp(fiber.place)) _longjmp(scheduler_place, 1);
  threadIdx = mine;
}
static void start() {
  body();
  fibers[threadIdx.x].state = ENDED;
  _longjmp(scheduler_place, 1);
}
static void resume(Fiber& fiber) {
  if (_setjmp(scheduler_place)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}
static float exchange(float v, int from) {
  Fiber& fiber = fibers[threadIdx.x];
  float* slot = &slots[(threadIdx.x / 32 * 2 + fiber.exchanges++ % 2) * 32];
  slot[threadIdx.x % 32] = v;
  wait(EXCHANGES);
  return slot[from % 32];
}
static void run_warp(int warp) {  // until all its lanes stand at a barrier or have ended
  for (;;) {
    int count[4] = {0, 0, 0, 0};
    for (int lane = 0; lane < 32; lane++) {
      Fiber& fiber = fibers[warp * 32 + lane];
      if (fiber.state == EXCHANGES) fiber.state = RUNS;
      if (fiber.state == RUNS) {
        threadIdx.x = warp * 32 + lane;
        resume(fiber);
      }
      count[fiber.state]++;
    }
    if (count[AT_BARRIER] == 32 || count[ENDED] == 32) return;
    if (count[EXCHANGES] != 32) {
      fprintf(stderr, "the lanes of warp %d part: some exchange, others do not\n", warp);
      abort();
    }
  }
}
static void run_block(int threads) {
  fibers.resize(threads);
  slots.assign(threads * 2, 0.0f);
  poison();
  for (int i = 0; i < threads; i++) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    fiber.state = RUNS, fiber.exchanges = 0, fiber.started = false;
    makecontext(&fiber.context, start, 0);
  }
  const int warps = threads / 32;
  for (int turn = 0;; turn++) {  // the first warp first, then the last one first, and so on
    int ended = 0;
    for (int i = 0; i < warps; i++) {
      const int warp = turn % 2 ? warps - 1 - i : i;
      run_warp(warp);
      ended += fibers[warp * 32].state == ENDED;
    }
    if (ended == warps) return;
    if (ended) fprintf(stderr, "some warps miss a barrier\n"), abort();
    for (Fiber& fiber : fibers) fiber.state = RUNS;
  }
}
}  // namespace emulator

static inline void __syncthreads() { emulator::wait(emulator::AT_BARRIER); }
static inline float __shfl_xor_sync(unsigned, float v, int mask) {
  return emulator::exchange(v, threadIdx.x % 32 ^ mask);
}
static inline int __shfl_sync(unsigned, int v, int from) {  // positions are small enough
  return (int)emulator::exchange((float)v, from);
}

#include KERNELS

template <class T> static void fill(T& array) { memset(&array, 0xff, sizeof array); }
static void poison() { fill(pairs), fill(tiles), fill(fours), fill(tile), fill(partial), fill(kept); }
static Arguments arguments;
extern "C" void launch(int kernel, int x, int y, int z, int, const Arguments* given) {
  arguments = *given;
  gridDim = {x, y, z};
  void (*const kernels[])() = {
      [] { scan_carry(arguments); }, [] { scan(arguments); },
      [] { scan_backward_carry(arguments); }, [] { scan_backward(arguments); }};
  emulator::body = kernels[kernel];
  for (int k = 0; k < z; k++)
    for (int j = 0; j < y; j++)
      for (int i = 0; i < x; i++) {
        blockIdx = {i, j, k};
        emulator::run_block(THREADS);
      }
}
