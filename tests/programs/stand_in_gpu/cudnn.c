// Of cuDNN 8, what does more than to return 0: algorithms, of which there is one, and sizes of buffers.
#include <stddef.h>
#include <string.h>

typedef void *Handle;
typedef struct {
  int algorithm, status;
  float time;
  size_t memory;
  int determinism, math_type, reserved[3];
} Performance;

static int one_algorithm(int wanted, int *found, Performance *results) {
  memset(results, 0, wanted * sizeof *results);
  results->algorithm = 1;
  return *found = 1, 0;
}
#define FIND(name)                                                                                               \
  int name(Handle a, Handle b, Handle c, Handle d, Handle e, int wanted, int *found, Performance *results) {     \
    return one_algorithm(wanted, found, results);                                                                \
  }
FIND(cudnnGetConvolutionForwardAlgorithm_v7)
FIND(cudnnGetConvolutionBackwardDataAlgorithm_v7)
FIND(cudnnGetConvolutionBackwardFilterAlgorithm_v7)

static int small(size_t *size) { return *size = 1024, 0; }
int cudnnGetConvolutionForwardWorkspaceSize(Handle a, Handle b, Handle c, Handle d, Handle e, int f, size_t *size) {
  return small(size);
}
int cudnnGetConvolutionBackwardDataWorkspaceSize(Handle a, Handle b, Handle c, Handle d, Handle e, int f, size_t *size) {
  return small(size);
}
int cudnnGetConvolutionBackwardFilterWorkspaceSize(Handle a, Handle b, Handle c, Handle d, Handle e, int f,
                                                   size_t *size) {
  return small(size);
}
int cudnnGetTensorSizeInBytes(Handle tensor, size_t *size) { return *size = 1 << 20, 0; }
int cudnnGetFilterSizeInBytes(Handle filter, size_t *size) { return *size = 1 << 20, 0; }
int cudnnGetReductionWorkspaceSize(Handle a, Handle b, Handle c, Handle d, size_t *size) { return small(size); }
int cudnnGetReductionIndicesSize(Handle a, Handle b, Handle c, Handle d, size_t *size) { return small(size); }
int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(Handle a, int b, int c, Handle d, Handle e, Handle f,
                                                             Handle g, Handle h, size_t *size) {
  return small(size);
}
int cudnnGetBatchNormalizationBackwardExWorkspaceSize(Handle a, int b, int c, Handle d, Handle e, Handle f, Handle g,
                                                      Handle h, Handle i, Handle j, size_t *size) {
  return small(size);
}
int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(Handle a, int b, int c, Handle d, Handle e, size_t *size) {
  return small(size);
}
int cudnnDropoutGetStatesSize(Handle a, size_t *size) { return small(size); }
const char *cudnnGetErrorString(int status) { return "an error of the stand-in"; }
