// Prints how CuTe lays tiles of q, k and v out in shared memory, and its descriptors of them, for the test that holds
// ours to them. The headers are those of the package nvidia-cutlass.
#include <cstdio>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

namespace {

using namespace cute;
using Number = cutlass::bfloat16_t;

template <int Columns, SM90::GMMA::Major Major>
auto atom() {
  using namespace SM90::GMMA;
  if constexpr (Major == Major::K) {
    if constexpr (Columns == 16) return Layout_K_SW32_Atom<Number>{};
    if constexpr (Columns == 32) return Layout_K_SW64_Atom<Number>{};
    if constexpr (Columns == 64) return Layout_K_SW128_Atom<Number>{};
  } else {
    if constexpr (Columns == 16) return Layout_MN_SW32_Atom<Number>{};
    if constexpr (Columns == 32) return Layout_MN_SW64_Atom<Number>{};
    if constexpr (Columns == 64) return Layout_MN_SW128_Atom<Number>{};
  }
}

// offset: where (row, column) of a tile lies, in numbers.
template <class Tensor, class At>
void print_offsets(const char* major, int columns, const Tensor& tensor, int rows, int width, const Number* base,
                   At at) {
  std::printf("%s %d %d %d offsets", major, columns, rows, width);
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < width; ++column) {
      std::printf(" %d", static_cast<int>(raw_pointer_cast(&at(tensor, row, column)) - base));
    }
  }
  std::printf("\n");
}

// descriptor: the first byte of a step of 16, and both offsets and the layout's code.
template <SM90::GMMA::Major Major, class Slice>
void print_descriptor(const char* major, int columns, int rows, int width, int step, const Slice& slice,
                      const Number* base) {
  const auto descriptor = SM90::GMMA::make_gmma_desc<Major>(slice);
  std::printf("\n%s %d %d %d descriptor %d %d %d %d %d\n", major, columns, rows, width, step,
              static_cast<int>(raw_pointer_cast(slice.data()) - base) * 2,
              static_cast<int>(descriptor.bitfield.leading_byte_offset_) * 16,
              static_cast<int>(descriptor.bitfield.stride_byte_offset_) * 16,
              static_cast<int>(descriptor.bitfield.layout_type_));
}

template <int Columns, int Rows, int Width>
void print_tile(const Number* base) {
  using SM90::GMMA::Major;
  // q and k: rows by columns, whose sum runs along the columns.
  auto depth =
      make_tensor(make_smem_ptr(base), tile_to_shape(atom<Columns, Major::K>(), Shape<Int<Rows>, Int<Width>>{}));
  print_offsets("depth", Columns, depth, Rows, Width, base,
                [](const auto& x, int r, int c) -> auto& { return x(r, c); });
  for_each(make_int_sequence<Width / 16>{}, [&](auto step) {
    auto slice = local_tile(depth, Shape<Int<Rows>, _16>{}, make_coord(_0{}, step));
    print_descriptor<Major::K>("depth", Columns, Rows, Width, static_cast<int>(step), slice, base);
  });
  // v: columns by rows, whose sum runs along the rows; blocks of columns come after all rows.
  auto across = make_tensor(make_smem_ptr(base),
                            tile_to_shape(atom<Columns, Major::MN>(), Shape<Int<Width>, Int<Rows>>{}, Step<_2, _1>{}));
  print_offsets("across", Columns, across, Rows, Width, base,
                [](const auto& x, int r, int c) -> auto& { return x(c, r); });
  for_each(make_int_sequence<Rows / 16>{}, [&](auto step) {
    auto slice = local_tile(across, Shape<Int<Width>, _16>{}, make_coord(_0{}, step));
    print_descriptor<Major::MN>("across", Columns, Rows, Width, static_cast<int>(step), slice, base);
  });
}

}  // namespace

int main() {
  alignas(1024) static Number base[128 * 128];
  print_tile<16, 96, 80>(base);
  print_tile<16, 128, 80>(base);
  print_tile<32, 96, 96>(base);
  print_tile<64, 128, 64>(base);
  print_tile<64, 128, 128>(base);
}
