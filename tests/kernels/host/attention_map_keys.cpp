// Prints the keys by which maps are kept, a line for each configuration and tensor that must not share one.
#include <cstdio>

#include "cuda/attention_maps.h"

namespace {

using namespace qwen2vl;

void print(AttentionShape shape, AttentionTensor tensor, int heads, int rows, bool fp16 = false) {
  for (const uint64_t part : attention_map_key(attention_map(shape, tensor, heads, rows), fp16)) {
    std::printf("%llu ", static_cast<unsigned long long>(part));
  }
  std::printf("\n");
}

}  // namespace

int main() {
  static const uint16_t numbers[16] = {};
  const AttentionShape shape{80, 3, 96, 0, false, 16, 80};
  const AttentionTensor tensor{numbers, 160, 80, 100};
  print(shape, tensor, 2, 96);
  for (const int columns : {32, 64}) print({80, 3, 96, 0, false, columns, 80}, tensor, 2, 96);
  print({72, 3, 96, 0, false, 16, 80}, tensor, 2, 96);
  print(shape, {numbers + 8, 160, 80, 100}, 2, 96);
  print(shape, {numbers, 320, 80, 100}, 2, 96);
  print(shape, {numbers, 160, 88, 100}, 2, 96);
  print(shape, {numbers, 160, 80, 101}, 2, 96);
  print(shape, tensor, 1, 96);
  print(shape, tensor, 2, 192);
  print(shape, tensor, 2, 96, true);
}
