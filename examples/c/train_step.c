/* Train the adapter of a text bundle on this device: plain C11 and onnxruntime's C API.

     train_step BUNDLE RECORDS STEPS LEARNING_RATE TRAINED [ADAPTER]

   RECORDS has one record in a line: its label, then its token ids, with blanks between. All records
   are one batch. Every step prints the batch's mean loss before the step. TRAINED gets the adapter
   after the last step, as a frame like adapter.bin; given as ADAPTER, the next run starts from it
   and not from the bundle's.

   The bundle must have been verified (signature, every SHA-256), and the records must be within the
   manifest's limits: this program reads neither. */
#include <math.h>
#include <onnxruntime_c_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "frame.h"

enum { MAX_RECORDS = 64, MAX_TOKENS = 512, MAX_LINE = 1 << 14, MAX_PATH = 4096 };
enum { MODEL_INPUTS = 4 }; /* input_ids, attention_mask, labels, weights; then the adapter */
static const char *const INPUTS[] = {"input_ids", "attention_mask", "labels", "weights"};

typedef struct {
  int64_t rows, columns;
  int64_t ids[MAX_RECORDS * MAX_TOKENS], mask[MAX_RECORDS * MAX_TOKENS];
  int64_t labels[MAX_RECORDS];
  float weights[MAX_RECORDS]; /* 1/rows: then the loss is a mean */
} batch;

typedef struct {
  size_t inputs, outputs;
  const char **input_names, **output_names;
  OrtValue **in, **out; /* `in` points into batch and adapter: what they hold is what is fed */
} call;

static const OrtApi *ort;

static void stop(const char *what, const char *why) {
  fprintf(stderr, "train_step: %s: %s\n", what, why);
  exit(1);
}

static void must(OrtStatus *status, const char *what) {
  if (status) stop(what, ort->GetErrorMessage(status));
}

static void *allocated(size_t count, size_t size) {
  void *memory = calloc(count, size);
  if (!memory) stop("memory", "none left");
  return memory;
}

/* Read the records, padded on the right with id 0 under mask 0. */
static void read_records(const char *path, batch *out) {
  static char line[MAX_LINE];
  static int64_t ids[MAX_RECORDS][MAX_TOKENS];
  int64_t length[MAX_RECORDS];
  FILE *file = fopen(path, "r");
  if (!file) stop(path, "cannot be read");
  while (fgets(line, sizeof line, file)) {
    char *at = line, *end;
    int64_t r = out->rows++, n = 0;
    if (r == MAX_RECORDS || strlen(line) == sizeof line - 1)
      stop(path, "too many records or tokens");
    out->labels[r] = strtoll(at, &end, 10);
    if (end == at) stop(path, "a line without a label");
    for (at = end;; at = end) {
      int64_t id = strtoll(at, &end, 10);
      if (end == at) break;
      if (n == MAX_TOKENS) stop(path, "too many tokens");
      ids[r][n++] = id;
    }
    if (n == 0 || at[strspn(at, " \r\n")]) stop(path, "expected a label and token ids in a line");
    length[r] = n;
    if (n > out->columns) out->columns = n;
  }
  fclose(file);
  if (!out->rows) stop(path, "has no records");
  for (int64_t r = 0; r < out->rows; r++) {
    out->weights[r] = 1.0f / (float)out->rows;
    for (int64_t t = 0; t < length[r]; t++) {
      out->ids[r * out->columns + t] = ids[r][t];
      out->mask[r * out->columns + t] = 1;
    }
  }
}

/* Settings that save memory: weights stay as the file has them, mapped; only touched pages count. */
static OrtSession *open_session(OrtEnv *env, const char *folder) {
  static const char *const settings[][2] = {
      {"session.intra_op.allow_spinning", "0"},
      {"session.disable_prepacking", "1"},
      {"optimization.disable_specified_optimizers",
       "ConstantFolding;CommonSubexpressionElimination"},
  };
  char path[MAX_PATH];
  if (snprintf(path, sizeof path, "%s/train_step.fp32.onnx", folder) >= (int)sizeof path)
    stop(folder, "path is too long");
  OrtSessionOptions *options;
  OrtSession *session;
  must(ort->CreateSessionOptions(&options), "options");
  must(ort->SetIntraOpNumThreads(options, 1), "options");
  must(ort->SetInterOpNumThreads(options, 1), "options");
  for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
    must(ort->AddSessionConfigEntry(options, settings[i][0], settings[i][1]), settings[i][0]);
  must(ort->CreateSession(env, path, options, &session), path); /* finds its external data beside */
  ort->ReleaseSessionOptions(options);
  return session;
}

static OrtValue *wrapped(const OrtMemoryInfo *cpu, void *data, size_t count, const int64_t *shape,
                         size_t dimensions, ONNXTensorElementDataType type) {
  size_t size = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? sizeof(float) : sizeof(int64_t);
  OrtValue *value;
  must(ort->CreateTensorWithDataAsOrtValue(cpu, data, count * size, shape, dimensions, type, &value),
       "tensor");
  return value;
}

static call prepared(const OrtMemoryInfo *cpu, batch *records, adapter *params) {
  const ONNXTensorElementDataType integers = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64,
                                  floats = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  int64_t shape[] = {records->rows, records->columns};
  size_t rows = (size_t)records->rows, tokens = rows * (size_t)records->columns;
  call one = {.inputs = MODEL_INPUTS + params->count, .outputs = 1 + params->count};
  one.input_names = allocated(one.inputs, sizeof *one.input_names);
  one.output_names = allocated(one.outputs, sizeof *one.output_names);
  one.in = allocated(one.inputs, sizeof *one.in);
  one.out = allocated(one.outputs, sizeof *one.out);
  memcpy(one.input_names, INPUTS, sizeof INPUTS);
  one.in[0] = wrapped(cpu, records->ids, tokens, shape, 2, integers);
  one.in[1] = wrapped(cpu, records->mask, tokens, shape, 2, integers);
  one.in[2] = wrapped(cpu, records->labels, rows, shape, 1, integers);
  one.in[3] = wrapped(cpu, records->weights, rows, shape, 1, floats);
  one.output_names[0] = "loss";
  for (size_t i = 0; i < params->count; i++) {
    tensor *t = &params->tensors[i];
    char *gradient = allocated(MAX_NAME + sizeof ".grad", 1);
    sprintf(gradient, "%s.grad", t->name);
    one.output_names[1 + i] = gradient;
    one.input_names[MODEL_INPUTS + i] = t->name;
    one.in[MODEL_INPUTS + i] = wrapped(cpu, t->values, t->count, t->shape, t->dimensions, floats);
  }
  return one;
}

static const float *values_of(OrtValue *value) {
  void *data;
  must(ort->GetTensorMutableData(value, &data), "output");
  return data;
}

/* AdamW (Loshchilov and Hutter 2019) without weight decay; moments start at 0, step at 1. */
static void adamw(float *w, const float *g, float *m, float *v, size_t n, int step, double rate) {
  const float first = (float)(rate / (1 - pow(0.9, step)));
  const float second = (float)sqrt(1 - pow(0.999, step));
  for (size_t i = 0; i < n; i++) {
    m[i] = 0.9f * m[i] + 0.1f * g[i];
    v[i] = 0.999f * v[i] + 0.001f * g[i] * g[i];
    w[i] -= first * m[i] / (sqrtf(v[i]) / second + 1e-8f);
  }
}

static void release(call *one) {
  for (size_t i = 0; i < one->inputs; i++) ort->ReleaseValue(one->in[i]);
  for (size_t i = 1; i < one->outputs; i++) free((void *)one->output_names[i]);
  free(one->input_names);
  free(one->output_names);
  free(one->in);
  free(one->out);
}

int main(int count, char **arguments) {
  static batch records;
  adapter params;
  char path[MAX_PATH];
  if (count != 6 && count != 7)
    stop("arguments", "expected BUNDLE RECORDS STEPS LEARNING_RATE TRAINED [ADAPTER]");
  const char *folder = arguments[1];
  const int steps = atoi(arguments[3]);
  const double rate = atof(arguments[4]);
  if (snprintf(path, sizeof path, "%s/adapter.bin", folder) >= (int)sizeof path)
    stop(folder, "path is too long");
  const char *start = count == 7 ? arguments[6] : path;
  const char *refusal = frame_read(start, &params);
  if (refusal) stop(start, refusal);
  read_records(arguments[2], &records);

  ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (!ort) stop("onnxruntime", "the library is older than the header");
  OrtEnv *env;
  OrtMemoryInfo *cpu;
  must(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "train_step", &env), "environment");
  must(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &cpu), "memory");
  OrtSession *session = open_session(env, folder);
  call one = prepared(cpu, &records, &params);
  float *m = allocated(params.value_count, sizeof *m), *v = allocated(params.value_count, sizeof *v);

  for (int step = 1; step <= steps; step++) {
    must(ort->Run(session, NULL, one.input_names, (const OrtValue *const *)one.in, one.inputs,
                  one.output_names, one.outputs, one.out),
         "step");
    printf("%.9g\n", (double)*values_of(one.out[0]));
    for (size_t i = 0; i < params.count; i++) {
      tensor *t = &params.tensors[i];
      size_t at = (size_t)(t->values - params.values);
      adamw(t->values, values_of(one.out[1 + i]), m + at, v + at, t->count, step, rate);
    }
    for (size_t i = 0; i < one.outputs; i++) {
      ort->ReleaseValue(one.out[i]);
      one.out[i] = NULL; /* the next call makes new ones */
    }
  }
  refusal = frame_write(arguments[5], &params);
  if (refusal) stop(arguments[5], refusal);

  release(&one);
  free(m);
  free(v);
  ort->ReleaseSession(session);
  ort->ReleaseMemoryInfo(cpu);
  ort->ReleaseEnv(env);
  frame_free(&params);
  return 0;
}
