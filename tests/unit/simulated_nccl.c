// What areal_vllm_ext/transport/nccl.py calls of NCCL, without a GPU: a communicator whose unique id says how it behaves.
// Built with -DVERSION=<version code>.

#include <limits.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 4, REMOTE_ERROR = 6, IN_PROGRESS = 7 };

typedef struct { char internal[128]; } UniqueId;

// The configuration as a later NCCL has it: longer than the caller's.
typedef struct {
  size_t size;
  unsigned magic, version;
  int blocking, cga_cluster_size, min_ctas, max_ctas;
  const char *net_name;
  int split_share, traffic_class;
  const char *comm_name;
  int collnet_enable;
} Config;

typedef struct { char behaviour; int polls, begun, rank, size; } Comm;

int alive = 0;  // communicators that nobody has aborted
void *last_address, *last_stream;
size_t last_count;
int last_type, last_root;

int ncclGetVersion(int *version) { *version = VERSION; return SUCCESS; }
const char *ncclGetErrorString(int result) { return result == REMOTE_ERROR ? "remote error" : "invalid argument"; }
const char *ncclGetLastError(Comm *comm) { return comm ? 0 : "peer 1 has hung up"; }

int ncclGetUniqueId(UniqueId *id) {
  memset(id, 0, sizeof *id);
  for (int i = 0; i < 128; i++) id->internal[i] = (char)i;
  id->internal[0] = 'o';
  return SUCCESS;
}

int ncclCommInitRankConfig(Comm **comm, int size, UniqueId id, int rank, Config *given) {
  Config config = {0};
  memcpy(&config, given, given->size < sizeof config ? given->size : sizeof config);
  int undefined = config.cga_cluster_size == INT_MIN && config.min_ctas == INT_MIN && config.max_ctas == INT_MIN &&
                  config.split_share == INT_MIN && config.traffic_class == INT_MIN && !config.net_name;
  *comm = 0;
  if (config.magic != 0xcafebeef || config.version < 21700 || config.blocking != 0 || !undefined) return INVALID_ARGUMENT;
  if (id.internal[127] != 127 || rank < 0 || rank >= size) return INVALID_ARGUMENT;
  *comm = calloc(1, sizeof **comm);
  (*comm)->behaviour = id.internal[0];
  (*comm)->rank = rank;
  (*comm)->size = size;
  alive++;
  return IN_PROGRESS;
}

// 'o': all is well after some polls. 'h': the handshake hangs. 'd': a peer dies in the handshake. 'b': in the broadcast.
int ncclCommGetAsyncError(Comm *comm, int *state) {
  comm->polls++;
  *state = comm->behaviour == 'h' || comm->polls < 3 ? IN_PROGRESS : SUCCESS;
  if (comm->polls >= 3 && (comm->behaviour == 'd' || (comm->behaviour == 'b' && comm->begun))) *state = REMOTE_ERROR;
  return SUCCESS;
}

int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, Comm *comm, void *stream) {
  if (from != to) return INVALID_ARGUMENT;
  last_address = to, last_count = count, last_type = type, last_root = root, last_stream = stream;
  comm->begun = 1;
  comm->polls = 0;
  return IN_PROGRESS;
}

int ncclCommAbort(Comm *comm) { free(comm); alive--; return SUCCESS; }
