// A stand-in for CUDA's driver.
int cuInit(unsigned flags) { return 100; }  // "no device": MindSpore asks the run time, and others find none
int cuDriverGetVersion(int *version) { return *version = 11060, 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  enum { kMajor = 75, kMinor = 76 };  // of the compute capability
  return *value = attribute == kMajor ? 8 : attribute == kMinor ? 0 : 1024, 0;
}
int cuGetErrorName(int error, const char **name) { return *name = "error", 0; }
int cuLaunchKernel(void) { return 0; }
int cuModuleGetFunction(void) { return 0; }
int cuModuleLoadDataEx(void) { return 0; }
int cuModuleUnload(void) { return 0; }
int cuStreamSynchronize(void *stream) { return 0; }
