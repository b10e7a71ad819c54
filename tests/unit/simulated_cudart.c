// What areal_vllm_ext/transport/ipc.py calls of the CUDA runtime, on host memory and within one process.

#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, COPY_DEFAULT = 4 };

typedef struct { char reserved[64]; } Handle;

int allocated = 0, opened = 0, last_error = SUCCESS;
unsigned last_flags;
void *last_stream;

static int fail(int error) { return last_error = error; }

enum { MOST = 16 };
static struct { char *address; size_t size; unsigned long long number; } allocations[MOST];
static unsigned long long numbers;

int cudaMalloc(void **address, size_t size) {
  if (size > 1 << 20) return fail(OUT_OF_MEMORY);
  int i = 0;
  while (i < MOST && allocations[i].address) i++;
  if (i == MOST) return fail(OUT_OF_MEMORY);
  allocated++;
  *address = allocations[i].address = aligned_alloc(512, (size + 511) / 512 * 512);
  allocations[i].size = size;
  allocations[i].number = ++numbers;
  return SUCCESS;
}
int cudaFree(void *address) {
  for (int i = 0; i < MOST; i++)
    if (allocations[i].address == address) allocations[i].address = NULL;
  allocated--;
  free(address);
  return SUCCESS;
}
int cuMemGetAddressRange_v2(unsigned long long *base, size_t *size, unsigned long long address) {
  for (int i = 0; i < MOST; i++) {
    unsigned long long start = (unsigned long long)allocations[i].address;
    if (start && start <= address && address < start + allocations[i].size) {
      *base = start;
      *size = allocations[i].size;
      return SUCCESS;
    }
  }
  return INVALID_VALUE;
}

int cuPointerGetAttribute(void *data, int attribute, unsigned long long address) {
  for (int i = 0; i < MOST; i++) {
    unsigned long long start = (unsigned long long)allocations[i].address;
    if (attribute == 7 && start && start <= address && address < start + allocations[i].size) {
      *(unsigned long long *)data = allocations[i].number;
      return SUCCESS;
    }
  }
  return INVALID_VALUE;
}

int cudaIpcGetMemHandle(Handle *handle, void *address) {
  memset(handle, 0, sizeof *handle);  // zeros inside, as in real ones
  memcpy(handle->reserved + 8, &address, sizeof address);
  handle->reserved[63] = 63;
  return SUCCESS;
}
int cudaIpcOpenMemHandle(void **address, Handle handle, unsigned flags) {
  if (handle.reserved[63] != 63) return fail(INVALID_VALUE);
  memcpy(address, handle.reserved + 8, sizeof *address);
  last_flags = flags;
  opened++;
  return SUCCESS;
}
int cudaIpcCloseMemHandle(void *address) { opened--; return SUCCESS; }

int cudaMemcpyAsync(void *to, const void *from, size_t count, int kind, void *stream) {
  if (kind != COPY_DEFAULT) return fail(INVALID_VALUE);
  memcpy(to, from, count);
  last_stream = stream;
  return SUCCESS;
}
int cudaGetLastError(void) { int error = last_error; last_error = SUCCESS; return error; }
const char *cudaGetErrorString(int error) { return error == OUT_OF_MEMORY ? "out of memory" : "invalid argument"; }
