// What the fuzz targets share: bytes that are read as numbers, buffers whose every end a sanitizer watches, and a main
// for compilers without libFuzzer, which takes the same options.
#pragma once

#include <chrono>
#include <cinttypes>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define QWEN2VL_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define QWEN2VL_ASAN
#endif
#endif
#ifdef QWEN2VL_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace fuzz {

struct XorShift {
  uint64_t state;

  explicit XorShift(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15u | 1) {}

  uint64_t operator()() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state * 0x2545f4914f6cdd1du >> 16;
  }
  uint64_t below(uint64_t end) { return (*this)() % end; }
};

// Numbers from the input, zeros after its end.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), left_(size) {}

  template <class T>
  T take() {
    T value = 0;
    const size_t size = left_ < sizeof(T) ? left_ : sizeof(T);
    if (size > 0) std::memcpy(&value, data_, size);
    data_ += size;
    left_ -= size;
    return value;
  }
  int64_t below(int64_t end) {  // end <= 2^16
    return end <= 256 ? take<uint8_t>() % end : take<uint16_t>() % end;
  }
  int64_t pick(std::initializer_list<int64_t> values) {
    return values.begin()[below(static_cast<int64_t>(values.size()))];
  }
  bool flag() { return take<uint8_t>() & 1; }

 private:
  const uint8_t* data_;
  size_t left_;
};

// `size` bytes of heap to the byte; the parts between that nobody may touch are poisoned as far as ASan's grain goes.
class Buffer {
 public:
  explicit Buffer(int64_t size, uint8_t fill = 0xa5)
      : size_(static_cast<size_t>(size)), bytes_(new uint8_t[static_cast<size_t>(size)]) {
    for (size_t n = 0; n < size_; ++n) bytes_[n] = fill;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&&) = default;
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer() {
#ifdef QWEN2VL_ASAN
    if (bytes_) __asan_unpoison_memory_region(bytes_.get(), size_);
#endif
  }

  void forbid(int64_t begin, int64_t size) {
#ifdef QWEN2VL_ASAN
    __asan_poison_memory_region(bytes_.get() + begin, static_cast<size_t>(size));
#else
    static_cast<void>(begin + size);
#endif
  }
  uint8_t* data() { return bytes_.get(); }
  const uint8_t* data() const { return bytes_.get(); }
  size_t size() const { return size_; }

 private:
  size_t size_;
  std::unique_ptr<uint8_t[]> bytes_;
};

#ifdef QWEN2VL_LIBFUZZER
inline void keep_input() {}
#else
inline std::vector<uint8_t> input;
inline std::string prefix;

inline void keep_input() {
  const std::string path = prefix + "crash";
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(input.data()), long(input.size()));
  std::fprintf(stderr, "the input is in %s\n", path.c_str());
}
#endif

// What every target calls when a result is wrong.
inline void expect(bool holds, const char* what, int64_t where = -1) {
  if (holds) return;
  std::fprintf(stderr, "WRONG: %s (at %" PRId64 ")\n", what, where);
  keep_input();
  std::abort();
}

}  // namespace fuzz

#ifndef QWEN2VL_LIBFUZZER
namespace fuzz {

inline void run(const std::vector<uint8_t>& bytes) {
  input = bytes;
  // A copy of its own, so that reading past the input is seen as well.
  const std::unique_ptr<uint8_t[]> copy(new uint8_t[bytes.size()]);
  if (!bytes.empty()) std::memcpy(copy.get(), bytes.data(), bytes.size());
  LLVMFuzzerTestOneInput(copy.get(), bytes.size());
}

inline void mutate(std::vector<uint8_t>& bytes, XorShift& random) {
  constexpr uint8_t kTelling[] = {0, 1, 2, 127, 128, 254, 255};
  for (uint64_t n = 1 + random.below(8); n > 0 && !bytes.empty(); --n) {
    const size_t at = random.below(bytes.size());
    switch (random.below(5)) {
      case 0:
        bytes[at] ^= static_cast<uint8_t>(1 << random.below(8));
        break;
      case 1:
        bytes[at] = kTelling[random.below(sizeof(kTelling))];
        break;
      case 2:
        bytes.erase(bytes.begin() + static_cast<std::ptrdiff_t>(at));
        break;
      case 3:
        bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(at), static_cast<uint8_t>(random()));
        break;
      default:
        bytes[at] = static_cast<uint8_t>(random());
    }
  }
}

}  // namespace fuzz

// -max_total_time=SECONDS, -runs=NUMBER of random inputs (without both: only the files), -seed=NUMBER,
// -artifact_prefix=PATH, files to replay first.
int main(int count, char** arguments) {
  using Clock = std::chrono::steady_clock;
  double seconds = 0;
  uint64_t seed = 1, runs = 0, wanted = 0;
  std::vector<std::vector<uint8_t>> seeds;
  for (int n = 1; n < count; ++n) {
    const std::string argument = arguments[n];
    const std::string value = argument.substr(argument.find('=') + 1);
    if (argument.rfind("-max_total_time=", 0) == 0) {
      seconds = std::atof(value.c_str());
    } else if (argument.rfind("-runs=", 0) == 0) {
      wanted = std::strtoull(value.c_str(), nullptr, 10);
    } else if (argument.rfind("-seed=", 0) == 0) {
      seed = std::strtoull(value.c_str(), nullptr, 10);
    } else if (argument.rfind("-artifact_prefix=", 0) == 0) {
      fuzz::prefix = value;
    } else if (argument[0] == '-') {
      std::fprintf(stderr, "unknown option %s\n", argument.c_str());
      return 2;
    } else {
      std::ifstream file(argument, std::ios::binary);
      if (!file) {
        std::fprintf(stderr, "cannot read %s\n", argument.c_str());
        return 2;
      }
      seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    }
  }
#ifdef QWEN2VL_ASAN
  __sanitizer_set_death_callback(fuzz::keep_input);
#endif
  for (const auto& bytes : seeds) fuzz::run(bytes), ++runs;

  fuzz::XorShift random(seed);
  const auto begin = Clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(Clock::now() - begin).count(); };
  for (uint64_t made = 0; made < wanted || elapsed() < seconds; ++made) {
    std::vector<uint8_t> bytes;
    if (!seeds.empty() && random.below(4) != 0) {
      bytes = seeds[random.below(seeds.size())];
      fuzz::mutate(bytes, random);
    } else {
      bytes.resize(random.below(320));
      for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
      if (seeds.size() < 1000) seeds.push_back(bytes);
    }
    fuzz::run(bytes);
    ++runs;
  }
  std::printf("Done %" PRIu64 " runs in %.1f second(s), seed %" PRIu64 "\n", runs, elapsed(), seed);
  return 0;
}
#endif
