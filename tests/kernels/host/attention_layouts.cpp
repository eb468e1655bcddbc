// Prints where TMA puts a tile of q, k or v by the maps of attention, and what its kernel tells wgmma of it, in the
// form of layouts_of_cute.cpp.
#include "cuda_on_host.h"
// The kernel comes after what it is made of.
#include "cuda/attention_forward.cuh"
#include "cuda/attention_maps.h"

namespace {

using namespace qwen2vl;

template <int Head, int Columns>
void print_tile(int rows) {
  constexpr AttentionShape kShape{Head, 1, 128, 0, false, Columns, attention_across(Head)};
  const int width = kShape.head;
  std::vector<uint16_t> numbers(static_cast<size_t>(rows * width)), places(numbers.size());
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<uint16_t>(i);
  const AttentionTensor tensor{numbers.data(), width, width, rows};
  const auto map = on_host::tensor_map(attention_map(kShape, tensor, 1, rows));
  const auto bytes = static_cast<uint32_t>(2 * numbers.size());
  on_host::run_grid(1, 32, bytes + 16, [&] {
    QWEN2VL_DYNAMIC_SHARED(uint8_t, dynamic);
    const uint32_t shared = sm90::shared_address(dynamic), barrier = shared + bytes;
    if (threadIdx.x != 0) return;
    sm90::mbarrier_init(barrier, 1);
    sm90::fence_mbarrier_init();
    sm90::mbarrier_arrive_expect_tx(barrier, bytes);
    sm90::tma_load(shared, &map, barrier, 0, 0, 0, 0);
    sm90::mbarrier_wait(barrier, 0);
    for (uint32_t at = 0; at < bytes; at += 16) {
      const uint4 four = sm90::load_shared(shared + at);
      const uint32_t words[4] = {four.x, four.y, four.z, four.w};
      for (uint32_t i = 0; i < 8; ++i)
        places[words[i / 2] >> 16 * (i % 2) & 0xffff] = static_cast<uint16_t>(at / 2 + i);
    }
  });
  const auto print = [&](const char* major, int step, uint64_t descriptor) {
    const auto number = [&](int bit, uint64_t mask) { return static_cast<unsigned>(descriptor >> bit & mask) * 16; };
    std::printf("%s %d %d %d descriptor %d %u %u %u %u\n", major, Columns, rows, width, step, number(0, 0x3fff),
                number(16, 0x3fff), number(32, 0x3fff), number(62, 3) / 16);
  };
  for (const char* major : {"depth", "across"}) {
    std::printf("%s %d %d %d offsets", major, Columns, rows, width);
    for (const uint16_t place : places) std::printf(" %d", place);
    std::printf("\n");
  }
  for (int step = 0; step < kShape.depth(); ++step)
    print("depth", step, depth_operand<kShape.row_bytes()>(kShape, 0, rows, step));
  for (int step = 0; step < rows / 16; ++step)
    print("across", step, across_operand<kShape.row_bytes()>(kShape, 0, rows, step));
}

}  // namespace

int main() {
  print_tile<80, 16>(96);
  print_tile<80, 16>(128);
  print_tile<96, 32>(96);
  print_tile<64, 64>(128);
  print_tile<128, 64>(128);
}
