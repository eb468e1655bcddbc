#pragma once

namespace qwen2vl {

// Null when this build has code that the device and its driver run, else CUDA's words for why not.
const char* device_problem(int device);

}  // namespace qwen2vl
