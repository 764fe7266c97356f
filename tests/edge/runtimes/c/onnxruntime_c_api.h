/* The part of onnxruntime's C API that examples/c calls, for machines without its header.

   The table of functions only ever grows at its end, so a function's place in it is part of the
   binary interface: the numbers are places counted from 0. test_c.py compares them with the
   official header where there is one. Programs take the official header. */
#ifndef ONNXRUNTIME_PLACES_H
#define ONNXRUNTIME_PLACES_H

#include <stddef.h>
#include <stdint.h>

#define ORT_API_VERSION 19 /* of onnxruntime 1.19, the oldest that runs a bundle */
#define UNUSED(first, last) void (*unused_##first[last - first + 1])(void)
#define RESULT(name) OrtStatus *(*name)

typedef struct OrtStatus OrtStatus;
typedef struct OrtEnv OrtEnv;
typedef struct OrtSession OrtSession;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtValue OrtValue;
typedef enum { ORT_LOGGING_LEVEL_ERROR = 3 } OrtLoggingLevel;
typedef enum { OrtArenaAllocator = 1 } OrtAllocatorType;
typedef enum { OrtMemTypeDefault = 0 } OrtMemType;
typedef enum {
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7
} ONNXTensorElementDataType;

typedef struct {
  UNUSED(0, 1);
  const char *(*GetErrorMessage)(const OrtStatus *);                            /* 2 */
  RESULT(CreateEnv)(OrtLoggingLevel, const char *, OrtEnv **);                  /* 3 */
  UNUSED(4, 6);
  RESULT(CreateSession)(const OrtEnv *, const char *, const OrtSessionOptions *, /* 7 */
                        OrtSession **);
  UNUSED(8, 8);
  RESULT(Run)(OrtSession *, const OrtRunOptions *, const char *const *,         /* 9 */
              const OrtValue *const *, size_t, const char *const *, size_t, OrtValue **);
  RESULT(CreateSessionOptions)(OrtSessionOptions **);                           /* 10 */
  UNUSED(11, 23);
  RESULT(SetIntraOpNumThreads)(OrtSessionOptions *, int);                       /* 24 */
  RESULT(SetInterOpNumThreads)(OrtSessionOptions *, int);                       /* 25 */
  UNUSED(26, 48);
  RESULT(CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo *, void *, size_t, /* 49 */
                                         const int64_t *, size_t, ONNXTensorElementDataType,
                                         OrtValue **);
  UNUSED(50, 50);
  RESULT(GetTensorMutableData)(OrtValue *, void **);                            /* 51 */
  UNUSED(52, 68);
  RESULT(CreateCpuMemoryInfo)(OrtAllocatorType, OrtMemType, OrtMemoryInfo **);  /* 69 */
  UNUSED(70, 91);
  void (*ReleaseEnv)(OrtEnv *);                                                 /* 92 */
  UNUSED(93, 93);
  void (*ReleaseMemoryInfo)(OrtMemoryInfo *);                                   /* 94 */
  void (*ReleaseSession)(OrtSession *);                                         /* 95 */
  void (*ReleaseValue)(OrtValue *);                                             /* 96 */
  UNUSED(97, 99);
  void (*ReleaseSessionOptions)(OrtSessionOptions *);                           /* 100 */
  UNUSED(101, 129);
  RESULT(AddSessionConfigEntry)(OrtSessionOptions *, const char *, const char *); /* 130 */
} OrtApi;

typedef struct {
  const OrtApi *(*GetApi)(uint32_t version);
  const char *(*GetVersionString)(void);
} OrtApiBase;

const OrtApiBase *OrtGetApiBase(void);

#endif
