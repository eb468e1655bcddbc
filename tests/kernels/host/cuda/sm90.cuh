// The second implementation of csrc/cuda/sm90.cuh, for the host: what is asynchronous there happens late, early or in
// another order here, and what the PTX ISA does not allow ends the program (sm90/).
//
// A kernel includes "cuda/sm90.cuh"; this folder's parent comes before csrc among the include folders.
#pragma once

#include "../sm90/wgmma.h"

namespace qwen2vl::sm90 {

using TensorMap = on_host::sm90::TensorMap;

enum class Element { kBfloat16, kFloat16 };
enum class Major { kDepth, kAcross };

inline uint32_t shared_address(const void* pointer) {
  return on_host::sm90::kWindow +
         static_cast<uint32_t>(static_cast<const char*>(pointer) - on_host::dynamic_shared_window);
}

#define QWEN2VL_HERE on_host::Where where = on_host::Where::here()

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals, QWEN2VL_HERE) {
  if (on_host::passes("mbarrier_init", where)) on_host::sm90::init_mbarrier(barrier, arrivals);
}

inline void fence_mbarrier_init(QWEN2VL_HERE) {
  if (on_host::passes("fence_mbarrier_init", where)) on_host::sm90::fence_initialised();
}

inline void mbarrier_arrive(uint32_t barrier, QWEN2VL_HERE) {
  if (on_host::passes("mbarrier_arrive", where)) on_host::sm90::arrive(barrier);
}

// Two calls that can be left out: "expect_tx" is the first half.
inline void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes, QWEN2VL_HERE) {
  if (on_host::passes("expect_tx", where)) on_host::sm90::expect_bytes(barrier, bytes);
  if (on_host::passes("mbarrier_arrive_expect_tx", where)) on_host::sm90::arrive(barrier);
}

inline void mbarrier_wait(uint32_t barrier, uint32_t parity, QWEN2VL_HERE) {
  if (on_host::passes("mbarrier_wait", where)) on_host::sm90::wait_phase(barrier, parity);
}

inline void prefetch_tensormap(const TensorMap*) {}

inline void tma_load(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2, QWEN2VL_HERE) {
  const int coordinates[] = {c0, c1, c2};
  if (on_host::passes("tma_load", where)) on_host::sm90::issue_copy(to, *map, barrier, 3, coordinates, where);
}

inline void tma_load(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2, int c3,
                     QWEN2VL_HERE) {
  const int coordinates[] = {c0, c1, c2, c3};
  if (on_host::passes("tma_load", where)) on_host::sm90::issue_copy(to, *map, barrier, 4, coordinates, where);
}

inline void store_shared(uint32_t address, uint4 value, QWEN2VL_HERE) {
  if (on_host::passes("store_shared", where)) on_host::sm90::store(address, value, where);
}

inline uint4 load_shared(uint32_t address, QWEN2VL_HERE) {
  on_host::passes("load_shared", where);
  return on_host::sm90::load(address);
}

template <int Matrices>
void stmatrix(uint32_t address, const uint32_t* fragments, QWEN2VL_HERE) {
  static_assert(Matrices == 1 || Matrices == 2 || Matrices == 4);
  if (on_host::passes("stmatrix", where)) on_host::sm90::store_matrices(Matrices, address, fragments, where);
}

inline void fence_proxy_async(QWEN2VL_HERE) {
  if (on_host::passes("fence_proxy_async", where)) on_host::order.fence(threadIdx.x);
}

inline void named_barrier_sync(uint32_t barrier, uint32_t threads, QWEN2VL_HERE) {
  if (on_host::passes("named_barrier_sync", where)) on_host::come_to_barrier(barrier, threads, true);
}

inline void named_barrier_arrive(uint32_t barrier, uint32_t threads, QWEN2VL_HERE) {
  if (on_host::passes("named_barrier_arrive", where)) on_host::come_to_barrier(barrier, threads, false);
}

template <int Registers>
void setmaxnreg_dec(QWEN2VL_HERE) {
  if (on_host::passes("setmaxnreg_dec", where)) on_host::sm90::set_registers(Registers, false);
}

template <int Registers>
void setmaxnreg_inc(QWEN2VL_HERE) {
  if (on_host::passes("setmaxnreg_inc", where)) on_host::sm90::set_registers(Registers, true);
}

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}

template <Element E>
uint32_t pack(float low, float high) {
  const auto bits = [](float x) -> uint32_t {
    return E == Element::kBfloat16 ? on_host::sm90::float_to_bfloat16(x) : on_host::sm90::float_to_half(x);
  };
  return bits(high) << 16 | bits(low);
}

template <int Swizzle>
uint64_t matrix_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  static_assert(Swizzle == 32 || Swizzle == 64 || Swizzle == 128);
  constexpr uint64_t kLayout = Swizzle == 128 ? 1 : Swizzle == 64 ? 2 : 3;
  if (on_host::options.mutate == "stride") stride_bytes += 8 * Swizzle;
  if (on_host::options.mutate == "leading") leading_bytes += 8 * Swizzle;
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | kLayout << 62;
}

// Nothing to keep in place: the emulation reads and writes arrays in memory.
template <class T, int Count>
void pin(T (&)[Count]) {}

using on_host::sm90::Named;

inline void wgmma_fence(Named a = {}, Named b = {}, Named c = {}, Named d = {}, Named e = {}, Named f = {},
                        QWEN2VL_HERE) {
  if (on_host::passes("wgmma_fence", where)) on_host::sm90::fence_registers({a, b, c, d, e, f});
}

inline void wgmma_commit_group(QWEN2VL_HERE) {
  if (on_host::passes("wgmma_commit_group", where)) on_host::sm90::commit_group();
}

template <int Pending>
void wgmma_wait_group(Named a = {}, Named b = {}, Named c = {}, Named d = {}, Named e = {}, Named f = {},
                      QWEN2VL_HERE) {
  if (on_host::passes("wgmma_wait_group", where)) on_host::sm90::wait_group(Pending, {a, b, c, d, e, f});
}

template <Element E, Major B, bool Accumulate, int Half>
void wgmma(float (&d)[Half], uint64_t a, uint64_t b, QWEN2VL_HERE) {
  static_assert(Half % 4 == 0 && Half >= 4 && Half <= 128);
  if (on_host::passes("wgmma", where))
    on_host::sm90::issue({2 * Half, E == Element::kBfloat16, B == Major::kAcross, Accumulate, false, a, b}, d, nullptr,
                         where);
}

template <Element E, Major B, bool Accumulate, int Half>
void wgmma(float (&d)[Half], const uint32_t* a, uint64_t b, QWEN2VL_HERE) {
  static_assert(Half % 4 == 0 && Half >= 4 && Half <= 128);
  if (on_host::passes("wgmma", where))
    on_host::sm90::issue({2 * Half, E == Element::kBfloat16, B == Major::kAcross, Accumulate, true, 0, b}, d, a, where);
}

#undef QWEN2VL_HERE

}  // namespace qwen2vl::sm90

namespace on_host {

using sm90::tensor_map;

// Runs a kernel for Hopper as blocks of `threads` threads one after the other, in an order drawn from the seed, each
// with `shared_bytes` of dynamic shared memory.
inline void run_grid(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (threads % kWarp != 0 || threads > 1024 || shared_bytes > 227 * 1024) {
    std::fprintf(stderr, "a block of %u threads with %zu bytes of shared memory\n", threads, shared_bytes);
    std::_Exit(kFailed);
  }
  if (engine.sources.empty()) {
    engine.at_exit.push_back(sm90::leave_tensor_cores);
    engine.sources = {&sm90::copies, &sm90::cores};
    set_time(now.name);
  }
  gridDim = {blocks, 1, 1};
  std::vector<unsigned> left(blocks);
  for (unsigned i = 0; i < blocks; ++i) left[i] = i;
  for (; !left.empty(); left.pop_back()) {
    std::swap(left[random_below(static_cast<unsigned>(left.size()))], left.back());
    order.configure(threads, sm90::kMaxBarriers, (threads + sm90::kGroup - 1) / sm90::kGroup);
    sm90::memory.reset(shared_bytes);
    sm90::mbarriers.reset();
    sm90::registers.reset(threads);
    sm90::cores.reset(threads);
    run_block(left.back(), threads, kernel);
    if (sm90::copies.pending()) fail_at("tma_load", sm90::copies.all[0].where, "is in flight when the block ends");
    if (sm90::registers.free >= 8 * sm90::kGroup)
      fail_at("setmaxnreg_dec", {}, "%lld registers that nobody took", static_cast<long long>(sm90::registers.free));
  }
  order.configure(0, 0, 0);
  if (options.list) list_sites();
}

}  // namespace on_host
