// Operands of wgmma: matrix descriptors decoded as the PTX ISA lays them out, and the product in float32.
#pragma once

#include "tma.h"

namespace on_host::sm90 {

struct Operation {
  int columns = 0;  // N
  bool bfloat16 = false, across = false, accumulate = false, a_in_registers = false;
  uint64_t a = 0, b = 0;  // descriptors

  bool operator==(const Operation& other) const {
    return columns == other.columns && bfloat16 == other.bfloat16 && across == other.across &&
           accumulate == other.accumulate && a_in_registers == other.a_in_registers && a == other.a && b == other.b;
  }
};

struct Descriptor {
  uint32_t start, leading, stride;  // bytes
  unsigned swizzle;
};

// Bits 0-13 start, 16-29 leading byte offset, 32-45 stride byte offset (all in 16 bytes), 49-51 base offset, 62-63
// swizzle: 1 of 128 bytes, 2 of 64, 3 of 32.
inline Descriptor decode(uint64_t bits) {
  const auto field = [bits](int at) { return static_cast<uint32_t>(bits >> at & 0x3fff) << 4; };
  const unsigned mode = static_cast<unsigned>(bits >> 62);
  if (mode == 0) ON_HOST_FAIL("a descriptor without a swizzle");
  if ((bits & 0x3fff'c000'c000'c000ull) != 0)
    ON_HOST_FAIL("a descriptor with a base offset or bits that mean nothing: 0x%llx",
                 static_cast<unsigned long long>(bits));
  return {field(0), field(16), field(32), mode == 1 ? 128u : mode == 2 ? 64u : 32u};
}

// 16 bytes of a depth-major operand: row `row`, depth 8 part .. 8 part + 7. Rows of `swizzle` bytes, 8 to an atom.
inline uint32_t depth_chunk(const Descriptor& at, unsigned row, unsigned part) {
  return swizzled(at.start + row / 8 * at.stride + row % 8 * at.swizzle + part * kChunk, at.swizzle);
}

// 16 bytes of an operand that lies across: columns 8 part .. 8 part + 7 at depth `depth`. Atoms of swizzle / 2 columns
// and 8 of the depth; `leading` between atoms across, `stride` between those along the depth.
inline uint32_t across_chunk(const Descriptor& at, unsigned depth, unsigned part) {
  const unsigned parts = at.swizzle / kChunk;
  return swizzled(
      at.start + part / parts * at.leading + part % parts * kChunk + depth / 8 * at.stride + depth % 8 * at.swizzle,
      at.swizzle);
}

template <class Act>
void for_each_chunk(const Operation& operation, Act act) {
  const unsigned columns = static_cast<unsigned>(operation.columns);
  if (!operation.a_in_registers) {
    const Descriptor a = decode(operation.a);
    for (unsigned row = 0; row < 64; ++row)
      for (unsigned part = 0; part < 2; ++part) act(depth_chunk(a, row, part));
  }
  const Descriptor b = decode(operation.b);
  for (unsigned i = 0; i < (operation.across ? 16 : columns); ++i)
    for (unsigned part = 0; part < (operation.across ? columns / 8 : 2); ++part)
      act(operation.across ? across_chunk(b, i, part) : depth_chunk(b, i, part));
}

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return bits_as<float>(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) return std::ldexp(static_cast<float>(fraction), -24) * (sign ? -1.0f : 1.0f);
  return bits_as<float>(sign | (exponent + 112) << 23 | fraction << 13);
}

// Rounds to the nearest, ties to even.
inline uint16_t float_to_half(float value) {
  const uint32_t bits = bits_as<uint32_t>(value), magnitude = bits & 0x7fffffff;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and above
  if (magnitude < 0x38800000) {                       // below 2^-14: a multiple of 2^-24
    const float scaled = std::nearbyint(std::ldexp(bits_as<float>(magnitude), 24));
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(scaled));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | (rounded - 0x38000000) >> 13);
}

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float number_of(uint16_t bits, bool bfloat16) {
  static const std::vector<float> halves = [] {
    std::vector<float> all(1 << 16);
    for (unsigned i = 0; i < all.size(); ++i) all[i] = half_to_float(static_cast<uint16_t>(i));
    return all;
  }();
  return bfloat16 ? bits_as<float>(static_cast<uint32_t>(bits) << 16) : halves[bits];
}

inline void read_chunk(uint32_t address, bool bfloat16, float* to, size_t step) {
  uint16_t numbers[8];
  std::memcpy(numbers, memory.at(address), sizeof numbers);
  for (unsigned i = 0; i < 8; ++i) to[i * step] = number_of(numbers[i], bfloat16);
}

ON_HOST_FAST inline void add_product(const float* __restrict a, const float* __restrict b, float* __restrict d,
                                     int columns) {
  for (int row = 0; row < 64; ++row)
    for (int k = 0; k < 16; ++k) {
      const float factor = a[row * 16 + k];
      for (int column = 0; column < columns; ++column) d[row * columns + column] += factor * b[k * columns + column];
    }
}

// d (64, N) = a (64, 16) b (16, N), added to d if the operation accumulates.
inline void multiply(const Operation& operation, const std::vector<float>& a_values, float* d) {
  const unsigned columns = static_cast<unsigned>(operation.columns);
  static std::vector<float> from_memory(64 * 16), b_values;
  const std::vector<float>& a = operation.a_in_registers ? a_values : from_memory;
  if (!operation.a_in_registers) {
    const Descriptor at = decode(operation.a);
    for (unsigned row = 0; row < 64; ++row)
      for (unsigned part = 0; part < 2; ++part)
        read_chunk(depth_chunk(at, row, part), operation.bfloat16, &from_memory[row * 16 + part * 8], 1);
  }
  b_values.resize(16 * columns);
  const Descriptor at = decode(operation.b);
  for (unsigned i = 0; i < (operation.across ? 16 : columns); ++i)
    for (unsigned part = 0; part < (operation.across ? columns / 8 : 2); ++part) {
      if (operation.across)
        read_chunk(across_chunk(at, i, part), operation.bfloat16, &b_values[i * columns + part * 8], 1);
      else
        read_chunk(depth_chunk(at, i, part), operation.bfloat16, &b_values[part * 8 * columns + i], columns);
    }
  if (!operation.accumulate) std::fill(d, d + 64 * columns, 0.0f);
  add_product(a.data(), b_values.data(), d, operation.columns);
}

}  // namespace on_host::sm90
