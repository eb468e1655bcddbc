// One spelling for functions that a host compiler and nvcc both compile.
#pragma once

#if defined(__CUDACC__)
#define QWEN2VL_HD __host__ __device__
#else
#define QWEN2VL_HD
#endif
