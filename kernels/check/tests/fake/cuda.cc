// A driver without a GPU: libcuda.so.1 as far as Tunesmith calls it. Its device memory is the host's, and ends at guard pages; its
// streams do at once what they are asked; its kernels are the emulation's fast build, found by their names. $FAKE_CUDA makes it fail:
// see `is`.
#include <dlfcn.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "host.h"

namespace {

enum Result {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NO_DEVICE = 100,
  NO_BINARY_FOR_GPU = 209,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  ILLEGAL_ADDRESS = 700,
};

// One of: old (driver), none (no device), ancient (a GPU before Ampere), unknown (a GPU for which nothing was compiled), small (1 MiB of
// memory), narrow (little shared memory), crash (the first kernel fails, which shows later), short (kernels with an argument less).
bool is(const char* fault) {
  const char* wanted = getenv("FAKE_CUDA");
  return wanted && !strcmp(wanted, fault);
}

const size_t TOTAL = size_t(64) << 30;
std::map<uint64_t, size_t> buffers;
size_t used;
// Sticky, as a context's failures are.
Result failure = SUCCESS;
bool has_launched;

size_t total() { return is("small") ? size_t(1) << 20 : TOTAL; }
// What work that was asked for has come to.
Result late() {
  if (is("crash") && has_launched) failure = ILLEGAL_ADDRESS;
  return failure;
}
// Whether a copy stays within one buffer.
bool holds(uint64_t at, size_t bytes) {
  auto behind = buffers.upper_bound(at);
  if (behind == buffers.begin()) return bytes == 0;
  auto buffer = std::prev(behind);
  return at + bytes <= buffer->first + buffer->second;
}
double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

extern "C" {

int cuDriverGetVersion(int* version) {
  *version = is("old") ? 12040 : 13000;
  return SUCCESS;
}
int cuInit(unsigned) { return is("none") ? NO_DEVICE : SUCCESS; }
int cuGetErrorName(int error, const char** name) {
  *name = error == ILLEGAL_ADDRESS     ? "CUDA_ERROR_ILLEGAL_ADDRESS"
          : error == NO_BINARY_FOR_GPU ? "CUDA_ERROR_NO_BINARY_FOR_GPU"
          : error == INVALID_VALUE     ? "CUDA_ERROR_INVALID_VALUE"
                                       : "CUDA_ERROR_UNKNOWN";
  return SUCCESS;
}
int cuGetErrorString(int error, const char** text) {
  *text = error == ILLEGAL_ADDRESS     ? "an illegal memory access was encountered"
          : error == NO_BINARY_FOR_GPU ? "no kernel image is available for execution on the device"
                                       : "a failure of the fake driver";
  return SUCCESS;
}
int cuDeviceGetCount(int* count) {
  *count = 1;
  return SUCCESS;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return SUCCESS;
}
int cuDeviceGetName(char* name, int length, int) {
  snprintf(name, length, "%s", is("ancient") ? "Fake V100" : "Fake H100");
  return SUCCESS;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 75: *value = is("ancient") ? 7 : is("unknown") ? 12 : 9; break;  // COMPUTE_CAPABILITY_MAJOR
    case 76: *value = 0; break;                                            // COMPUTE_CAPABILITY_MINOR
    case 97: *value = (is("narrow") ? 32 : 227) << 10; break;              // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    case 16: *value = 132; break;                                          // MULTIPROCESSOR_COUNT
    case 36: *value = 2619000; break;                                      // MEMORY_CLOCK_RATE, kHz
    case 37: *value = 5120; break;                                         // GLOBAL_MEMORY_BUS_WIDTH, bits
    default: return INVALID_VALUE;
  }
  return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = &failure;
  return SUCCESS;
}
int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
int cuCtxSetCurrent(void* context) { return context == &failure ? SUCCESS : INVALID_HANDLE; }

int cuStreamCreate(void** stream, unsigned) {
  *stream = malloc(1);
  return SUCCESS;
}
int cuStreamSynchronize(void*) { return late(); }
int cuStreamDestroy_v2(void* stream) {
  free(stream);
  return SUCCESS;
}
int cuStreamWaitEvent(void*, void*, unsigned) { return late(); }
int cuEventCreate(void** event, unsigned) {
  *event = new double;
  return SUCCESS;
}
int cuEventRecord(void* event, void*) {
  *static_cast<double*>(event) = now();
  return late();
}
int cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
  *milliseconds = float((*static_cast<double*>(end) - *static_cast<double*>(start)) * 1e3);
  return SUCCESS;
}
int cuEventDestroy_v2(void* event) {
  delete static_cast<double*>(event);
  return SUCCESS;
}

int cuDeviceGetMemPool(void** pool, int) {
  *pool = &used;
  return SUCCESS;
}
int cuMemPoolSetAttribute(void*, int, void*) { return SUCCESS; }
int cuMemPoolGetAttribute(void*, int, void* value) {
  // Reserved and used alike.
  *static_cast<uint64_t*>(value) = used;
  return SUCCESS;
}
int cuMemGetInfo_v2(size_t* free, size_t* all) {
  *free = total() - used;
  *all = total();
  return SUCCESS;
}
int cuMemAllocAsync(uint64_t* at, size_t bytes, void*) {
  if (late()) return failure;
  if (used + bytes > total()) return OUT_OF_MEMORY;
  *at = reinterpret_cast<uint64_t>(emu_fast_allocate(bytes, "device memory", false));
  if (!*at) return OUT_OF_MEMORY;
  // A driver leaves whatever was there.
  memset(reinterpret_cast<void*>(*at), 0x5a, bytes);
  buffers[*at] = bytes;
  used += bytes;
  return SUCCESS;
}
int cuMemFreeAsync(uint64_t at, void*) {
  auto buffer = buffers.find(at);
  if (buffer == buffers.end()) return INVALID_VALUE;
  used -= buffer->second;
  buffers.erase(buffer);
  emu_fast_release(reinterpret_cast<void*>(at));
  return late();
}
int cuMemHostAlloc(void** at, size_t bytes, unsigned) {
  *at = malloc(bytes);
  return SUCCESS;
}
int cuMemFreeHost(void* at) {
  free(at);
  return SUCCESS;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void*) {
  if (!holds(to, bytes)) return INVALID_VALUE;
  memcpy(reinterpret_cast<void*>(to), from, bytes);
  return late();
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void*) {
  if (!holds(from, bytes)) return INVALID_VALUE;
  memcpy(to, reinterpret_cast<const void*>(from), bytes);
  return late();
}
int cuMemsetD8Async(uint64_t at, unsigned char byte, size_t bytes, void*) {
  if (!holds(at, bytes)) return INVALID_VALUE;
  memset(reinterpret_cast<void*>(at), byte, bytes);
  return late();
}

// An image of a fatbin begins with its magic number.
int cuModuleLoadData(void** module, const void* image) {
  uint32_t magic;
  memcpy(&magic, image, sizeof magic);
  if (magic != 0xba55ed50 || reinterpret_cast<uintptr_t>(image) % 8) return INVALID_VALUE;
  if (is("unknown")) return NO_BINARY_FOR_GPU;
  *module = const_cast<void*>(image);
  return SUCCESS;
}
int cuModuleUnload(void*) { return SUCCESS; }
int cuModuleGetFunction(void** function, void*, const char* name) {
  Dl_info here;
  dladdr(reinterpret_cast<void*>(&is), &here);
  static void* const library = dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  *function = dlsym(library, ("emu_fast_" + std::string(name)).c_str());
  return *function ? SUCCESS : NOT_FOUND;
}
int cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* size) {
  auto* entry = static_cast<const EMU::Entry*>(function);
  if (index + is("short") >= emu_fast_argument_count(entry)) return INVALID_VALUE;
  *offset = 0;
  *size = emu_fast_argument_size(entry, uint32_t(index));
  return SUCCESS;
}
std::map<void*, int> allowed;
int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute != 8) return INVALID_VALUE;  // MAX_DYNAMIC_SHARED_SIZE_BYTES
  allowed[function] = value;
  return SUCCESS;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                   unsigned shared_bytes, void*, void** arguments, void**) {
  if (late()) return failure;
  unsigned most = allowed.count(function) ? allowed[function] : 48 << 10;
  if (shared_bytes > most || threads > 1024) return INVALID_VALUE;
  has_launched = true;
  if (is("crash")) return SUCCESS;
  emu_fast_launch_config config = {{x, y, z}, {threads, 1, 1}, shared_bytes, 227 << 10, 0, 0, ~uint64_t(0)};
  if (!emu_fast_launch(static_cast<const EMU::Entry*>(function), &config, arguments)) return SUCCESS;
  fprintf(stderr, "%s\n", emu_fast_error());
  return failure = ILLEGAL_ADDRESS;
}

}  // extern "C"
