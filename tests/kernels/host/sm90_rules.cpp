// A small kernel with one of each of what Hopper does on its own, and ways to break a rule by name, each of which the
// emulation must notice.
//
// Arguments: the rule to break, or "none"; then times as set_time takes them.
#include "cuda/sm90.cuh"

namespace q = qwen2vl::sm90;
using q::Element;
using q::Major;

namespace {

std::string broken;
bool breaks(const char* rule) { return broken == rule; }

constexpr int kRows = 64, kColumns = 32, kSwizzle = 64;
constexpr uint32_t kTile = kRows * kSwizzle, kFull = 3 * kTile, kEmpty = kFull + 8, kZeroed = kFull + 16;
constexpr uint32_t kShared = kFull + 32;

void fill(float (&d)[kColumns / 2], float value) {
  for (float& x : d) x = value;
}

// The producer: a (64, 32) and b (32 deep, 64 across), the last 16 rows of b zeroed by its warp.
void produce(const q::TensorMap& map, uint32_t shared) {
  const uint32_t full = shared + kFull, empty = shared + kEmpty, zeroed = shared + kZeroed;
  const bool leads = threadIdx.x == 0;
  for (int round = 0; round < 2; ++round) {
    if (!breaks("no wait for room")) q::mbarrier_wait(empty, static_cast<uint32_t>(round & 1) ^ 1);
    if (leads) {
      q::mbarrier_arrive_expect_tx(full, breaks("fewer bytes expected") ? kTile : 2 * kTile);
      q::tma_load(breaks("copy not aligned") ? shared + 128 : shared, &map, full, 0,
                  breaks("before the tensor") ? -1 : 0, round);
      if (breaks("two copies to one place")) q::tma_load(shared, &map, full, 0, 0, round);
      q::tma_load(breaks("copy leaves memory") ? shared + kFull - kTile + 512 : shared + kTile, &map, full, 0, 0,
                  round);
      if (breaks("too many arrivals")) q::mbarrier_arrive(full);
    }
    if (!breaks("no wait for the copy")) q::mbarrier_wait(full, static_cast<uint32_t>(round & 1));
    for (uint32_t row = 48; row < 64; ++row)
      if (threadIdx.x < 4) q::store_shared(shared + kTile + row * kSwizzle + threadIdx.x * 16, {0, 0, 0, 0});
    if (!breaks("no proxy fence")) q::fence_proxy_async();
    if (!breaks("no __syncwarp")) __syncwarp();
    if (leads) q::mbarrier_arrive(zeroed);
  }
}

// A warpgroup: d (64, 32) = a b by descriptors, then p b with p in registers, and p b with p in shared memory.
void consume(uint32_t shared, float* out) {
  const uint32_t empty = shared + kEmpty, zeroed = shared + kZeroed;
  const uint32_t p_shared = shared + 2 * kTile;
  const uint32_t thread = threadIdx.x % 128, lane = thread % 32;
  for (int round = 0; round < 2; ++round) {
    const auto parity = static_cast<uint32_t>(round & 1);
    float d[kColumns / 2], e[kColumns / 2];
    uint32_t p[4], other[4] = {};
    fill(d, 0);
    fill(e, 0);
    if (!breaks("no wait for zeros")) q::mbarrier_wait(zeroed, breaks("wrong parity") ? parity ^ 1 : parity);
    const auto b_at = [&](int step) {
      return q::matrix_descriptor<kSwizzle>(shared + kTile + static_cast<uint32_t>(step) * 1024, kTile, 512);
    };
    uint64_t a = q::matrix_descriptor<kSwizzle>(shared, 16, 512);
    if (breaks("different descriptors") && thread == 77) a += 2;
    if (breaks("base offset")) a |= 1ull << 49;
    if (breaks("operand leaves memory")) a = q::matrix_descriptor<kSwizzle>(shared + kFull, 16, 512);
    if (!breaks("no wgmma_fence")) {
      if (breaks("accumulators not named"))
        q::wgmma_fence(e);
      else
        q::wgmma_fence(d, e);
    }
    if (breaks("accumulators changed before")) d[1] = 1;
    q::wgmma<Element::kBfloat16, Major::kAcross, true>(d, a, b_at(0));
    q::wgmma<Element::kBfloat16, Major::kAcross, true>(d, q::matrix_descriptor<kSwizzle>(shared + 32, 16, 512),
                                                       b_at(1));
    if (breaks("another shape in flight")) {
      float (&half)[kColumns / 4] = *reinterpret_cast<float (*)[kColumns / 4]>(&d);
      q::wgmma<Element::kBfloat16, Major::kAcross, true>(half, a, b_at(0));
    }
    if (!breaks("not committed")) q::wgmma_commit_group();
    if (breaks("accumulators changed")) d[3] = 1;
    const float early = d[0];
    if (breaks("waits for too little")) {
      q::wgmma_wait_group<1>(d);
    } else if (breaks("wait without names")) {
      q::wgmma_wait_group<0>();
    } else {
      q::wgmma_wait_group<0>(d);
    }
    for (int i = 0; i < 4; ++i) p[i] = q::pack<Element::kBfloat16>(d[2 * i], d[2 * i + 1]);
    if (breaks("a not named"))
      q::wgmma_fence(e, d);
    else
      q::wgmma_fence(e, p);
    if (breaks("a changed before")) p[1] ^= 1;
    q::wgmma<Element::kBfloat16, Major::kAcross, true>(e, breaks("a of nobody") ? other : p, b_at(0));
    q::wgmma_commit_group();
    if (breaks("a changed in flight")) p[2] = 0;
    q::wgmma_wait_group<0>(e, p);

    const uint32_t row = thread / 32 * 16 + lane % 16;
    const uint32_t at = p_shared + row * 32 + (lane / 16 ^ row / 4 % 2) * 16;
    q::stmatrix<4>(breaks("stmatrix not aligned") ? at + 8 : at, p);
    if (!breaks("no proxy fence behind stmatrix")) q::fence_proxy_async();
    if (!breaks("no barrier behind stmatrix"))
      q::named_barrier_sync(breaks("more than 16 barriers") ? 16 : 2,
                            breaks("barrier's threads") && lane == 0 ? 96 : 128);
    if (breaks("two counts at a barrier")) q::named_barrier_sync(3, thread < 32 ? 64 : 128);
    if (breaks("nobody waits at a barrier")) q::named_barrier_arrive(3, 128);
    if (breaks("barrier 0")) q::named_barrier_sync(0, 96);
    q::wgmma_fence(e);
    q::wgmma<Element::kBfloat16, Major::kAcross, true>(e, q::matrix_descriptor<32>(p_shared, 16, 256), b_at(0));
    q::wgmma_commit_group();
    if (breaks("released too early") && thread == 0) q::mbarrier_arrive(empty);
    if (breaks("ends in flight") && round == 1) return;
    q::wgmma_wait_group<0>(e);
    if (!breaks("released too early") && !breaks("never released") && thread == 0) q::mbarrier_arrive(empty);
    // Each warp's own rows of p serve to exchange numbers, which comes after the wgmma of all four has read them.
    const uint32_t staging = p_shared + thread / 32 * 512;
    q::store_shared(staging + lane * 16, {lane, lane, lane, lane});
    if (!breaks("no __syncwarp behind a store")) __syncwarp();
    const uint4 got = q::load_shared(staging + (31 - lane) * 16 + (breaks("load not aligned") ? 4 : 0));
    if (got.x != 31 - lane || breaks("read in flight")) d[0] = got.x != 31 - lane ? NAN : early;
    if (breaks("load leaves memory")) q::load_shared(shared + (kShared + 15) / 16 * 16);
    if (breaks("load of an mbarrier")) q::load_shared(shared + kFull);
    if (!breaks("no barrier behind a load")) q::named_barrier_sync(6, 128);
    q::store_shared(p_shared + (127 - thread) * 16, {});
    q::named_barrier_sync(6, 128);
    for (int i = 0; i < kColumns / 2; ++i)
      out[(thread / 32 * 16 + lane / 4 + i % 4 / 2 * 8) * kColumns + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
  }
}

void kernel(const q::TensorMap& map, float* out) {
  QWEN2VL_DYNAMIC_SHARED(char, dynamic);
  const uint32_t shared = q::shared_address(dynamic);
  if (breaks("pointer into shared memory") && threadIdx.x == 7) dynamic[0] = 0;
  if (threadIdx.x == 0) {
    q::mbarrier_init(shared + kFull + (breaks("mbarrier not aligned") ? 4 : 0), 1);
    if (breaks("initialised twice")) q::mbarrier_init(shared + kFull, 1);
    if (!breaks("not initialised")) q::mbarrier_init(shared + kEmpty, 1);
    q::mbarrier_init(shared + kZeroed, 1);
    if (!breaks("no fence of the initialisation")) q::fence_mbarrier_init();
  }
  if (!breaks("no __syncthreads")) __syncthreads();
  if (threadIdx.x / 128 != 1) {
    q::setmaxnreg_dec<128>();  // two of three warpgroups, of which one does nothing
    if (threadIdx.x < 32) produce(map, shared);
  } else {
    if (breaks("too many registers"))
      q::setmaxnreg_inc<256>();
    else if (breaks("fewer registers by inc"))
      q::setmaxnreg_inc<40>();
    else if (!breaks("registers that nobody took"))
      q::setmaxnreg_inc<248>();
    if (breaks("lanes part") && threadIdx.x % 32 < 16) __shfl_sync(~0u, 1, 0);
    consume(shared, out);
  }
}

}  // namespace

int main(int count, char** arguments) {
  broken = arguments[1];
  std::vector<uint16_t> numbers(2 * kRows * kColumns);
  std::vector<float> out(kRows * kColumns);
  for (size_t i = 0; i < numbers.size(); ++i)
    numbers[i] = on_host::sm90::float_to_bfloat16(static_cast<float>(i * 7 % 31) / 16 - 1);
  struct {
    const void* data;
    int rank;
    uint64_t sizes[3], strides[2];
    uint32_t box[3];
    int swizzle;
  } tensor{numbers.data(),       3,       {kColumns, kRows, 2}, {2 * kColumns, 2 * kColumns * kRows},
           {kColumns, kRows, 1}, kSwizzle};
  if (breaks("map of an odd address")) tensor.data = numbers.data() + 4;
  if (breaks("map of an odd stride")) tensor.strides[0] += 8;
  if (breaks("map of a narrow box")) tensor.box[0] = kColumns / 2;
  if (breaks("map of a long box")) tensor.box[1] = 257;
  const q::TensorMap map = on_host::tensor_map(tensor);
  for (int argument = 2; argument < count; ++argument) {
    on_host::set_time(arguments[argument]);
    out.assign(out.size(), NAN);
    on_host::run_grid(2, 384, kShared, [&] { kernel(map, out.data()); });
    // What the second round of the last block left: a b with b's rows from 48 on not in the sum.
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kColumns; ++j) {
        const uint16_t* const last = numbers.data() + kRows * kColumns;
        double want = 0;
        for (int k = 0; k < 32; ++k)
          want += static_cast<double>(on_host::sm90::number_of(last[i * kColumns + k], true)) *
                  on_host::sm90::number_of(last[k * kColumns + j], true);
        if (!(std::abs(want - out[i * kColumns + j]) < 1e-3)) {
          std::fprintf(stderr, "time %s: wrong sum in row %d, column %d\n", arguments[argument], i, j);
          return 1;
        }
      }
  }
}
