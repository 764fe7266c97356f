/* Print the place of every function that examples/c calls, and the constants it passes. */
#include <onnxruntime_c_api.h>
#include <stddef.h>
#include <stdio.h>

#define PLACE(name) printf(#name " %zu\n", offsetof(OrtApi, name) / sizeof(void (*)(void)))
#define VALUE(name) printf(#name " %d\n", (int)name)

int main(void) {
  PLACE(GetErrorMessage);
  PLACE(CreateEnv);
  PLACE(CreateSession);
  PLACE(Run);
  PLACE(CreateSessionOptions);
  PLACE(SetIntraOpNumThreads);
  PLACE(SetInterOpNumThreads);
  PLACE(CreateTensorWithDataAsOrtValue);
  PLACE(GetTensorMutableData);
  PLACE(CreateCpuMemoryInfo);
  PLACE(ReleaseEnv);
  PLACE(ReleaseMemoryInfo);
  PLACE(ReleaseSession);
  PLACE(ReleaseValue);
  PLACE(ReleaseSessionOptions);
  PLACE(AddSessionConfigEntry);
  VALUE(ORT_LOGGING_LEVEL_ERROR);
  VALUE(OrtArenaAllocator);
  VALUE(OrtMemTypeDefault);
  VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
  VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
  return 0;
}
