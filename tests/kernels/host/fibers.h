// Threads of a block as fibers that one scheduler resumes in an order drawn from a seed.
//
// A fiber runs until it waits for a condition; the scheduler resumes those whose conditions hold. What goes on beside
// the threads (copies, tensor cores) is a Source of events that happen between turns. Where nothing can go on any more,
// the listing of who waits for what ends the program.
#pragma once

#include <sys/mman.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct Index {
  unsigned x, y, z;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace on_host {

constexpr unsigned kWarp = 32;
constexpr int kFailed = 9;  // the exit status of a program whose kernel broke a rule

// Where a kernel calls: Where::here() as the default of a parameter is the line of the call.
struct Where {
  const char* file = "";
  int line = 0;

  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// When what is asynchronous happens: at a random legal moment, as soon as it can, or only when all threads wait.
enum class Timing { kRandom, kEarly, kLate };

struct Options {
  std::string drop;    // "function:line" of a call that is left out for all threads, or "file:function:line"
  std::string mutate;  // a change by name: see sm90/tma.h and cuda/sm90.cuh
  bool list = false;   // print the calls that were passed, one "site file function line" each
};

// From the environment: QWEN2VL_ON_HOST="drop=mbarrier_wait:120 mutate=swizzle list", each of them or none.
inline Options options_of_environment() {
  Options options;
  const char* const words = std::getenv("QWEN2VL_ON_HOST");
  std::istringstream stream(words == nullptr ? "" : words);
  for (std::string word; stream >> word;) {
    if (word == "list") {
      options.list = true;
    } else if (word.rfind("drop=", 0) == 0) {
      options.drop = word.substr(5);
    } else if (word == "mutate=swizzle" || word == "mutate=stride" || word == "mutate=leading") {
      options.mutate = word.substr(7);
    } else {
      std::fprintf(stderr, "QWEN2VL_ON_HOST: %s is none of drop=..., mutate=..., list\n", word.c_str());
      std::_Exit(2);
    }
  }
  return options;
}
static const Options options = options_of_environment();

struct Time {
  std::string name = "0";
  Timing timing = Timing::kRandom;
  uint64_t state = 0;  // of the random numbers
};
static Time now;

// Random bits (SplitMix64), and a number from 0 to n - 1.
inline uint64_t random_bits() {
  uint64_t x = now.state += 0x9e3779b97f4a7c15ull;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}
inline unsigned random_below(unsigned n) { return static_cast<unsigned>((random_bits() >> 32) * n >> 32); }

// What a fiber waits for.
struct Wait {
  virtual bool over() const = 0;
  virtual std::string reason() const = 0;

 protected:
  ~Wait() = default;
};

// What happens beside the threads. An event that may end a wait calls wake().
struct Source {
  virtual bool pending() const = 0;
  virtual void step() = 0;  // the next event, or a part of it
  unsigned rate = 1;        // one step in `rate` turns

 protected:
  ~Source() = default;
};

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  char* stack = nullptr;
  void* sanitizer = nullptr;
  const Wait* wait = nullptr;
  bool done = false;
  const char* call = "";  // the function of the emulation that it called last, and where
  Where where;
};

struct Engine {
  std::vector<Fiber> fibers;
  unsigned threads = 0, unfinished = 0;
  std::vector<char> asleep;  // warps in which nothing can go on until something happens
  std::vector<Source*> sources;
  std::vector<std::function<void()>> at_exit;  // of a thread
  const std::function<void()>* body = nullptr;
  unsigned preemption = 16;  // a call hands the turn on once in so many times
  Fiber main;
  const void* main_stack = nullptr;
  size_t main_bytes = 0;
};
static Engine engine;
constexpr size_t kStackBytes = 512 * 1024;

inline Fiber& current() { return engine.fibers[threadIdx.x]; }

inline const char* base_name(const char* file) {
  const char* slash = std::strrchr(file, '/');
  return slash ? slash + 1 : file;
}

// Ends the program: the rule that a kernel broke, who and where.
[[noreturn]] inline void fail_at(const char* call, Where where, const char* format, ...) {
  std::fprintf(stderr, "time %s: block %u thread %u: %s at %s:%d: ", now.name.c_str(), blockIdx.x, threadIdx.x, call,
               base_name(where.file), where.line);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::fflush(nullptr);
  std::_Exit(kFailed);
}
#define ON_HOST_FAIL(...) on_host::fail_at(on_host::current().call, on_host::current().where, __VA_ARGS__)

// ------------------------------------------------------------------------------------------------- switching of stacks

#if defined(__x86_64__)
// Keeps the registers that a called function must keep on the stack, and goes on where `to` was left.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n"
      "pushq %rbx\n"
      "pushq %r12\n"
      "pushq %r13\n"
      "pushq %r14\n"
      "pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n"
      "popq %r14\n"
      "popq %r13\n"
      "popq %r12\n"
      "popq %rbx\n"
      "popq %rbp\n"
      "ret\n");
}
#endif

inline void switch_fibers(Fiber& from, Fiber& to, const void* stack, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(from.done ? nullptr : &from.sanitizer, stack, bytes);
#else
  (void)stack, (void)bytes;
#endif
#if defined(__x86_64__)
  switch_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  const bool to_main = &from == &engine.main;
  __sanitizer_finish_switch_fiber(from.sanitizer, to_main ? nullptr : &engine.main_stack,
                                  to_main ? nullptr : &engine.main_bytes);
#endif
}

inline void hand_on() { switch_fibers(current(), engine.main, engine.main_stack, engine.main_bytes); }

inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &engine.main_stack, &engine.main_bytes);
#endif
  (*engine.body)();
  for (const auto& act : engine.at_exit) act();
  current().done = true;
  --engine.unfinished;
  hand_on();
  std::abort();
}

inline void prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    void* memory =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    mprotect(memory, 4096, PROT_NONE);
    fiber.stack = static_cast<char*>(memory);
  }
#if defined(__SANITIZE_ADDRESS__)
  // The frames of enter() and of what it called last were never left.
  __asan_unpoison_memory_region(fiber.stack + kStackBytes - 16384, 16384);
#endif
  fiber.wait = nullptr;
  fiber.done = false;
  fiber.call = "";
  fiber.where = {};
#if defined(__x86_64__)
  // As if switch_stacks had been called by `enter` itself: six registers, then the address to return to.
  auto* top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 8;
  std::memset(top, 0, 8 * sizeof(void*));
  top[6] = reinterpret_cast<void*>(&enter);
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
#endif
}

// -------------------------------------------------------------------------------------------------------- the
// scheduler

inline void wake() { std::fill(engine.asleep.begin(), engine.asleep.end(), 0); }

inline void wait_for(const Wait& wait) {
  while (!wait.over()) {
    current().wait = &wait;
    hand_on();
  }
  current().wait = nullptr;
}

// Resumes the threads of one warp that can go on, in a random order; whether there was one.
inline bool turn(unsigned warp) {
  bool progress = false;
  const unsigned start = random_below(kWarp), stride = 2 * random_below(kWarp / 2) + 1;
  for (unsigned i = 0; i < kWarp; ++i) {
    const unsigned thread = warp * kWarp + (start + i * stride) % kWarp;
    if (thread >= engine.threads) continue;
    Fiber& fiber = engine.fibers[thread];
    if (fiber.done) continue;
    threadIdx.x = thread;
    if (fiber.wait != nullptr && !fiber.wait->over()) continue;
    switch_fibers(engine.main, fiber, fiber.stack, kStackBytes);
    progress = true;
  }
  return progress;
}

[[noreturn]] inline void report_deadlock() {
  std::fprintf(stderr, "time %s: block %u: deadlock, all threads wait:\n", now.name.c_str(), blockIdx.x);
  std::map<std::string, std::vector<unsigned>> waits;
  for (unsigned thread = 0; thread < engine.threads; ++thread) {
    const Fiber& fiber = engine.fibers[thread];
    if (fiber.done) continue;
    threadIdx.x = thread;
    waits[std::string(fiber.call) + " at " + base_name(fiber.where.file) + ":" + std::to_string(fiber.where.line) +
          ": " + fiber.wait->reason()]
        .push_back(thread);
  }
  for (const auto& [reason, threads] : waits) {
    std::fputs("  threads", stderr);
    for (size_t i = 0; i < threads.size(); ++i) {
      const size_t first = i;
      while (i + 1 < threads.size() && threads[i + 1] == threads[i] + 1) ++i;
      std::fprintf(stderr, first == i ? " %u" : " %u-%u", threads[first], threads[i]);
    }
    std::fprintf(stderr, ": %s\n", reason.c_str());
  }
  std::fflush(nullptr);
  std::_Exit(kFailed);
}

// A random source that has something to do.
inline Source* pending_source() {
  Source* found = nullptr;
  unsigned count = 0;
  for (Source* source : engine.sources)
    if (source->pending() && random_below(++count) == 0) found = source;
  return found;
}

// When what is asynchronous happens from here on: "early", "late" or a seed's number, which also draws the order of the
// threads; "early7" and "late7" are in another order.
inline void set_time(const std::string& name) {
  now.name = name;
  now.timing = Timing::kRandom;
  if (name.rfind("early", 0) == 0) now.timing = Timing::kEarly;
  if (name.rfind("late", 0) == 0) now.timing = Timing::kLate;
  const std::string seed = name.substr(now.timing == Timing::kEarly ? 5 : now.timing == Timing::kLate ? 4 : 0);
  const bool needed = now.timing == Timing::kRandom;
  if ((needed && seed.empty()) || seed.find_first_not_of("0123456789") != std::string::npos) {
    std::fprintf(stderr, "no time: %s\n", name.c_str());
    std::exit(2);
  }
  now.state = std::strtoull(seed.c_str(), nullptr, 10) * 0xd1342543de82ef95ull + static_cast<uint64_t>(now.timing);
  for (Source* source : engine.sources) source->rate = 1u << random_below(7);
  engine.preemption = 4u << random_below(5);
}

// Runs the threads of one block to their end.
inline void run_threads(unsigned threads, const std::function<void()>& kernel) {
  if (engine.fibers.size() < threads) engine.fibers.resize(threads);
  engine.body = &kernel;
  engine.threads = engine.unfinished = threads;
  const unsigned warps = (threads + kWarp - 1) / kWarp;
  engine.asleep.assign(warps, 0);
  for (unsigned thread = 0; thread < threads; ++thread) prepare(engine.fibers[thread]);
  std::vector<unsigned> awake;
  while (engine.unfinished > 0) {
    awake.clear();
    for (unsigned warp = 0; warp < warps; ++warp)
      if (!engine.asleep[warp]) awake.push_back(warp);
    if (!awake.empty()) {
      const unsigned warp = awake[random_below(static_cast<unsigned>(awake.size()))];
      if (!turn(warp)) engine.asleep[warp] = 1;
      if (now.timing == Timing::kRandom)
        for (Source* source : engine.sources)
          if (source->pending() && random_below(source->rate) == 0) source->step();
    } else if (Source* source = pending_source()) {
      source->step();
    } else {
      bool progress = false;
      for (unsigned warp = 0; warp < warps; ++warp) progress |= turn(warp);
      if (progress)
        wake();
      else
        report_deadlock();
    }
  }
}

// ------------------------------------------------------------------------------------------- calls that can be left
// out

struct Site {
  const char *call, *file;
  int line;
};
static std::vector<Site> sites;

// Notes a call of the kernel; false where the options leave it out. Once in a while others get a turn before it.
inline bool passes(const char* call, Where where) {
  Fiber& fiber = current();
  fiber.call = call;
  fiber.where = where;
  if (options.list) {
    bool known = false;
    for (const Site& site : sites) known |= site.line == where.line && site.call == call && site.file == where.file;
    if (!known) sites.push_back({call, where.file, where.line});
  }
  if (!options.drop.empty()) {
    const std::string name = std::string(call) + ":" + std::to_string(where.line);
    if (options.drop == name || options.drop == base_name(where.file) + (":" + name)) return false;
  }
  if (random_below(engine.preemption) == 0) hand_on();
  return true;
}

// Prints those that were not printed before.
inline void list_sites() {
  static size_t printed = 0;
  for (; printed < sites.size(); ++printed)
    std::printf("site %s %s %d\n", base_name(sites[printed].file), sites[printed].call, sites[printed].line);
}

}  // namespace on_host
