// Threads that take pieces of work, and sleep where there is none.
#pragma once

#include <cstdint>
#include <functional>

namespace qwen2vl {

// Call work(0) to work(pieces - 1), each once, from this thread and up to threads - 1 others, and return when all have
// been done. `work` must not throw. While another call is under way, this thread does all of its own.
//
// The threads are made when they are first needed, stay, and wait for work in the kernel: none spins. This thread looks
// some 20 us for the end of what the others have begun before it sleeps, too. A process that is forked has none of its
// parent's and makes its own.
void run_pieces(int64_t threads, int64_t pieces, const std::function<void(int64_t)>& work);

}  // namespace qwen2vl
