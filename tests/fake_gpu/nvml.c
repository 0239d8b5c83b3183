/* libnvidia-ml.so.1, as vLLM and torch ask it which GPUs there are: FAKE_CUDA_DEVICES H100s. */
#include <stdio.h>
#include <stdlib.h>

static unsigned devices(void) {
  const char *n = getenv("FAKE_CUDA_DEVICES");
  return n ? atoi(n) : 1;
}

int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int error) { return "fake error"; }
int nvmlSystemGetDriverVersion(char *s, unsigned n) { return snprintf(s, n, "580.0") < 0; }
int nvmlDeviceGetCount_v2(unsigned *n) {
  *n = devices();
  return 0;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **device) {
  *device = (void *)(long)(i + 1);
  return 0;
}
int nvmlDeviceGetIndex(void *device, unsigned *i) {
  *i = (long)device - 1;
  return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
  *major = 9;
  *minor = 0;
  return 0;
}
int nvmlDeviceGetName(void *device, char *s, unsigned n) {
  return snprintf(s, n, "NVIDIA H100 80GB HBM3") < 0;
}
int nvmlDeviceGetUUID(void *device, char *s, unsigned n) {
  return snprintf(s, n, "GPU-%08lx-0000-0000-0000-000000000000", (long)device) < 0;
}
int nvmlDeviceGetHandleByUUID(const char *s, void **device) {
  *device = (void *)strtol(s + 4, NULL, 16);
  return 0;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char *s, void **device) {
  *device = (void *)strtol(s + 5, NULL, 16); /* as cudaDeviceGetPCIBusId of runtime.c says it */
  return 0;
}
int nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *n, void *found) {
  *n = 0;
  return 0;
}

/* What an H100 has and this one does not. */
#define UNSUPPORTED(name) int name(void) { return 3; }
UNSUPPORTED(nvmlDeviceGetGpuFabricInfoV)
UNSUPPORTED(nvmlDeviceGetNvLinkRemoteDeviceType)
UNSUPPORTED(nvmlDeviceGetNvLinkRemotePciInfo_v2)
UNSUPPORTED(nvmlDeviceGetP2PStatus)
UNSUPPORTED(nvmlSystemGetCudaDriverVersion_v2)
