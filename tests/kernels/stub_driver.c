// A libcuda of one kernel, "k", whose parameter is a struct of 16 bytes. It prints each launch and runs nothing, so
// that cuda.bindings, and the code on it, can be called where there is no GPU. Result codes are those of CUresult.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned int uint;

static void *const CONTEXT = (void *)0x11, *const MODULE = (void *)0x22, *const FUNCTION = (void *)0x33;

int cuInit(uint flags) { return setvbuf(stdout, NULL, _IONBF, 0); }  // prints come in order with those of Python
int cuDriverGetVersion(int *version) { return *version = atoi(getenv("STUB_DRIVER_VERSION")), 0; }
int cuCtxGetCurrent(void **context) { return *context = getenv("STUB_NO_CONTEXT") ? NULL : CONTEXT, 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)(0x11L + device), 0; }
int cuCtxSetCurrent(void *context) { return printf("context %p\n", context), 0; }
int cuModuleLoadData(void **module, const void *image) {
  return *module = MODULE, memcmp(image, "\177ELF", 4) ? 209 : 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
  return *function = FUNCTION, module != MODULE || strcmp(name, "k") ? 500 : 0;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) { return *value = 100 + attribute, 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return attribute != 8 || value > 232448; }
int cuFuncGetParamInfo(void *function, size_t index, size_t *offset, size_t *size) {
  return *offset = 0, *size = 16, index > 0;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads, size_t shared_bytes) {
  return *blocks = (int)(2048 / threads - shared_bytes / 65536), 0;
}

static int launch(const char *kind, void *function, const uint *shape, uint shared_bytes, void *stream,
                  void **parameters) {
  unsigned long long words[2];
  memcpy(words, parameters[0], sizeof words);
  printf("%s %p grid %u %u %u block %u %u %u shared %u stream %p argument %llu %llu\n", kind, function, shape[0],
         shape[1], shape[2], shape[3], shape[4], shape[5], shared_bytes, stream, words[0], words[1]);
  return shape[0] == 720 ? 720 : shape[0] == 201 ? 201 : 0;
}
int cuLaunchKernel(void *f, uint x, uint y, uint z, uint a, uint b, uint c, uint s, void *t, void **p, void **extra) {
  return launch(extra ? "extra" : "plain", f, (uint[]){x, y, z, a, b, c}, s, t, p);
}
int cuLaunchCooperativeKernel(void *f, uint x, uint y, uint z, uint a, uint b, uint c, uint s, void *t, void **p) {
  return launch("cooperative", f, (uint[]){x, y, z, a, b, c}, s, t, p);
}

// How the bindings find all of the above.
int cuGetProcAddress_v2(const char *name, void **entry, int version, unsigned long long flags, int *status) {
  static const struct { const char *name; void *entry; } entries[] = {
#define ENTRY(name) {#name, (void *)name}
      ENTRY(cuInit), ENTRY(cuDriverGetVersion), ENTRY(cuCtxGetCurrent), ENTRY(cuDeviceGet),
      ENTRY(cuDevicePrimaryCtxRetain), ENTRY(cuCtxSetCurrent), ENTRY(cuModuleLoadData), ENTRY(cuModuleGetFunction),
      ENTRY(cuFuncGetAttribute), ENTRY(cuFuncSetAttribute), ENTRY(cuFuncGetParamInfo),
      ENTRY(cuOccupancyMaxActiveBlocksPerMultiprocessor), ENTRY(cuLaunchKernel), ENTRY(cuLaunchCooperativeKernel),
      {"cuGetProcAddress", (void *)cuGetProcAddress_v2},
  };
  for (size_t i = 0; i < sizeof entries / sizeof *entries; i++)
    if (!strcmp(entries[i].name, name)) {
      if (status) *status = 0;
      return *entry = entries[i].entry, 0;
    }
  if (status) *status = 1;
  return *entry = NULL, 500;
}
