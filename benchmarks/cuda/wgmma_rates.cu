// How fast the tensor cores of a Hopper card run warpgroup matrix products m64 nN k16 (bfloat16, float32 sums), by the
// width N, by where A comes from, and by what the next product waits for. benchmarks/wgmma.py builds it as a library,
// after writing wgmma_shapes.h: Wgmma<N> with the two instructions of a width, and WGMMA_WIDTHS(X), which names all.

#include <cuda_runtime.h>
#include <cstdint>

#include "wgmma_shapes.h"

namespace {

constexpr int kProducts = 16;  // of an iteration
constexpr int kSteps = 4;      // these go round a tile of 64 columns, 16 at a time
constexpr int kMaxGroups = 2;
constexpr int kBlockBytes = 256 * 32;  // of one step's operand: 256 rows of 16 columns
constexpr int kShared = 2 * kSteps * kBlockBytes + 1024;

enum Form {
  kIndependent,  // two accumulators take turns
  kChained,      // every product adds to the one before, nothing waits in between
  kAwaited,      // the same, and each is waited for before the next one is issued
};

// PTX ISA, matrix descriptor: address, and stride between groups of 8 rows, in units of 16 bytes; then the swizzle.
__device__ uint64_t descriptor(uint32_t address, uint32_t stride, uint64_t swizzle) {
  return (address >> 4 & 0x3fff) | uint64_t{1} << 16 | uint64_t{stride >> 4} << 32 | swizzle << 62;
}

__device__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kLeft>
__device__ void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// Pairs of bfloat16: ones, whose products are known whatever the layout, or numbers of 1 to 2 with random signs, which
// take the power that a real product takes.
__device__ uint32_t pair(bool ones, uint32_t at) {
  return ones ? 0x3f803f80u : 0x3f803f80u | ((at * 2654435761u ^ at >> 7) & 0x807f807fu);
}

// What a launch did: cycles of each block, and accumulators that do not hold `expected` (where that is positive).
template <int N, bool kRegisters, Form kForm>
__global__ void __launch_bounds__(128 * kMaxGroups, 1)
    products(int iterations, bool ones, bool wide, float expected, long long* cycles, int* wrong) {
  extern __shared__ uint8_t memory[];
  const uint32_t begin = (static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + 1023) & ~1023u;
  for (uint32_t at = 4 * threadIdx.x; at < kShared - 1024; at += 4 * blockDim.x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(begin + at), "r"(pair(ones, at)) : "memory");
  }
  asm volatile("fence.proxy.async;" ::: "memory");  // the tensor cores read shared memory by another way
  // Rows of 32 bytes, a step's 16 columns, in blocks; or, `wide`, rows of 128 bytes with all steps in them.
  const uint32_t step = wide ? 32 : kBlockBytes, stride = wide ? 1024 : 256;
  const uint64_t swizzle = wide ? 1 : 3;
  const uint64_t first_a = descriptor(begin, stride, swizzle);
  const uint64_t first_b = descriptor(begin + kSteps * kBlockBytes, stride, swizzle);

  constexpr int kSums = N / 2;  // of a thread
  constexpr int kAccumulators = kForm == kIndependent ? 2 : 1;
  float sums[kAccumulators][kSums];
  for (auto& accumulator : sums) {
    for (float& sum : accumulator) sum = 0;
  }
  uint32_t a[kSteps][4];
  for (int i = 0; i < 4 * kSteps; ++i) a[i / 4][i % 4] = pair(ones, threadIdx.x * 64 + i);

  __syncthreads();
  const long long start = clock64();
#pragma unroll 1
  for (int iteration = 0; iteration < iterations; ++iteration) {
    fence();
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      const uint64_t offset = i % kSteps * step >> 4;
      auto& accumulator = sums[i % kAccumulators];
      if constexpr (kRegisters) {
        Wgmma<N>::registers(accumulator, a[i % kSteps], first_b + offset);
      } else {
        Wgmma<N>::shared(accumulator, first_a + offset, first_b + offset);
      }
      if constexpr (kForm == kAwaited) {
        commit();
        wait<0>();
        if (i + 1 < kProducts) fence();
      }
    }
    if constexpr (kForm != kAwaited) {
      commit();
      wait<1>();  // the next iteration's are issued while these run
    }
  }
  wait<0>();
  const long long end = clock64();

  int differ = 0;
  float total = 0;
  for (auto& accumulator : sums) {
    for (float sum : accumulator) {
      differ += sum != expected;
      total += sum;
    }
  }
  if (expected > 0 ? differ > 0 : total == 0.12345f) atomicAdd(wrong, differ);
  if (threadIdx.x == 0) cycles[blockIdx.x] = end - start;
}

struct Memory {  // freed whatever happens
  void* at = nullptr;
  ~Memory() { cudaFree(at); }
};

struct Events {
  cudaEvent_t begin = nullptr, end = nullptr;
  ~Events() {
    if (begin) cudaEventDestroy(begin);
    if (end) cudaEventDestroy(end);
  }
};

}  // namespace

// Of one launch: seconds by events, the mean of the blocks' cycles, accumulators that are not what ones make.
struct Sample {
  double seconds;
  double cycles;
  int wrong;
  int multiprocessors;
  double clock_hz;  // the card's highest
};

namespace {

#define RETURN_IF_ERROR(call) \
  if (cudaError_t error = (call); error != cudaSuccess) return cudaGetErrorString(error)

template <int N, bool kRegisters, Form kForm>
const char* run(int groups, int iterations, bool ones, bool wide, Sample* sample) {
  int device = 0, processors = 0, kilohertz = 0;
  RETURN_IF_ERROR(cudaGetDevice(&device));
  RETURN_IF_ERROR(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  RETURN_IF_ERROR(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrClockRate, device));
  const auto kernel = products<N, kRegisters, kForm>;
  RETURN_IF_ERROR(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  Memory cycles, wrong;
  RETURN_IF_ERROR(cudaMalloc(&cycles.at, processors * sizeof(long long)));
  RETURN_IF_ERROR(cudaMalloc(&wrong.at, sizeof(int)));
  RETURN_IF_ERROR(cudaMemset(wrong.at, 0, sizeof(int)));
  Events events;
  RETURN_IF_ERROR(cudaEventCreate(&events.begin));
  RETURN_IF_ERROR(cudaEventCreate(&events.end));
  // A product of ones adds 16 to every element; two accumulators share the products.
  const float expected = ones ? 16.0f * kProducts * iterations / (kForm == kIndependent ? 2 : 1) : -1.0f;
  RETURN_IF_ERROR(cudaEventRecord(events.begin));
  kernel<<<processors, 128 * groups, kShared>>>(iterations, ones, wide, expected, static_cast<long long*>(cycles.at),
                                                static_cast<int*>(wrong.at));
  RETURN_IF_ERROR(cudaGetLastError());
  RETURN_IF_ERROR(cudaEventRecord(events.end));
  RETURN_IF_ERROR(cudaEventSynchronize(events.end));
  float milliseconds = 0;
  RETURN_IF_ERROR(cudaEventElapsedTime(&milliseconds, events.begin, events.end));
  long long of_block[1024];
  const int blocks = processors < 1024 ? processors : 1024;
  RETURN_IF_ERROR(cudaMemcpy(of_block, cycles.at, blocks * sizeof(long long), cudaMemcpyDeviceToHost));
  RETURN_IF_ERROR(cudaMemcpy(&sample->wrong, wrong.at, sizeof(int), cudaMemcpyDeviceToHost));
  double sum = 0;
  for (int i = 0; i < blocks; ++i) sum += static_cast<double>(of_block[i]);
  sample->seconds = milliseconds * 1e-3;
  sample->cycles = sum / blocks;
  sample->multiprocessors = processors;
  sample->clock_hz = kilohertz * 1e3;
  return nullptr;
}

template <int N, bool kRegisters>
const char* pick(int form, int groups, int iterations, bool ones, bool wide, Sample* sample) {
  // Two accumulators of wider products are more registers than ptxas keeps apart without guards.
  if constexpr (N <= 128) {
    if (form == kIndependent) return run<N, kRegisters, kIndependent>(groups, iterations, ones, wide, sample);
  }
  if (form == kChained) return run<N, kRegisters, kChained>(groups, iterations, ones, wide, sample);
  if (form == kAwaited) return run<N, kRegisters, kAwaited>(groups, iterations, ones, wide, sample);
  return "no such form at this width";
}

}  // namespace

// One launch on every multiprocessor, in the current device's default stream. Returns nullptr, or what went wrong.
extern "C" const char* wgmma_rate(int width, int registers, int form, int groups, int iterations, int ones, int wide,
                                  Sample* sample) {
  if (groups < 1 || groups > kMaxGroups) return "groups must be 1 or 2";
  switch (width) {
#define CASE(N)                                                                    \
  case N:                                                                          \
    return registers ? pick<N, true>(form, groups, iterations, ones, wide, sample) \
                     : pick<N, false>(form, groups, iterations, ones, wide, sample);
    WGMMA_WIDTHS(CASE)
#undef CASE
  }
  return "this width was not built";
}
