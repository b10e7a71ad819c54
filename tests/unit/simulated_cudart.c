// What areal_vllm_ext/transport/ipc.py calls of the CUDA runtime, on host memory and within one process.

#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, COPY_DEFAULT = 4 };

typedef struct { char reserved[64]; } Handle;

int allocated = 0, opened = 0, last_error = SUCCESS;
unsigned last_flags;
void *last_stream;

static int fail(int error) { return last_error = error; }

int cudaMalloc(void **address, size_t size) {
  if (size > 1 << 20) return fail(OUT_OF_MEMORY);
  allocated++;
  *address = malloc(size);
  return SUCCESS;
}
int cudaFree(void *address) { allocated--; free(address); return SUCCESS; }

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
