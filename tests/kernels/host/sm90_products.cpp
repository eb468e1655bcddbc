// Products of 64 rows through TMA, mbarriers and wgmma in the emulation, against plain loops.
//
// Arguments: times as set_time takes them; prints one line a product.
#include "cuda/sm90.cuh"

namespace q = qwen2vl::sm90;
using q::Element;
using q::Major;

constexpr int kDepth = 128, kStep = 64, kStages = 2;

// out (64, N) = a (64, kDepth) b; b lies as (N, kDepth) depth-major, or (kDepth, N) across. a by descriptors, or from
// global memory in registers.
template <int N, Element E, Major B, int Swizzle, bool Registers>
void product(const q::TensorMap& a_map, const q::TensorMap& b_map, const uint16_t* a_global, float* out) {
  constexpr int C = Swizzle / 2, kBlocks = B == Major::kDepth ? kStep / C : (N + C - 1) / C;
  constexpr int kRows = B == Major::kDepth ? N : kStep;
  constexpr uint32_t kBlockBytes = (kRows * Swizzle + 8 * Swizzle - 1) / (8 * Swizzle) * (8 * Swizzle);
  constexpr uint32_t kABytes = 64 * kStep * 2, kBBytes = kBlocks * kBlockBytes, kStage = kABytes + kBBytes;
  QWEN2VL_DYNAMIC_SHARED(char, shared);
  const uint32_t base = q::shared_address(shared), full = base + kStages * kStage, empty = full + 8 * kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      q::mbarrier_init(full + 8 * i, 1);
      q::mbarrier_init(empty + 8 * i, 1);
    }
    q::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    if (threadIdx.x != 0) return;
    for (int step = 0; step < kDepth / kStep; ++step) {
      const int stage = step % kStages;
      q::mbarrier_wait(empty + 8 * stage, (step / kStages & 1) ^ 1);
      q::mbarrier_arrive_expect_tx(full + 8 * stage, kABytes + kBlocks * kRows * Swizzle);
      const uint32_t at = base + stage * kStage;
      for (int block = 0; block < kStep / C; ++block)
        q::tma_load(at + block * 64 * Swizzle, &a_map, full + 8 * stage, step * kStep + block * C, 0, 0);
      for (int block = 0; block < kBlocks; ++block) {
        const uint32_t to = at + kABytes + block * kBlockBytes;
        if (B == Major::kDepth)
          q::tma_load(to, &b_map, full + 8 * stage, step * kStep + block * C, 0, 0);
        else
          q::tma_load(to, &b_map, full + 8 * stage, block * C, step * kStep, 0);
      }
    }
    return;
  }
  const int thread = static_cast<int>(threadIdx.x) - 128;
  const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
  float d[N / 2] = {};
  uint32_t fragments[kStep / 4];
  for (int step = 0; step < kDepth / kStep; ++step) {
    const int stage = step % kStages;
    const uint32_t a = base + stage * kStage, b = a + kABytes;
    for (int i = 0; i < kStep / 4; ++i) {
      const uint16_t* from = a_global + (row + i % 2 * 8) * kDepth + step * kStep + i / 4 * 16 + i % 4 / 2 * 8 + column;
      fragments[i] = static_cast<uint32_t>(from[1]) << 16 | from[0];
    }
    q::mbarrier_wait(full + 8 * stage, step / kStages & 1);
    q::wgmma_fence(d, fragments);
    for (int k = 0; k < kStep / 16; ++k) {
      const uint64_t of_b =
          B == Major::kDepth
              ? q::matrix_descriptor<Swizzle>(b + k * 16 / C * kBlockBytes + k * 16 % C * 2, 16, 8 * Swizzle)
              : q::matrix_descriptor<Swizzle>(b + k * 16 * Swizzle, kBlockBytes, 8 * Swizzle);
      if constexpr (Registers)
        q::wgmma<E, B, true>(d, fragments + 4 * k, of_b);
      else
        q::wgmma<E, B, true>(
            d, q::matrix_descriptor<Swizzle>(a + k * 16 / C * 64 * Swizzle + k * 16 % C * 2, 16, 8 * Swizzle), of_b);
    }
    q::wgmma_commit_group();
    q::wgmma_wait_group<0>(d, fragments);
    if (thread == 0) q::mbarrier_arrive(empty + 8 * stage);
  }
  for (int i = 0; i < N / 2; ++i) out[(row + i % 4 / 2 * 8) * N + i / 4 * 8 + column + i % 2] = d[i];
}

template <int N, Element E, Major B, int Swizzle, bool Registers>
void check() {
  constexpr bool bfloat16 = E == Element::kBfloat16;
  const auto random = [](size_t count) {
    std::vector<uint16_t> numbers(count);
    for (uint16_t& number : numbers) {
      const float value = static_cast<float>(on_host::random_below(257)) / 128 - 1;
      number = bfloat16 ? on_host::sm90::float_to_bfloat16(value) : on_host::sm90::float_to_half(value);
    }
    return numbers;
  };
  const std::vector<uint16_t> a = random(64 * kDepth), b = random(N * kDepth);
  std::vector<float> out(64 * N);
  constexpr uint32_t C = Swizzle / 2;
  constexpr int kRows = B == Major::kDepth ? N : kDepth, kColumns = B == Major::kDepth ? kDepth : N;
  const auto map = [](const uint16_t* from, uint64_t rows, uint64_t columns, uint32_t box_rows) {
    const struct {
      const void* data;
      int rank;
      uint64_t sizes[3], strides[2];
      uint32_t box[3];
      int swizzle;
    } numbers{from, 3, {columns, rows, 1}, {2 * columns, 2 * columns * rows}, {C, box_rows, 1}, Swizzle};
    return on_host::tensor_map(numbers);
  };
  const q::TensorMap a_map = map(a.data(), 64, kDepth, 64);
  const q::TensorMap b_map = map(b.data(), kRows, kColumns, B == Major::kDepth ? N : kStep);
  on_host::run_grid(1, 256, 128 * 1024,
                    [&] { product<N, E, B, Swizzle, Registers>(a_map, b_map, a.data(), out.data()); });
  double worst = 0;
  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < N; ++j) {
      double want = 0;
      for (int k = 0; k < kDepth; ++k) {
        const uint16_t other = B == Major::kDepth ? b[j * kDepth + k] : b[k * N + j];
        want += static_cast<double>(on_host::sm90::number_of(a[i * kDepth + k], bfloat16)) *
                on_host::sm90::number_of(other, bfloat16);
      }
      const double error = std::abs(want - out[i * N + j]);
      if (!(error <= worst)) worst = error;
    }
  std::printf("N %d %s %s swizzle %d a in %s: error %g\n", N, bfloat16 ? "bf16" : "fp16",
              B == Major::kDepth ? "depth" : "across", Swizzle, Registers ? "registers" : "memory", worst);
  if (!(worst <= 1e-4)) std::exit(1);
}

// Each layout with one of the two kinds of a and of the two types, in turn.
template <int N, bool Odd>
void check_layouts() {
  constexpr Element kFirst = Odd ? Element::kBfloat16 : Element::kFloat16;
  constexpr Element kSecond = Odd ? Element::kFloat16 : Element::kBfloat16;
  check<N, kFirst, Major::kDepth, 32, Odd>();
  check<N, kSecond, Major::kDepth, 64, !Odd>();
  check<N, kFirst, Major::kDepth, 128, Odd>();
  check<N, kSecond, Major::kAcross, 32, Odd>();
  check<N, kFirst, Major::kAcross, 64, !Odd>();
  check<N, kSecond, Major::kAcross, 128, Odd>();
}

int main(int count, char** arguments) {
  for (int i = 1; i < count; ++i) {
    on_host::set_time(arguments[i]);
    check_layouts<64, true>();
    check_layouts<72, true>();
    check_layouts<80, true>();
    check_layouts<80, false>();
    check_layouts<96, false>();
    check_layouts<128, false>();
  }
}
