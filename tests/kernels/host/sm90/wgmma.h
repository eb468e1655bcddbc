// Products of warpgroups: m64nNk16 with float32 sums, issued by 128 threads, done at some later moment and in order.
//
// While a product is in flight its accumulators hold a mark that is NaN in all threads; they get their values at the
// wait_group that covers the last product that adds to them. Registers that a thread changes in between end the
// program.
#pragma once

#include <array>
#include <deque>

#include "operands.h"

namespace on_host::sm90 {

constexpr unsigned kGroup = 128;

// Registers of one thread that are named to wgmma_fence and wgmma_wait_group.
struct Named {
  const void* registers = nullptr;
  size_t bytes = 0;

  Named() = default;
  template <int Count>
  Named(const float (&array)[Count]) : registers(array), bytes(sizeof array) {}
  template <int Count>
  Named(const uint32_t (&array)[Count]) : registers(array), bytes(sizeof array) {}
  bool holds(const void* pointer, size_t count) const {
    const auto* const at = static_cast<const char*>(pointer);
    const auto* const start = static_cast<const char*>(registers);
    return registers != nullptr && at >= start && at + count <= start + bytes;
  }
};
constexpr int kMaxNamed = 6;
using AllNamed = std::array<Named, kMaxNamed>;

inline bool any_holds(const AllNamed& all, const void* pointer, size_t count) {
  for (const Named& named : all)
    if (named.holds(pointer, count)) return true;
  return false;
}

// The sums of products that add to the same registers.
struct Sums {
  int half = 0;  // registers a thread
  int64_t first = 0;
  std::vector<float> values;  // (64, 2 half)
};

struct Product {
  Operation operation;
  std::shared_ptr<Sums> sums;
  std::vector<float> a_values;  // (64, 16) where a comes in registers
  Clock known;                  // what all threads knew when they issued it
  Where where;
  unsigned arrived = 0, retired = 0;  // threads
  int group = -1;                     // of wgmma.commit_group
};

struct HeldSums {
  float* registers;
  std::shared_ptr<Sums> sums;
  int64_t last;  // product
  Where where;
};
struct HeldFragment {
  const uint32_t* registers;
  std::array<uint32_t, 4> values;
  int64_t product;
  Where where;
};

struct ThreadState {
  int64_t issued = 0, committed = 0, retired = 0;           // products
  int groups = 0;                                           // committed
  std::vector<std::pair<Named, std::vector<char>>> fenced;  // what the last wgmma_fence named, and held then
  std::vector<HeldSums> sums;
  std::vector<HeldFragment> fragments;
};

struct Warpgroup {
  std::deque<Product> products;  // that some thread has not retired
  int64_t first = 0;             // the number of the first of them
  int64_t done = 0;              // products
};

constexpr uint32_t kMark = 0x7fdeadbe;

struct TensorCores final : Source {
  std::vector<Warpgroup> groups;
  std::vector<ThreadState> threads;

  void reset(unsigned count) {
    groups.assign((count + kGroup - 1) / kGroup, Warpgroup());
    threads.assign(count, ThreadState());
  }
  static bool ready(const Warpgroup& group) {
    const int64_t next = group.done - group.first;
    return next < static_cast<int64_t>(group.products.size()) && group.products[next].arrived == kGroup;
  }
  bool pending() const override {
    for (const Warpgroup& group : groups)
      if (ready(group)) return true;
    return false;
  }
  void run(Warpgroup& group) {
    Product& product = group.products[group.done - group.first];
    multiply(product.operation, product.a_values, product.sums->values.data());
    ++group.done;
    wake();
  }
  // The next product of one warpgroup.
  void step() override {
    Warpgroup* found = nullptr;
    unsigned count = 0;
    for (Warpgroup& group : groups)
      if (ready(group) && random_below(++count) == 0) found = &group;
    run(*found);
  }
};
static TensorCores cores;

inline void fence_registers(const AllNamed& named) {
  auto& fenced = cores.threads[threadIdx.x].fenced;
  fenced.clear();
  for (const Named& array : named) {
    if (array.registers == nullptr) continue;
    const char* const bytes = static_cast<const char*>(array.registers);
    fenced.emplace_back(array, std::vector<char>(bytes, bytes + array.bytes));
  }
}

// Fails unless the last wgmma_fence named these registers and nothing has changed them since.
inline void check_fenced(const ThreadState& thread, const void* registers, size_t bytes, const char* what) {
  for (const auto& [array, content] : thread.fenced) {
    if (!array.holds(registers, bytes)) continue;
    const size_t at = static_cast<const char*>(registers) - static_cast<const char*>(array.registers);
    if (std::memcmp(content.data() + at, registers, bytes) == 0) return;
    ON_HOST_FAIL("%s has changed since the wgmma_fence", what);
  }
  ON_HOST_FAIL("%s is not named by the last wgmma_fence", what);
}

// Row and column of register i of the accumulator, a thread of the warpgroup (PTX ISA, figure of wgmma fragment D).
inline int fragment_row(unsigned thread, int i) {
  return static_cast<int>(thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8);
}
inline int fragment_column(unsigned thread, int i) { return static_cast<int>(i / 4 * 8 + thread % 4 * 2 + i % 2); }

inline void check_marks(const HeldSums& held) {
  for (int i = 0; i < held.sums->half; ++i)
    if (bits_as<uint32_t>(held.registers[i]) != kMark)
      ON_HOST_FAIL("accumulator %d of the wgmma issued at %s:%d was changed while in flight", i,
                   base_name(held.where.file), held.where.line);
}

inline HeldSums* find_sums(ThreadState& thread, const void* registers, size_t bytes) {
  const auto* const at = static_cast<const char*>(registers);
  for (HeldSums& held : thread.sums) {
    const auto* const start = reinterpret_cast<const char*>(held.registers);
    if (at < start + sizeof(float) * held.sums->half && start < at + bytes) return &held;
  }
  return nullptr;
}

inline void take_fragment(ThreadState& thread, Product& product, int64_t number, const uint32_t* a) {
  check_fenced(thread, a, 16, "a");
  if (find_sums(thread, a, 16) != nullptr) ON_HOST_FAIL("a is an accumulator in flight");
  HeldFragment held{a, {a[0], a[1], a[2], a[3]}, number, product.where};
  const unsigned t = threadIdx.x % kGroup;
  product.a_values.resize(64 * 16);
  for (int i = 0; i < 8; ++i) {
    // Register i / 2 holds columns 0 .. 7 (0, 1) or 8 .. 15 (2, 3) of rows r (0, 2) or r + 8 (1, 3).
    const int row = static_cast<int>(t / 32 * 16 + t % 32 / 4) + i / 2 % 2 * 8;
    const int column = i / 4 * 8 + static_cast<int>(t % 4) * 2 + i % 2;
    const auto bits = static_cast<uint16_t>(a[i / 2] >> i % 2 * 16);
    product.a_values[row * 16 + column] = number_of(bits, product.operation.bfloat16);
  }
  thread.fragments.push_back(held);
}

// All that the product reads must come before all threads' issue of it.
inline void start(Warpgroup& group, Product& product, int64_t number) {
  const unsigned index = threadIdx.x / kGroup;
  for_each_chunk(product.operation, [&](uint32_t address) {
    memory.check(address, 16, 16, "an operand of wgmma");
    Chunk& chunk = memory.chunk(address);
    check_written(chunk, address, product.known.data(), true, "wgmma");
    chunk.read_by[index] = static_cast<int32_t>(number + 1);
  });
  if (now.timing == Timing::kEarly)
    while (TensorCores::ready(group)) cores.run(group);
}

inline void issue(const Operation& operation, float* d, const uint32_t* a, Where where) {
  if (threadIdx.x / kGroup * kGroup + kGroup > blockDim.x) ON_HOST_FAIL("this warpgroup is not whole");
  ThreadState& thread = cores.threads[threadIdx.x];
  Warpgroup& group = cores.groups[threadIdx.x / kGroup];
  const int64_t number = thread.issued++;
  const int half = operation.columns / 2;
  const bool first = number == group.first + static_cast<int64_t>(group.products.size());
  if (first) {
    group.products.emplace_back();
    group.products.back().operation = operation;
    group.products.back().where = where;
  }
  Product& product = group.products[number - group.first];
  if (!(product.operation == operation) || product.where.line != where.line)
    ON_HOST_FAIL("threads of one warpgroup issue different wgmma: another's is at line %d, or has other operands",
                 product.where.line);
  HeldSums* held = find_sums(thread, d, sizeof(float) * half);
  if (held != nullptr) {
    if (held->registers != d || held->sums->half != half)
      ON_HOST_FAIL("d overlaps accumulators in flight of another shape");
    check_marks(*held);
    if (first) product.sums = held->sums;
  } else {
    check_fenced(thread, d, sizeof(float) * half, "d");
    if (first) {
      product.sums = std::make_shared<Sums>();
      product.sums->half = half;
      product.sums->first = number;
      product.sums->values.assign(64 * operation.columns, 0);
    }
    if (product.sums->first != number) ON_HOST_FAIL("d is in flight in other threads of the warpgroup");
    for (int i = 0; i < half; ++i) {
      const unsigned t = threadIdx.x % kGroup;
      product.sums->values[fragment_row(t, i) * operation.columns + fragment_column(t, i)] = d[i];
      d[i] = bits_as<float>(kMark);
    }
    thread.sums.push_back({d, product.sums, number, where});
    held = &thread.sums.back();
  }
  if (held->sums != product.sums) ON_HOST_FAIL("threads of one warpgroup add to different accumulators");
  held->last = number;
  held->where = where;
  if (a != nullptr) take_fragment(thread, product, number, a);
  if (first)
    product.known.assign(order.known(threadIdx.x), order.known(threadIdx.x) + order.entries);
  else
    lower_to(product.known.data(), order.known(threadIdx.x), order.entries);
  if (++product.arrived == kGroup) start(group, product, number);
}

inline void commit_group() {
  ThreadState& thread = cores.threads[threadIdx.x];
  Warpgroup& group = cores.groups[threadIdx.x / kGroup];
  for (; thread.committed < thread.issued; ++thread.committed) {
    Product& product = group.products[thread.committed - group.first];
    if (product.group >= 0 && product.group != thread.groups)
      ON_HOST_FAIL("threads of one warpgroup commit different groups");
    product.group = thread.groups;
  }
  ++thread.groups;
}

struct ProductsWait final : Wait {
  unsigned group;
  int64_t count;
  ProductsWait(unsigned group, int64_t count) : group(group), count(count) {}
  bool over() const override { return cores.groups[group].done >= count; }
  std::string reason() const override {
    return "product " + std::to_string(count) + " of warpgroup " + std::to_string(group) + ", " +
           std::to_string(cores.groups[group].done) + " are done";
  }
};

inline void retire(ThreadState& thread, int64_t count, const AllNamed& named) {
  for (size_t i = 0; i < thread.sums.size();) {
    HeldSums& held = thread.sums[i];
    if (held.last >= count) {
      ++i;
      continue;
    }
    check_marks(held);
    const int half = held.sums->half;
    if (!any_holds(named, held.registers, sizeof(float) * half))
      ON_HOST_FAIL("the accumulators of the wgmma issued at %s:%d are not named", base_name(held.where.file),
                   held.where.line);
    for (int r = 0; r < half; ++r) {
      const unsigned t = threadIdx.x % kGroup;
      held.registers[r] = held.sums->values[fragment_row(t, r) * 2 * half + fragment_column(t, r)];
    }
    thread.sums.erase(thread.sums.begin() + static_cast<long>(i));
  }
  for (size_t i = 0; i < thread.fragments.size();) {
    const HeldFragment& held = thread.fragments[i];
    if (held.product >= count) {
      ++i;
      continue;
    }
    if (std::memcmp(held.registers, held.values.data(), 16) != 0)
      ON_HOST_FAIL("a of the wgmma issued at %s:%d was changed while in flight", base_name(held.where.file),
                   held.where.line);
    if (!any_holds(named, held.registers, 16))
      ON_HOST_FAIL("the a of the wgmma issued at %s:%d is not named", base_name(held.where.file), held.where.line);
    thread.fragments.erase(thread.fragments.begin() + static_cast<long>(i));
  }
}

inline void wait_group(int pending, const AllNamed& named) {
  ThreadState& thread = cores.threads[threadIdx.x];
  const unsigned index = threadIdx.x / kGroup;
  Warpgroup& group = cores.groups[index];
  int64_t count = thread.retired;
  while (count < thread.committed && group.products[count - group.first].group < thread.groups - pending) ++count;
  wait_for(ProductsWait(index, count));
  retire(thread, count, named);
  for (; thread.retired < count; ++thread.retired) ++group.products[thread.retired - group.first].retired;
  for (; !group.products.empty() && group.products.front().retired == kGroup; ++group.first) group.products.pop_front();
  int32_t& ended = order.ended(order.of(threadIdx.x), index);
  ended = std::max(ended, static_cast<int32_t>(count));
}

inline void leave_tensor_cores() {
  const ThreadState& thread = cores.threads[threadIdx.x];
  if (thread.retired != thread.issued)
    ON_HOST_FAIL("the thread ends with %lld wgmma in flight", static_cast<long long>(thread.issued - thread.retired));
}

}  // namespace on_host::sm90
