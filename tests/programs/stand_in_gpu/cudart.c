// A stand-in for CUDA 11's run time: one device, whose memory is the host's and whose streams have always finished.
#include <stdlib.h>
#include <string.h>

typedef void *Handle;

// As in CUDA 11's driver_types.h, up to the last field that is set here.
struct cudaDeviceProp {
  char name[256], uuid[16], luid[8];
  unsigned luid_device_node_mask;
  size_t total_global_memory, shared_memory_per_block;
  int registers_per_block, warp_size;
  size_t memory_pitch;
  int max_threads_per_block, max_threads[3], max_grid[3], clock_rate;
  size_t total_constant_memory;
  int major, minor;
  size_t texture_alignment, texture_pitch_alignment;
  int device_overlap, multiprocessors;
  char others[312];
};
_Static_assert(sizeof(struct cudaDeviceProp) == 704, "CUDA 11's size");

int cudaGetDeviceCount(int *count) { return *count = 1, 0; }
int cudaSetDevice(int device) { return device; }
int cudaDeviceSynchronize(void) { return 0; }
int cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
  *properties = (struct cudaDeviceProp){
      .name = "stand-in", .total_global_memory = 8ul << 30, .shared_memory_per_block = 49152,
      .registers_per_block = 65536, .warp_size = 32, .memory_pitch = 2147483647, .max_threads_per_block = 1024,
      .max_threads = {1024, 1024, 64}, .max_grid = {2147483647, 65535, 65535}, .clock_rate = 1755000,
      .total_constant_memory = 65536, .major = 8, .minor = 0, .multiprocessors = 108};
  return device;
}

int cudaMalloc(void **memory, size_t size) { return posix_memalign(memory, 512, size) ? 2 : 0; }
int cudaHostAlloc(void **memory, size_t size, unsigned flags) { return (void)flags, cudaMalloc(memory, size); }
int cudaFree(void *memory) { return free(memory), 0; }
int cudaFreeHost(void *memory) { return free(memory), 0; }
int cudaHostRegister(void *memory, size_t size, unsigned flags) { return 0; }
int cudaHostUnregister(void *memory) { return 0; }
int cudaMemGetInfo(size_t *available, size_t *total) { return *available = *total = 4ul << 30, 0; }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
  enum { kDeviceToHost = 2 };
  memmove(to, from, size);
  if (size == 1 && kind == kDeviceToHost) *(char *)to &= 1;  // a bool, by which MindSpore chooses a branch
  return 0;
}
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, Handle stream) {
  return cudaMemcpy(to, from, size, kind);
}
int cudaMemset(void *memory, int value, size_t size) { return memset(memory, value, size), 0; }
int cudaMemsetAsync(void *memory, int value, size_t size, Handle stream) { return memset(memory, value, size), 0; }

static int create(Handle *handle) { return *handle = malloc(8), 0; }
int cudaEventCreate(Handle *event) { return create(event); }
int cudaEventCreateWithFlags(Handle *event, unsigned flags) { return create(event); }
int cudaEventDestroy(Handle event) { return 0; }
int cudaEventElapsedTime(float *milliseconds, Handle start, Handle end) { return *milliseconds = 0.1f, 0; }
int cudaEventQuery(Handle event) { return 0; }
int cudaEventRecord(Handle event, Handle stream) { return 0; }
int cudaEventSynchronize(Handle event) { return 0; }
int cudaStreamCreate(Handle *stream) { return create(stream); }
int cudaStreamCreateWithFlags(Handle *stream, unsigned flags) { return create(stream); }
int cudaStreamCreateWithPriority(Handle *stream, unsigned flags, int priority) { return create(stream); }
int cudaStreamDestroy(Handle stream) { return 0; }
int cudaStreamQuery(Handle stream) { return 0; }
int cudaStreamSynchronize(Handle stream) { return 0; }
int cudaStreamWaitEvent(Handle stream, Handle event, unsigned flags) { return 0; }

int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
const char *cudaGetErrorName(int error) { return "error"; }
const char *cudaGetErrorString(int error) { return "an error of the stand-in"; }
