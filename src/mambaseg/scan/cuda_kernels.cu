// The loops of the `cuda` backend. Letters as in `reference`; compiled at run time by `nvrtc`.
//
// A channel lies on S lanes of one warp, each with R of its states in registers: "parts". A block is
// WARPS warps with CB channels of one batch element and one direction, and goes through its steps,
// STEPS at a time. What a step needs is read from memory a chunk ahead of the arithmetic, weighed
// once (softplus) and shared: by the parts of a channel, and for B and C by all warps of the block.
//
// Where channels are too few to keep the device busy, L is split into segments of whole chunks, each a
// block of its own. `scan_carry` first finds the state that each segment leaves to the next from a
// start of zero, and the sum of its Δ, which gives the decay over all of it; every block of `scan` folds
// those of the segments before its own into its start. The backward does so from the other end.
//
// The quads of a lane's states are rotated by its channel (register r holds state `first + state(r)`
// with the quad index xor `turn`), so that the sums over channels of dB and dC halve what a lane
// holds without choosing: it sends the upper registers and keeps the lower ones, whatever lane it is.
// No sum is left to atomics: the same inputs give the same bits.
//
// Compile-time numbers: R, S, WARPS, STEPS, UNROLL, MIN_BLOCKS; X_BF16, DELTA_BF16, BC_BF16 say
// which tensors are bfloat16 (else float32). Without a CUDA compiler the tests include this file
// after a header that emulates a block.

constexpr int THREADS = 32 * WARPS;
constexpr int LANES = 32 / S;           // channels of a warp
constexpr int CB = WARPS * LANES;       // channels of a block
constexpr int NP = R * S;               // states of a channel, N rounded up
constexpr int V = R < 4 ? R : 4;        // states that are read at once
constexpr int Q = R / V;                // quads of states
constexpr int PER = STEPS / S;          // steps of a chunk that a lane reads
constexpr int ROW = 2 * NP;             // B and C of a step
constexpr int ITEMS = STEPS * ROW;      // B and C of a chunk
constexpr int SHARE = (ITEMS + THREADS - 1) / THREADS;  // of a thread in them
constexpr int AT_ONCE = UNROLL, SINGLY = UNROLL * S;  // groups of S steps that are compiled together
constexpr float LN_2 = 0.6931471805599453f;
constexpr float LOG2_E = 1.4426950408889634f;
static_assert(STEPS <= 32 && STEPS % S == 0 && (R & (R - 1)) == 0 && Q <= LANES, "sizes");

template <bool NARROW> struct Format { typedef float type; };
template <> struct Format<true> { typedef unsigned short type; };
template <class T> struct Bytes { typedef char type; };
template <class T> struct Bytes<const T> { typedef const char type; };
typedef Format<X_BF16>::type XT;
typedef Format<DELTA_BF16>::type DT;
typedef Format<BC_BF16>::type BT;

// One argument of all kernels. Strides count bytes; the last dimension of a tensor has no gaps.
struct Place { long long batch, group; int position; };
struct Arguments {
  const XT* x;          // (B, L, G, D)
  const DT* delta;      // (B, L, K, D)
  const float* rates;   // A log2(e), (K, N, D)
  const BT* B;          // (B, L, K, N)
  const BT* C;
  const float* skip;    // D, (K, D)
  const float* bias;    // (K, D)
  const XT* d_y;        // like x
  XT* out;              // y or the gradient of x, per direction: (B, L, K, D)
  float* ends;          // what segments leave from zero, and sums of Δ: (B, segments, K, NP + 1, D)
  float* starts;        // states before each chunk, (B, K, chunks, NP, D), in the order of registers
  DT* d_delta;          // like delta
  float* d_rates;       // (B, segments, K, N, D)
  float* d_B;           // (blocks of channels, B, L, K, N)
  float* d_C;
  float* d_skip;        // (B, segments, K, D)
  float* d_bias;
  Place at_x, at_delta, at_B, at_C, at_d_y, at_d_delta;
  int height, width, channels, states, image;
  int segments, segment_chunks;  // how many, and chunks of each; the last one may have fewer
};

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(unsigned short v) { return __uint_as_float((unsigned)v << 16); }
__device__ __forceinline__ void narrow(float v, float& to) { to = v; }
__device__ __forceinline__ void narrow(float v, unsigned short& to) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to) : "f"(v));
#else
  const unsigned bits = __float_as_uint(v);
  to = v != v ? 0x7fff : (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}
// Where `tensor` goes on at a position.
template <class T>
__device__ __forceinline__ T* at(T* tensor, int position, int stride) {
  typedef typename Bytes<T>::type B;
  return reinterpret_cast<T*>(reinterpret_cast<B*>(tensor) + (long long)position * stride);
}
#ifdef __CUDACC__
// Stores without a branch, around which the compiler would not interleave steps; nothing here reads
// what they write.
__device__ __forceinline__ void store(float* to, float v, bool wanted) {
  asm volatile("{.reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.f32 [%1], %2;}"
               :: "r"((int)wanted), "l"(to), "f"(v));
}
__device__ __forceinline__ void store(unsigned short* to, unsigned short v, bool wanted) {
  asm volatile("{.reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.u16 [%1], %2;}"
               :: "r"((int)wanted), "l"(to), "h"(v));
}
__device__ __forceinline__ float power_of_2(float v) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}
__device__ __forceinline__ float inverse(float v) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}
#else
template <class T> void store(T* to, T v, bool wanted) {
  if (wanted) *to = v;
}
#endif
template <class T> __device__ __forceinline__ void put(T* to, float v, bool wanted) {
  T bits;
  narrow(v, bits);
  store(to, bits, wanted);
}

// log(1 + exp(z)) and its derivative, accurate to single precision in both tails; of the steps that a
// lane weighs, together: one alone would wait for its own results.
__device__ __forceinline__ void softplus(const float (&z)[PER], float (&sizes)[PER], float (&slopes)[PER]) {
  float w[PER], s[PER];
#pragma unroll
  for (int i = 0; i < PER; i++) w[i] = power_of_2(-fabsf(z[i]) * LOG2_E);  // exp(-|z|), in (0, 1]
  // log(1 + w) = 2 artanh(s) = 2 (s + s^3/3 + s^5/5 + ...) with s = w / (2 + w) <= 1/3
#pragma unroll
  for (int i = 0; i < PER; i++) s[i] = w[i] * inverse(2.0f + w[i]);
#pragma unroll
  for (int i = 0; i < PER; i++) slopes[i] = (z[i] > 0.0f ? 1.0f : w[i]) * inverse(1.0f + w[i]);
#pragma unroll
  for (int i = 0; i < PER; i++) {
    const float square = s[i] * s[i];
    float series = 2.0f / 15.0f;
    series = series * square + 2.0f / 13.0f;
    series = series * square + 2.0f / 11.0f;
    series = series * square + 2.0f / 9.0f;
    series = series * square + 2.0f / 7.0f;
    series = series * square + 2.0f / 5.0f;
    series = series * square + 2.0f / 3.0f;
    series = series * square + 2.0f;
    sizes[i] = (z[i] > 0.0f ? z[i] : 0.0f) + s[i] * series;
  }
}

// V numbers that lie side by side in shared memory.
__device__ __forceinline__ void read_quad(float (&to)[V], const float* from) {
  if constexpr (V == 4) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) to[i] = from[i];
  }
}
__device__ __forceinline__ void write_quad(float* to, const float* from) {
  if constexpr (V == 4) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) to[i] = from[i];
  }
}

// Sums each of COUNT numbers over the lanes that differ in `mask`; each lane keeps half of them.
template <int COUNT>
__device__ __forceinline__ void halve(float* v, int lane, int mask) {
  const bool upper = lane & mask;
#pragma unroll
  for (int i = 0; i < COUNT / 2; i++) {
    const float low = v[i], high = v[i + COUNT / 2];
    v[i] = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, mask);
  }
}

// Sums S numbers, one for each of S steps, over the parts of a channel: part p gets that of step p.
__device__ __forceinline__ void sum_parts(float (&v)[S], int lane) {
  if constexpr (S >= 2) halve<S>(v, lane, 16);
  if constexpr (S >= 4) halve<S / 2>(v, lane, 8);
  if constexpr (S >= 8) halve<S / 4>(v, lane, 4);
}

// A thread: where it stands, and the positions of the chunk that its warp reads. Lanes beyond the last
// channel read what that one reads, so that no read has to be guarded.
struct Self {
  int lane, warp, part, channel, slot, d, turn, direction, group, segment;
  int first_chunk, end_chunk;  // of the segment
  bool inside;
  long long batch;

  // A block per batch element and segment; where one segment has none, `segments` is one less.
  __device__ __forceinline__ Self(const Arguments& a, int segments, int first_segment = 0) {
    lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    part = lane / LANES, channel = lane % LANES, slot = warp * LANES + channel;
    d = blockIdx.x * CB + slot, turn = channel & (Q - 1);
    inside = d < a.channels, d = inside ? d : a.channels - 1;
    group = blockIdx.y, direction = a.image ? group : 0;
    batch = blockIdx.z / segments, segment = first_segment + blockIdx.z % segments;
    first_chunk = segment * a.segment_chunks, end_chunk = first_chunk + a.segment_chunks;
    const int chunks = (a.height * a.width + STEPS - 1) / STEPS;
    end_chunk = end_chunk < chunks ? end_chunk : chunks;
  }
  // Which state of its channel register r holds.
  __device__ __forceinline__ int state(int r) const {
    return part * R + (r / V ^ turn) * V + r % V;
  }
  // The position of step `first + lane`; the last one's beyond the end, the first one's before.
  __device__ __forceinline__ int position(const Arguments& a, int first) const {
    const int length = a.height * a.width;
    int t = first + lane;
    t = t < length ? t : length - 1;
    t = t > 0 ? t : 0;
    if (direction & 1) {
      const int column = t / a.height;
      t = (t - column * a.height) * a.width + column;
    }
    return direction >= 2 ? length - 1 - t : t;
  }
  template <class T>
  __device__ __forceinline__ T* row(T* tensor, const Place& at) const {
    typedef typename Bytes<T>::type B;
    return reinterpret_cast<T*>(reinterpret_cast<B*>(tensor) + batch * at.batch + group * at.group);
  }
};

// The share of a thread in B and C of a chunk, or in B alone, on its way from memory to shared memory.
template <int TENSORS> struct Weights {
  static constexpr int ROW = TENSORS * NP, ITEMS = STEPS * ROW, SHARE = (ITEMS + THREADS - 1) / THREADS;
  BT ahead[SHARE];

  __device__ __forceinline__ void fetch(const Arguments& a, const Self& self, int position) {
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
      const int item = threadIdx.x + i * THREADS, n = item % NP;
      const int place = __shfl_sync(~0u, position, item / ROW % STEPS);
      const bool of_B = item % ROW < NP;
      const BT* from = of_B ? self.row(a.B, a.at_B) : self.row(a.C, a.at_C);
      from += n < a.states ? n : 0;
      ahead[i] = *at(from, place, of_B ? a.at_B.position : a.at_C.position);
    }
  }
  __device__ __forceinline__ void share(const Arguments& a, float* tile) const {
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
      const int item = threadIdx.x + i * THREADS;
      if (item < ITEMS) tile[item] = item % NP < a.states ? widen(ahead[i]) : 0.0f;
    }
  }
};

// Shared memory: an array of its own for each purpose, so that the compiler knows what cannot overlap.
// A kernel is given what it uses. Those of the forward are written again two chunks later.
__shared__ float2 pairs[2][STEPS][CB];               // Δ, u
__shared__ float tiles[2][ITEMS];                    // B, C of each step
__shared__ float4 fours[STEPS][CB];                  // Δ, its slope, u, dy
__shared__ float tile[ITEMS];                        // B, C of each step
__shared__ float partial[STEPS + 1][WARPS][ROW];     // dB, dC of each warp; the last row is not read
extern __shared__ float4 kept[];                     // states before each step, [STEPS][Q][THREADS][V]

// ------------------------------------------------------------------ segments

// It holds less than the kernels that come after it, so more of its blocks are wanted on a multiprocessor.
constexpr int CARRY_BLOCKS = ((R > 8 ? 12 : 24) + WARPS - 1) / WARPS;

// What each segment but the last leaves to the next, from a start of zero; REVERSE: what each but the
// first leaves of the state's gradient to the one before, with dy in x's place and C in B's.
template <bool REVERSE> __device__ __forceinline__ void carry(const Arguments& a) {
  Self self(a, a.segments - 1, REVERSE);
  self.turn = self.d & (Q - 1);  // lanes beyond the last channel do what that one does
  const int length = a.height * a.width, chunks = self.end_chunk - self.first_chunk;
  const XT* x = self.row(a.x, a.at_x) + self.d;
  const DT* delta = self.row(a.delta, a.at_delta) + self.d;
  float rate[R], h[R], span = 0.0f;
#pragma unroll
  for (int r = 0; r < R; r++) {
    const int n = self.state(r);
    rate[r] = n < a.states ? a.rates[((long long)self.group * a.states + n) * a.channels + self.d] : 0.0f;
    h[r] = 0.0f;
  }
  const float shift = a.bias[self.group * a.channels + self.d];

  XT x_ahead[PER];
  DT delta_ahead[PER];
  Weights<1> weights;
  auto fetch = [&](int first) {
    const int position = self.position(a, first);
#pragma unroll
    for (int i = 0; i < PER; i++) {
      const int place = __shfl_sync(~0u, position, self.part * PER + i);
      x_ahead[i] = *at(x, place, a.at_x.position);
      delta_ahead[i] = *at(delta, place, a.at_delta.position);
    }
    weights.fetch(a, self, position);
  };

  constexpr int onwards = REVERSE ? -STEPS : STEPS;
  int first = (REVERSE ? self.end_chunk - 1 : self.first_chunk) * STEPS;
  fetch(first);
  for (int chunk = 0; chunk < chunks; chunk++, first += onwards) {
    float2* inputs = &pairs[chunk & 1][0][self.slot];
    float* tile = tiles[chunk & 1];
    float z[PER], sizes[PER], slopes[PER];
#pragma unroll
    for (int i = 0; i < PER; i++) z[i] = widen(delta_ahead[i]) + shift;
    softplus(z, sizes, slopes);
#pragma unroll
    for (int i = 0; i < PER; i++) {
      const int step = self.part * PER + i;
      const bool valid = first + step < length;  // else the states stay as they are
      const float size = valid ? sizes[i] : 0.0f, value = valid ? widen(x_ahead[i]) : 0.0f;
      span += size;
      inputs[step * CB] = make_float2(size, REVERSE ? value : size * value);
    }
    weights.share(a, tile);
    __syncthreads();
    fetch(first + onwards);

#pragma unroll SINGLY
    for (int i = 0; i < STEPS; i++) {
      const int step = REVERSE ? STEPS - 1 - i : i;
      const float2 input = inputs[step * CB];
#pragma unroll
      for (int q = 0; q < Q; q++) {
        float b[V];
        read_quad(b, tile + step * NP + self.part * R + (q ^ self.turn) * V);
#pragma unroll
        for (int v = 0; v < V; v++) {
          const int r = q * V + v;
          const float decay = power_of_2(input.x * rate[r]), inflow = input.y * b[v];
          h[r] = REVERSE ? decay * (h[r] + inflow) : decay * h[r] + inflow;
        }
      }
    }
  }
  for (int mask = LANES; mask < 32; mask *= 2) span += __shfl_xor_sync(~0u, span, mask);
  float* end = a.ends + ((self.batch * a.segments + self.segment) * gridDim.y + self.group) *
                        (NP + 1) * a.channels + self.d;
#pragma unroll
  for (int r = 0; r < R; r++) end[(self.part * R + r) * a.channels] = h[r];
  end[NP * a.channels] = span;
}
extern "C" __global__ void __launch_bounds__(THREADS, CARRY_BLOCKS) scan_carry(const Arguments a) {
  carry<false>(a);
}
extern "C" __global__ void __launch_bounds__(THREADS, CARRY_BLOCKS) scan_backward_carry(const Arguments a) {
  carry<true>(a);
}

// The state at the start of a segment, from the ends of those before it; REVERSE: the state's gradient
// at its end, from those after it.
template <bool REVERSE>
__device__ __forceinline__ void enter(const Arguments& a, const Self& self, const float (&rate)[R], float (&h)[R]) {
  const int outermost = REVERSE ? a.segments - 1 : 0;
  const long long next = (long long)gridDim.y * (NP + 1) * a.channels;
  const float* end = a.ends + (self.batch * a.segments + outermost) * next +
                     (long long)self.group * (NP + 1) * a.channels + self.d;
#pragma unroll
  for (int r = 0; r < R; r++) h[r] = 0.0f;
  for (int segment = outermost; segment != self.segment; segment += REVERSE ? -1 : 1) {
    const float span = end[NP * a.channels];
#pragma unroll
    for (int r = 0; r < R; r++)
      h[r] = power_of_2(span * rate[r]) * h[r] + end[(self.part * R + r) * a.channels];
    end += REVERSE ? -next : next;
  }
}

// ------------------------------------------------------------------ forward

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan(const Arguments a) {
  Self self(a, a.segments);
  self.turn = self.d & (Q - 1);  // as in `carry`
  const int length = a.height * a.width, chunks = (length + STEPS - 1) / STEPS;
  const XT* x = self.row(a.x, a.at_x) + self.d;
  const DT* delta = self.row(a.delta, a.at_delta) + self.d;
  const int groups = gridDim.y, step_out = groups * a.channels;
  XT* out = a.out + self.batch * length * step_out + self.group * a.channels + self.d;
  float* starts = a.starts + ((self.batch * groups + self.group) * chunks + self.first_chunk) * NP * a.channels +
                  self.part * R * a.channels + self.d;

  float rate[R], h[R];
#pragma unroll
  for (int r = 0; r < R; r++) {
    const int n = self.state(r);
    rate[r] = n < a.states ? a.rates[((long long)self.group * a.states + n) * a.channels + self.d] : 0.0f;
  }
  enter<false>(a, self, rate, h);
  const int of_group = self.group * a.channels + self.d;
  const float weight = a.skip[of_group], shift = a.bias[of_group];

  XT x_ahead[PER];
  DT delta_ahead[PER];
  Weights<2> weights;
  int position;
  auto fetch = [&](int first) {
    position = self.position(a, first);
#pragma unroll
    for (int i = 0; i < PER; i++) {
      const int place = __shfl_sync(~0u, position, self.part * PER + i);
      x_ahead[i] = *at(x, place, a.at_x.position);
      delta_ahead[i] = *at(delta, place, a.at_delta.position);
    }
    weights.fetch(a, self, position);
  };

  fetch(self.first_chunk * STEPS);
  for (int chunk = self.first_chunk; chunk < self.end_chunk; chunk++) {
    const int first = chunk * STEPS;
    float2* inputs = &pairs[chunk & 1][0][self.slot];
    float* tile = tiles[chunk & 1];
    float z[PER], sizes[PER], slopes[PER];
#pragma unroll
    for (int i = 0; i < PER; i++) z[i] = widen(delta_ahead[i]) + shift;
    softplus(z, sizes, slopes);
#pragma unroll
    for (int i = 0; i < PER; i++) {
      const int step = self.part * PER + i;
      const bool valid = first + step < length;  // else the states stay as they are
      inputs[step * CB] = make_float2(valid ? sizes[i] : 0.0f, valid ? widen(x_ahead[i]) : 0.0f);
    }
    weights.share(a, tile);
#pragma unroll
    for (int r = 0; r < R; r++) starts[r * a.channels] = h[r];
    starts += NP * a.channels;
    const int here = position;
    __syncthreads();
    fetch(first + STEPS);

    const float* b_at = tile + self.part * R;
#pragma unroll AT_ONCE
    for (int base = 0; base < STEPS; base += S) {
      const int step = base + self.part, place = __shfl_sync(~0u, here, step);
      float sums[S];
#pragma unroll
      for (int j = 0; j < S; j++) {
        const float2 input = inputs[(base + j) * CB];
        const float inflow = input.x * input.y;
        float sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int q = 0; q < Q; q++) {
          float b[V], c[V];
          read_quad(b, b_at + (base + j) * ROW + (q ^ self.turn) * V);
          read_quad(c, b_at + (base + j) * ROW + NP + (q ^ self.turn) * V);
#pragma unroll
          for (int v = 0; v < V; v++) {
            const int r = q * V + v;
            h[r] = power_of_2(input.x * rate[r]) * h[r] + inflow * b[v];
            sum[v % 2] += h[r] * c[v];
          }
        }
        sums[j] = sum[0] + sum[1];
      }
      sum_parts(sums, self.lane);
      put(at(out, place, step_out * (int)sizeof(XT)), sums[0] + weight * inputs[step * CB].y,
          first + step < length);
    }
  }
}

// ------------------------------------------------------------------ backward

// Sums R numbers of states, in register order, over the channels of a warp: see the top. A sum takes
// LEVELS exchanges, each of which waits for the one before; so that of a step runs while the next
// step is computed. What is left is in v[0..LEFT), for states side by side, in lanes that are `writer`.
__device__ constexpr int log_2(int n) { return n > 1 ? 1 + log_2(n / 2) : 0; }
constexpr int LEVELS = log_2(LANES), BY_TURN = log_2(Q), BY_CHOICE = log_2(V);
constexpr int LEFT = R > LANES ? R / LANES : 1;
struct Sum {
  float v[R];
  int to;       // where the sums of the step go, in `partial`
  float* base;  // where those of row 0 go
  bool writer;

  __device__ __forceinline__ Sum(const Self& self) {
    int first = self.part * R + self.turn * V;
    int mask = Q;
#pragma unroll
    for (int count = V; count > 1 && mask < LANES; count /= 2, mask *= 2)
      first += self.channel & mask ? count / 2 : 0;
    writer = self.channel < mask;
    base = &partial[0][self.warp][first];
  }
  __device__ __forceinline__ void take(const float (&values)[R], int row, int n) {
#pragma unroll
    for (int r = 0; r < R; r++) v[r] = values[r];
    to = row * WARPS * ROW + n;
  }
  template <int LEVEL> __device__ __forceinline__ void exchange(int lane) {
    if constexpr (LEVEL < BY_TURN) {
      constexpr int half = R >> (LEVEL + 1);
#pragma unroll
      for (int i = 0; i < half; i++) v[i] += __shfl_xor_sync(~0u, v[i + half], half / V);
    } else if constexpr (LEVEL < BY_TURN + BY_CHOICE) {
      halve<(V >> (LEVEL - BY_TURN))>(v, lane, Q << (LEVEL - BY_TURN));
    } else if constexpr (LEVEL < LEVELS) {
      v[0] += __shfl_xor_sync(~0u, v[0], Q * V << (LEVEL - BY_TURN - BY_CHOICE));
    }
  }
  // The exchanges that are due while the next step's state of register r is computed.
  __device__ __forceinline__ void advance(int r, int lane) {
    if (r == 0 * R / LEVELS) exchange<0>(lane);
    if (r == 1 * R / LEVELS) exchange<1>(lane);
    if (r == 2 * R / LEVELS) exchange<2>(lane);
    if (r == 3 * R / LEVELS) exchange<3>(lane);
    if (r == 4 * R / LEVELS) exchange<4>(lane);
  }
  __device__ __forceinline__ void keep() const {
    if (writer) {
#pragma unroll
      for (int i = 0; i < LEFT; i++) base[to + i] = v[i];
    }
  }
};

// STEPS steps at a time from the end: forwards to recompute their states and for dC, then backwards.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_backward(const Arguments a) {
  const Self self(a, a.segments);
  Sum sum(self);
  const int length = a.height * a.width, chunks = (length + STEPS - 1) / STEPS;
  const XT* x = self.row(a.x, a.at_x) + self.d;
  const XT* d_y = self.row(a.d_y, a.at_d_y) + self.d;
  const DT* delta = self.row(a.delta, a.at_delta) + self.d;
  DT* d_delta = self.row(a.d_delta, a.at_d_delta) + self.d;
  const int groups = gridDim.y, step_out = groups * a.channels, step_n = groups * a.states;
  const long long row = self.batch * groups + self.group;
  XT* d_x = a.out + self.batch * length * step_out + self.group * a.channels + self.d;
  const float* starts = a.starts + row * chunks * NP * a.channels + self.part * R * a.channels + self.d;
  const long long at_n =
      ((long long)blockIdx.x * (gridDim.z / a.segments) + self.batch) * length * step_n + self.group * a.states;

  float rate[R], d_rate[R], d_h[R], h[R], h_ahead[R];
#pragma unroll
  for (int r = 0; r < R; r++) {
    const int n = self.state(r);
    rate[r] = n < a.states ? a.rates[((long long)self.group * a.states + n) * a.channels + self.d] : 0.0f;
    if (!self.inside) rate[r] = 0.0f;
    d_rate[r] = 0.0f;
  }
  enter<true>(a, self, rate, d_h);
#pragma unroll
  for (int r = 0; r < R; r++) d_h[r] = self.inside ? d_h[r] : 0.0f;
  const int of_group = self.group * a.channels + self.d;
  const float weight = a.skip[of_group], shift = a.bias[of_group];
  float d_weight = 0.0f, d_shift = 0.0f;

  XT x_ahead[PER], d_y_ahead[PER];
  DT delta_ahead[PER];
  Weights<2> weights;
  int position;
  auto fetch = [&](int chunk) {
    position = self.position(a, chunk * STEPS);
#pragma unroll
    for (int i = 0; i < PER; i++) {
      const int place = __shfl_sync(~0u, position, self.part * PER + i);
      x_ahead[i] = *at(x, place, a.at_x.position);
      d_y_ahead[i] = *at(d_y, place, a.at_d_y.position);
      delta_ahead[i] = *at(delta, place, a.at_delta.position);
    }
    weights.fetch(a, self, position);
  };
  auto fetch_start = [&](int chunk) {
    const float* start = starts + (long long)(chunk > 0 ? chunk : 0) * NP * a.channels;
#pragma unroll
    for (int r = 0; r < R; r++) h_ahead[r] = start[r * a.channels];
  };

  fetch(self.end_chunk - 1);
  fetch_start(self.end_chunk - 1);
  for (int chunk = self.end_chunk - 1; chunk >= self.first_chunk; chunk--) {
    const int first = chunk * STEPS, here = position;
    float4* inputs = &fours[0][self.slot];
    float z[PER], sizes[PER], slopes[PER];
#pragma unroll
    for (int i = 0; i < PER; i++) z[i] = widen(delta_ahead[i]) + shift;
    softplus(z, sizes, slopes);
#pragma unroll
    for (int i = 0; i < PER; i++) {
      const int step = self.part * PER + i;
      const bool valid = first + step < length && self.inside;  // else nothing is added
      const float u = valid ? widen(x_ahead[i]) : 0.0f, out = valid ? widen(d_y_ahead[i]) : 0.0f;
      d_weight += out * u;
      inputs[step * CB] = make_float4(valid ? sizes[i] : 0.0f, valid ? slopes[i] : 0.0f, u, out);
    }
    weights.share(a, tile);
#pragma unroll
    for (int r = 0; r < R; r++) h[r] = self.inside ? h_ahead[r] : 0.0f;
    __syncthreads();

    const float* b_at = tile + self.part * R;
    float* kept_at = reinterpret_cast<float*>(kept) + threadIdx.x * V;
    const float none[R] = {};
    sum.take(none, STEPS, 0);
#pragma unroll SINGLY
    for (int i = 0; i < STEPS; i++) {
      const float4 input = inputs[i * CB];
      const float inflow = input.x * input.z;
      float d_c[R];
#pragma unroll
      for (int q = 0; q < Q; q++) {
        float b[V];
        read_quad(b, b_at + i * ROW + (q ^ self.turn) * V);
        write_quad(kept_at + (i * Q + q) * THREADS * V, h + q * V);
#pragma unroll
        for (int v = 0; v < V; v++) {
          const int r = q * V + v;
          h[r] = power_of_2(input.x * rate[r]) * h[r] + inflow * b[v];
          d_c[r] = h[r] * input.w;
          sum.advance(r, self.lane);
        }
      }
      sum.keep();
      sum.take(d_c, i, NP);
    }

    fetch(chunk - 1);
    auto reverse = [&](int base, int steps) {  // S steps, those before `steps`
      const int step = base + self.part, place = __shfl_sync(~0u, here, step);
      float inflows[S], powers[S];
#pragma unroll
      for (int j = S - 1; j >= 0; j--) {
        const int i = base + j;
        inflows[j] = powers[j] = 0.0f;
        if (i >= steps) continue;
        const float4 input = inputs[i * CB];
        const float inflow = input.x * input.z;
        float d_b[R], d_inflow[2] = {0.0f, 0.0f}, d_power[2] = {0.0f, 0.0f};
#pragma unroll
        for (int q = 0; q < Q; q++) {
          float b[V], c[V], before[V];
          read_quad(b, b_at + i * ROW + (q ^ self.turn) * V);
          read_quad(c, b_at + i * ROW + NP + (q ^ self.turn) * V);
          read_quad(before, kept_at + (i * Q + q) * THREADS * V);
#pragma unroll
          for (int v = 0; v < V; v++) {
            const int r = q * V + v;
            d_h[r] += c[v] * input.w;
            d_b[r] = d_h[r] * inflow;
            d_inflow[v % 2] += d_h[r] * b[v];
            d_h[r] *= power_of_2(input.x * rate[r]);
            const float power = d_h[r] * before[v];
            d_power[v % 2] += power * rate[r];
            d_rate[r] += power * input.x;
            sum.advance(r, self.lane);
          }
        }
        sum.keep();
        sum.take(d_b, i, 0);
        inflows[j] = d_inflow[0] + d_inflow[1], powers[j] = d_power[0] + d_power[1];
      }
      sum_parts(inflows, self.lane);
      sum_parts(powers, self.lane);
      const float4 input = inputs[step * CB];
      const float d_raw = (powers[0] * LN_2 + inflows[0] * input.z) * input.y;
      d_shift += d_raw;
      const bool wanted = self.inside && first + step < length;
      put(at(d_x, place, step_out * (int)sizeof(XT)), inflows[0] * input.x + weight * input.w, wanted);
      put(at(d_delta, place, a.at_d_delta.position), d_raw, wanted);
    };
    if (first + STEPS <= length) {
#pragma unroll AT_ONCE
      for (int base = STEPS - S; base >= 0; base -= S) reverse(base, STEPS);
    } else {  // steps beyond the end are left out: a NaN in A must not reach the gradients before
#pragma unroll 1
      for (int base = STEPS - S; base >= 0; base -= S) reverse(base, length - first);
    }
    fetch_start(chunk - 1);  // not before: registers are scarce
#pragma unroll
    for (int r = 0; r < R; r++) sum.advance(r, self.lane);
    sum.keep();
    __syncthreads();

#pragma unroll
    for (int i = 0; i < SHARE; i++) {
      const int item = threadIdx.x + i * THREADS, step = item / ROW, n = item % NP;
      const int place = __shfl_sync(~0u, here, step % 32);
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) total += partial[step % STEPS][w][item % ROW];
      float* d_n = (item % ROW < NP ? a.d_B : a.d_C) + at_n + n;
      store(at(d_n, place, step_n * 4), total, item < ITEMS && n < a.states && first + step < length);
    }
  }

  for (int mask = LANES; mask < 32; mask *= 2) {
    d_weight += __shfl_xor_sync(~0u, d_weight, mask);
    d_shift += __shfl_xor_sync(~0u, d_shift, mask);
  }
  if (self.inside) {
    const long long row = (long long)blockIdx.z * groups + self.group;
#pragma unroll
    for (int r = 0; r < R; r++) {
      const int n = self.state(r);
      if (n < a.states) a.d_rates[(row * a.states + n) * a.channels + self.d] = d_rate[r] * LN_2;
    }
    if (self.part == 0) {
      a.d_skip[row * a.channels + self.d] = d_weight;
      a.d_bias[row * a.channels + self.d] = d_shift;
    }
  }
}
