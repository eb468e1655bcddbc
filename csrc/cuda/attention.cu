#include "attention.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <climits>
#include <map>
#include <mutex>
#include <utility>

#include "attention_maps.h"

namespace qwen2vl {

#if QWEN2VL_SM90
std::vector<AttentionKernel> attention_kernels_64();
std::vector<AttentionKernel> attention_kernels_72();
std::vector<AttentionKernel> attention_kernels_80();
std::vector<AttentionKernel> attention_kernels_96();
std::vector<AttentionKernel> attention_kernels_128();
#endif

std::vector<AttentionKernel> attention_kernels() {
  std::vector<AttentionKernel> all;
#if QWEN2VL_SM90
  for (const auto& of_head : {attention_kernels_64(), attention_kernels_72(), attention_kernels_80(),
                              attention_kernels_96(), attention_kernels_128()}) {
    all.insert(all.end(), of_head.begin(), of_head.end());
  }
#endif
  return all;
}

#if CUDA_VERSION < 12000  // which has no tensor maps; the rest of the extension is compiled by it

std::string attention_forward_cuda(const AttentionCall&, int, void*) { return "built with a CUDA before 12"; }

std::string attention_load(const std::string&, const AttentionShape&, bool, bool) {
  return "built with a CUDA before 12";
}

#else

namespace {

std::string words(cudaError_t status) { return status == cudaSuccess ? "" : cudaGetErrorString(status); }

// The driver's functions are asked for where they are needed: nothing links against it, and a machine without one
// imports the extension.
void* driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  const cudaError_t status = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t status = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
  return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr;
}

template <class Function>
Function* driver(const char* name) {
  return reinterpret_cast<Function*>(driver_function(name));
}

std::string driver_words(CUresult status) {
  return status == CUDA_SUCCESS ? "" : "the driver's error " + std::to_string(static_cast<int>(status));
}

std::string encode(const AttentionMap& map, bool fp16, CUtensorMap* out) {
  static const auto encode_tiled = driver<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  if (encode_tiled == nullptr) return "the driver has no cuTensorMapEncodeTiled";
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const auto swizzle = map.swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                       : map.swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                           : CU_TENSOR_MAP_SWIZZLE_32B;
  const CUresult status =
      encode_tiled(out, fp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, map.rank,
                   const_cast<void*>(map.data), reinterpret_cast<const cuuint64_t*>(map.sizes),
                   reinterpret_cast<const cuuint64_t*>(map.strides), map.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? "" : "cuTensorMapEncodeTiled: " + driver_words(status);
}

// The last maps. A map is a function of its key alone, so that none is ever out of date.
class MapCache {
 public:
  std::string get(const AttentionMap& map, bool fp16, CUtensorMap* out) {
    const AttentionMapKey key = attention_map_key(map, fp16);
    uint64_t hash = 0;
    for (const uint64_t part : key) hash = (hash ^ part) * 0x9E3779B97F4A7C15u;
    Entry& entry = entries_[hash >> 58];
    const std::lock_guard<std::mutex> lock(mutex_);
    if (entry.key != key) {
      CUtensorMap made;
      const std::string failure = encode(map, fp16, &made);
      if (!failure.empty()) return failure;
      entry = {key, made};
    }
    *out = entry.map;
    return "";
  }

 private:
  struct Entry {
    AttentionMapKey key{};
    CUtensorMap map{};
  };
  std::mutex mutex_;
  std::array<Entry, 64> entries_;
};

std::mutex loaded_mutex;
std::vector<AttentionKernel>& loaded_kernels() {
  static std::vector<AttentionKernel> kernels;
  return kernels;
}

bool same(const AttentionShape& a, const AttentionShape& b) {
  return a.head == b.head && a.consumers == b.consumers && a.keys == b.keys && a.share == b.share &&
         a.p_shared == b.p_shared && a.columns == b.columns && a.across == b.across;
}

bool find_kernel(const AttentionCall& call, AttentionKernel* found) {
  static const std::vector<AttentionKernel> linked = attention_kernels();
  const auto fits = [&](const AttentionKernel& kernel) {
    return same(kernel.shape, call.shape) && kernel.fp16 == call.fp16 && kernel.causal == call.causal;
  };
  const std::lock_guard<std::mutex> lock(loaded_mutex);
  const std::vector<AttentionKernel>& loaded = loaded_kernels();
  auto at = std::find_if(linked.begin(), linked.end(), fits);
  if (at == linked.end()) {
    at = std::find_if(loaded.begin(), loaded.end(), fits);
    if (at == loaded.end()) return false;
  }
  *found = *at;
  return true;
}

// Multiprocessors of a device, and leave for a kernel to use all of their shared memory; each is asked for once.
std::string prepare(const AttentionKernel& kernel, int device, int* multiprocessors) {
  static std::mutex mutex;
  static std::map<int, int> counts;
  static std::map<std::pair<const void*, int>, bool> ready;
  const std::lock_guard<std::mutex> lock(mutex);
  int& count = counts[device];
  if (count == 0) {
    const cudaError_t status = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (status != cudaSuccess) return words(status);
  }
  *multiprocessors = count;
  bool& done = ready[{kernel.loaded != nullptr ? kernel.loaded : kernel.function, device}];
  if (done) return "";
  const int bytes = kernel.shape.shared_bytes();
  std::string failure;
  if (kernel.loaded != nullptr) {
    const auto set = driver<decltype(cuKernelSetAttribute)>("cuKernelSetAttribute");
    if (set == nullptr) return "the driver has no cuKernelSetAttribute";
    failure = driver_words(set(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes,
                               static_cast<CUkernel>(kernel.loaded), static_cast<CUdevice>(device)));
  } else {
    failure = words(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  }
  done = failure.empty();
  return failure;
}

}  // namespace

std::string attention_forward_cuda(const AttentionCall& call, int device, void* stream) {
  static MapCache maps;
  const AttentionWork& work = call.work;
  const int64_t items = int64_t{work.count} * work.heads;
  if (items == 0) return "";
  if (items > INT_MAX - (1 << 16)) return "more tiles than 2^31 - 2^16";
  AttentionKernel kernel{};
  if (!find_kernel(call, &kernel)) return "no such kernel is built or loaded";
  // PyTorch's device guard sets the device in PyTorch's copy of the CUDA runtime; this extension has its own.
  std::string failure = words(cudaSetDevice(device));
  int multiprocessors = 0;
  if (failure.empty()) failure = prepare(kernel, device, &multiprocessors);
  CUtensorMap q, k, v;
  const auto map_of = [&](const AttentionTensor& tensor, int heads, int rows, CUtensorMap* map) {
    if (failure.empty()) failure = maps.get(attention_map(call.shape, tensor, heads, rows), call.fp16, map);
  };
  // Where there are no keys, no tile asks for any.
  const bool keys = call.k.rows > 0;
  const int key_rows = keys ? call.shape.keys : call.shape.rows(), kv_heads = keys ? call.kv_heads : work.heads;
  map_of(call.q, work.heads, call.shape.rows(), &q);
  map_of(keys ? call.k : call.q, kv_heads, key_rows, &k);
  map_of(keys ? call.v : call.q, kv_heads, key_rows, &v);
  if (!failure.empty()) return failure;

  void* arguments[] = {&q, &k, &v, const_cast<AttentionWork*>(&work)};
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(items, multiprocessors));
  const auto threads = static_cast<unsigned>(call.shape.threads());
  const auto bytes = static_cast<unsigned>(call.shape.shared_bytes());
  if (kernel.loaded == nullptr) {
    const auto on = static_cast<cudaStream_t>(stream);
    return words(cudaLaunchKernel(kernel.function, dim3(blocks), dim3(threads), arguments, bytes, on));
  }
  const auto launch = driver<decltype(cuLaunchKernel)>("cuLaunchKernel");
  if (launch == nullptr) return "the driver has no cuLaunchKernel";
  return driver_words(launch(static_cast<CUfunction>(kernel.loaded), blocks, 1, 1, threads, 1, 1, bytes,
                             static_cast<CUstream>(stream), arguments, nullptr));
}

std::string attention_load(const std::string& path, const AttentionShape& shape, bool fp16, bool causal) {
  const auto load = driver<decltype(cuLibraryLoadFromFile)>("cuLibraryLoadFromFile");
  const auto get = driver<decltype(cuLibraryGetKernel)>("cuLibraryGetKernel");
  if (load == nullptr || get == nullptr) return "the driver loads no libraries: it is older than CUDA 12";
  CUlibrary library = nullptr;
  CUkernel kernel = nullptr;
  std::string failure = driver_words(load(&library, path.c_str(), nullptr, nullptr, 0, nullptr, nullptr, 0));
  if (failure.empty()) failure = driver_words(get(&kernel, library, "attention_forward"));
  if (!failure.empty()) return path + ": " + failure;
  const std::lock_guard<std::mutex> lock(loaded_mutex);
  loaded_kernels().push_back({shape, fp16, causal, nullptr, kernel});
  return "";
}

#endif

}  // namespace qwen2vl
