// All PTX of the project: one small function an instruction, named by the PTX ISA's terms, for Hopper (sm_90a).
//
// Shared memory is addressed in its own window, by 32 bits. tests/kernels/host has a second implementation of these
// functions, in which what is asynchronous happens late, early or in another order.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace qwen2vl::sm90 {

using TensorMap = CUtensorMap;

enum class Element { kBfloat16, kFloat16 };
// How an operand of wgmma lies in shared memory: along the rows of the product's depth (as q and k), or across (as v).
enum class Major { kDepth, kAcross };

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ------------------------------------------------------------------------------------- mbarrier: phases, transactions

// mbarrier.init: a phase ends when `arrivals` have arrived and all transaction bytes of the phase have come.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// fence.mbarrier_init: what follows, copies among it, sees initialised barriers.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// mbarrier.arrive.expect_tx: arrives, and the phase waits for `bytes` more.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// mbarrier.try_wait.parity until the phase of that parity has ended; before the first phase, the one of parity 1 has.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// --------------------------------------------------------------------------------------- TMA: tiles of global memory

__device__ __forceinline__ void prefetch_tensormap(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// cp.async.bulk.tensor: the map's box at these coordinates, zeros where it leaves the tensor; `barrier` counts its
// bytes.
__device__ __forceinline__ void tma_load(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

__device__ __forceinline__ void tma_load(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2,
                                         int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// --------------------------------------------------------------------------- generic accesses to shared memory, fences

__device__ __forceinline__ void store_shared(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

// stmatrix: `Matrices` of 8 x 8 16-bit numbers in the fragment layout; lane 8 m + r says where row r of matrix m goes.
template <int Matrices>
__device__ __forceinline__ void stmatrix(uint32_t address, const uint32_t* fragments) {
  static_assert(Matrices == 1 || Matrices == 2 || Matrices == 4);
  if constexpr (Matrices == 4) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(fragments[0]),
                 "r"(fragments[1]), "r"(fragments[2]), "r"(fragments[3])
                 : "memory");
  } else if constexpr (Matrices == 2) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(fragments[0]),
                 "r"(fragments[1])
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(address), "r"(fragments[0]) : "memory");
  }
}

// fence.proxy.async: what this thread stored to shared memory is there for wgmma and TMA.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ------------------------------------------------------------------------------------------------------ warps,
// registers

// barrier.cta.sync and barrier.cta.arrive on one of the block's 16 barriers, of `threads` in all; 0 is __syncthreads'.
__device__ __forceinline__ void named_barrier_sync(uint32_t barrier, uint32_t threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(uint32_t barrier, uint32_t threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// setmaxnreg: registers that a thread of this warpgroup may use, given back or taken from what others gave back.
template <int Registers>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// ---------------------------------------------------------------------------------------------------------- arithmetic

// ex2.approx.ftz: 2^x to two units in the last place; 0 for minus infinity.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers in one register, the first in the low half.
template <Element E>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t both;
  if constexpr (E == Element::kBfloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  }
  return both;
}

// --------------------------------------------------------------------------------------- wgmma: warpgroups of 4 warps

// The matrix descriptor of an operand in shared memory. Rows of `Swizzle` bytes, 8 to a core matrix, lie in one atom.
// Depth-major: `stride_bytes` between groups of 8 rows, `leading_bytes` is not read. Across: `stride_bytes` between
// groups of 8 along the depth, `leading_bytes` between atoms across.
template <int Swizzle>
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  static_assert(Swizzle == 32 || Swizzle == 64 || Swizzle == 128);
  constexpr uint64_t kLayout = Swizzle == 128 ? 1 : Swizzle == 64 ? 2 : 3;
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | kLayout << 62;
}

// Pins registers where they are: the compiler may not move what writes them across this point.
template <int Count>
__device__ __forceinline__ void pin(float (&registers)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int Count>
__device__ __forceinline__ void pin(uint32_t (&registers)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// wgmma.fence: orders what wrote `registers` before the wgmma that read or add to them. All that follow must be named.
template <class... Registers>
__device__ __forceinline__ void wgmma_fence(Registers&... registers) {
  (pin(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// wgmma.wait_group: all but the last `Pending` groups have ended; `registers` are those that they wrote or read.
template <int Pending, class... Registers>
__device__ __forceinline__ void wgmma_wait_group(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
  (pin(registers), ...);
}

template <int N>
struct Wgmma;

#define QWEN2VL_D32                                                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define QWEN2VL_D36 QWEN2VL_D32 ", %32, %33, %34, %35"
#define QWEN2VL_D40 QWEN2VL_D36 ", %36, %37, %38, %39"
#define QWEN2VL_D48 QWEN2VL_D40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define QWEN2VL_D56 QWEN2VL_D48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define QWEN2VL_D64 QWEN2VL_D56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define QWEN2VL_D72 QWEN2VL_D64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define QWEN2VL_D80 QWEN2VL_D72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define QWEN2VL_D88 QWEN2VL_D80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define QWEN2VL_C4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define QWEN2VL_C8(i) QWEN2VL_C4(i), QWEN2VL_C4(i + 4)
#define QWEN2VL_C32 QWEN2VL_C8(0), QWEN2VL_C8(8), QWEN2VL_C8(16), QWEN2VL_C8(24)
#define QWEN2VL_C36 QWEN2VL_C32, QWEN2VL_C4(32)
#define QWEN2VL_C40 QWEN2VL_C36, QWEN2VL_C4(36)
#define QWEN2VL_C48 QWEN2VL_C40, QWEN2VL_C8(40)
#define QWEN2VL_C56 QWEN2VL_C48, QWEN2VL_C8(48)
#define QWEN2VL_C64 QWEN2VL_C56, QWEN2VL_C8(56)
#define QWEN2VL_C72 QWEN2VL_C64, QWEN2VL_C8(64)
#define QWEN2VL_C80 QWEN2VL_C72, QWEN2VL_C8(72)
#define QWEN2VL_C88 QWEN2VL_C80, QWEN2VL_C8(80)

// PTX counts operands through: n0 and those that follow are the numbers behind the N / 2 accumulators.
#define QWEN2VL_WGMMA_SS(N, R, TYPE, n0, n1, n2, n3)                                             \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #n2                                            \
               ", 0;\n"                                                                          \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" QWEN2VL_D##R \
               "}, %" #n0 ", %" #n1 ", p, 1, 1, 0, %" #n3 "; }"                                  \
               : QWEN2VL_C##R                                                                    \
               : "l"(a), "l"(b), "n"(Accumulate), "n"(B == Major::kAcross))
#define QWEN2VL_WGMMA_RS(N, R, TYPE, n0, n1, n2, n3, n4, n5, n6)                                 \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #n5                                            \
               ", 0;\n"                                                                          \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" QWEN2VL_D##R \
               "}, {%" #n0 ", %" #n1 ", %" #n2 ", %" #n3 "}, %" #n4 ", p, 1, 1, %" #n6 "; }"     \
               : QWEN2VL_C##R                                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(Accumulate), "n"(B == Major::kAcross))
#define QWEN2VL_WGMMA(N, R, n0, n1, n2, n3, n4, n5, n6)                                          \
  template <>                                                                                    \
  struct Wgmma<N> {                                                                              \
    template <Element E, Major B, bool Accumulate>                                               \
    __device__ __forceinline__ static void issue(float (&d)[R], uint64_t a, uint64_t b) {        \
      if constexpr (E == Element::kBfloat16) {                                                   \
        QWEN2VL_WGMMA_SS(N, R, "bf16", n0, n1, n2, n3);                                          \
      } else {                                                                                   \
        QWEN2VL_WGMMA_SS(N, R, "f16", n0, n1, n2, n3);                                           \
      }                                                                                          \
    }                                                                                            \
    template <Element E, Major B, bool Accumulate>                                               \
    __device__ __forceinline__ static void issue(float (&d)[R], const uint32_t* a, uint64_t b) { \
      if constexpr (E == Element::kBfloat16) {                                                   \
        QWEN2VL_WGMMA_RS(N, R, "bf16", n0, n1, n2, n3, n4, n5, n6);                              \
      } else {                                                                                   \
        QWEN2VL_WGMMA_RS(N, R, "f16", n0, n1, n2, n3, n4, n5, n6);                               \
      }                                                                                          \
    }                                                                                            \
  }

QWEN2VL_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38);
QWEN2VL_WGMMA(72, 36, 36, 37, 38, 39, 40, 41, 42);
QWEN2VL_WGMMA(80, 40, 40, 41, 42, 43, 44, 45, 46);
QWEN2VL_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54);
QWEN2VL_WGMMA(112, 56, 56, 57, 58, 59, 60, 61, 62);
QWEN2VL_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70);
QWEN2VL_WGMMA(144, 72, 72, 73, 74, 75, 76, 77, 78);
QWEN2VL_WGMMA(160, 80, 80, 81, 82, 83, 84, 85, 86);
QWEN2VL_WGMMA(176, 88, 88, 89, 90, 91, 92, 93, 94);

#undef QWEN2VL_WGMMA
#undef QWEN2VL_WGMMA_RS
#undef QWEN2VL_WGMMA_SS

// wgmma.mma_async m64nNk16: d (64, N) = a (64, 16) b (16, N), added to d if Accumulate. a by its descriptor
// (depth-major) or 4 registers a thread; d and a in registers as the PTX ISA's figures of wgmma fragments show: thread
// t of the warpgroup holds rows t / 32 * 16 + t % 32 / 4 (+ 8), d[4 j + 2 r + c] in column 8 j + t % 4 * 2 + c of row +
// 8 r.
template <Element E, Major B, bool Accumulate, int Half>
__device__ __forceinline__ void wgmma(float (&d)[Half], uint64_t a, uint64_t b) {
  Wgmma<2 * Half>::template issue<E, B, Accumulate>(d, a, b);
}

template <Element E, Major B, bool Accumulate, int Half>
__device__ __forceinline__ void wgmma(float (&d)[Half], const uint32_t* a, uint64_t b) {
  Wgmma<2 * Half>::template issue<E, B, Accumulate>(d, a, b);
}

}  // namespace qwen2vl::sm90
