#define _POSIX_C_SOURCE 200809L
#include "frame.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "frames are little-endian: swap the bytes of length and values on this machine"
#endif

enum { START = 8, CHECKSUM = 32, MAX_HEADER = 1 << 20, MAX_TENSORS = 4096 };
static const uint64_t MAX_FRAME = UINT64_C(1) << 30, MAX_COUNT = UINT64_C(1) << 28;
static const char PREFIX[] = "{\"kind\":\"adapter\",\"spec\":{";
static const char TENSORS[] = "\"tensors\":[";
static const char WHOLE[] = "]},\"part\":{\"factors\":\"both\",\"ranks\":null,\"dense\":true}}";

static uint8_t *read_file(const char *path, size_t *size) {
  FILE *file = fopen(path, "rb");
  if (!file) return NULL;
  uint8_t *bytes = NULL;
  long end = fseek(file, 0, SEEK_END) ? -1 : ftell(file);
  if (end >= 0 && (uint64_t)end <= MAX_FRAME && !fseek(file, 0, SEEK_SET))
    bytes = malloc((size_t)end + 1);
  if (bytes && fread(bytes, 1, (size_t)end, file) != (size_t)end) {
    free(bytes);
    bytes = NULL;
  }
  fclose(file);
  *size = bytes ? (size_t)end : 0;
  return bytes;
}

/* Read `"name"` or `12` at *at. A header is written in exactly one way: no blanks, no escapes. */
static int read_name(const char **at, char name[MAX_NAME + 1]) {
  size_t length = 0;
  if (*(*at)++ != '"') return 0;
  while (strchr("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-", **at)) {
    if (!**at || length == MAX_NAME) return 0;
    name[length++] = *(*at)++;
  }
  name[length] = 0;
  return length > 0 && name[0] != '.' && name[0] != '-' && *(*at)++ == '"';
}

static int read_size(const char **at, int64_t *size) {
  if (**at < '1' || **at > '9') return 0;
  for (*size = 0; **at >= '0' && **at <= '9'; (*at)++) {
    *size = *size * 10 + (**at - '0');
    if (*size > INT32_MAX) return 0;
  }
  return 1;
}

/* Read `["name",[3,4]]` at *at. */
static int read_tensor(const char **at, tensor *out) {
  if (*(*at)++ != '[' || !read_name(at, out->name)) return 0;
  if (*(*at)++ != ',' || *(*at)++ != '[') return 0;
  out->count = 1;
  out->dimensions = 0;
  while (**at != ']') {
    if (out->dimensions == MAX_DIMENSIONS || (out->dimensions && *(*at)++ != ',')) return 0;
    int64_t size;
    if (!read_size(at, &size) || (uint64_t)size > MAX_COUNT / out->count) return 0;
    out->shape[out->dimensions++] = size;
    out->count *= (size_t)size;
  }
  (*at)++;
  return *(*at)++ == ']';
}

static const char *read_header(adapter *out) {
  const char *at = strstr(out->header, TENSORS);
  if (strncmp(out->header, PREFIX, sizeof PREFIX - 1) || !at) return "header: not an adapter's";
  at += sizeof TENSORS - 1;
  out->tensors = calloc(MAX_TENSORS, sizeof(tensor));
  if (!out->tensors) return "out of memory";
  do {
    tensor *one = &out->tensors[out->count];
    if (out->count == MAX_TENSORS || !read_tensor(&at, one)) return "header: wrong tensors";
    if (out->count && strcmp(one[-1].name, one->name) >= 0) return "header: names not ascending";
    out->value_count += one->count;
    out->count++;
    if (out->value_count > MAX_COUNT) return "header: too many values";
  } while (*at++ == ',');
  if (strcmp(at - 1, WHOLE)) return "header: not a whole adapter";
  return NULL;
}

static const char *parse(const uint8_t *bytes, size_t size, adapter *out) {
  uint8_t digest[CHECKSUM];
  uint32_t length;
  if (size < START + CHECKSUM || memcmp(bytes, "ABA1", 4)) return "not a frame";
  memcpy(&length, bytes + 4, 4);
  if (length > MAX_HEADER || length > size - START - CHECKSUM) return "header: wrong length";
  sha256(bytes, size - CHECKSUM, digest);
  if (memcmp(digest, bytes + size - CHECKSUM, CHECKSUM)) return "checksum differs";
  out->header = calloc(length + 1, 1);
  if (!out->header) return "out of memory";
  memcpy(out->header, bytes + START, length);
  out->header_bytes = length;
  if (strlen(out->header) != length) return "header: a zero byte";
  const char *refusal = read_header(out);
  if (refusal) return refusal;
  if (out->value_count * sizeof(float) != size - START - CHECKSUM - length)
    return "values: another number of bytes than the header says";
  out->values = malloc(out->value_count * sizeof(float));
  if (!out->values) return "out of memory";
  memcpy(out->values, bytes + START + length, out->value_count * sizeof(float));
  for (size_t i = 0; i < out->value_count; i++)
    if (!isfinite(out->values[i])) return "values: not finite";
  float *at = out->values;
  for (size_t i = 0; i < out->count; at += out->tensors[i++].count) out->tensors[i].values = at;
  return NULL;
}

const char *frame_read(const char *path, adapter *out) {
  size_t size;
  memset(out, 0, sizeof *out);
  uint8_t *bytes = read_file(path, &size);
  const char *refusal = bytes ? parse(bytes, size, out) : "cannot be read";
  free(bytes);
  if (refusal) frame_free(out);
  return refusal;
}

const char *frame_write(const char *path, const adapter *from) {
  size_t body = from->value_count * sizeof(float), head = START + from->header_bytes;
  size_t size = head + body + CHECKSUM;
  char part[4096];
  if (snprintf(part, sizeof part, "%s.part", path) >= (int)sizeof part) return "path is too long";
  for (size_t i = 0; i < from->value_count; i++)
    if (!isfinite(from->values[i])) return "a value is not finite";
  uint8_t *bytes = malloc(size);
  if (!bytes) return "out of memory";
  uint32_t length = (uint32_t)from->header_bytes;
  memcpy(bytes, "ABA1", 4);
  memcpy(bytes + 4, &length, 4);
  memcpy(bytes + START, from->header, length);
  memcpy(bytes + head, from->values, body);
  sha256(bytes, head + body, bytes + head + body);
  FILE *file = fopen(part, "wb");
  int whole = file && fwrite(bytes, 1, size, file) == size && !fflush(file) && !fsync(fileno(file));
  if (file && fclose(file)) whole = 0;
  free(bytes);
  return whole && !rename(part, path) ? NULL : "cannot be written";
}

void frame_free(adapter *of) {
  free(of->tensors);
  free(of->header);
  free(of->values);
  memset(of, 0, sizeof *of);
}
