/* The adapter of a bundle: adapter.bin, one frame of docs/wire-format.md. */
#ifndef FRAME_H
#define FRAME_H

#include <stddef.h>
#include <stdint.h>

enum { MAX_NAME = 256, MAX_DIMENSIONS = 8 };

typedef struct {
  char name[MAX_NAME + 1];
  int64_t shape[MAX_DIMENSIONS];
  size_t dimensions;
  size_t count; /* values: the product of the shape */
  float *values; /* in C order; they lie in the frame's bytes or behind them, ready to be changed */
} tensor;

typedef struct {
  size_t count;
  tensor *tensors; /* in the order of the frame: names ascend */
  char *header;    /* JSON, exactly as it was read */
  size_t header_bytes;
  float *values; /* of all tensors, one after the other */
  size_t value_count;
} adapter;

/* Read the whole adapter in a file. Returns NULL, or why the file is refused; then free nothing.
   What lies in adapter.bin belongs to the bundle: verify the manifest's signature and the file's
   SHA-256 first. The frame's own checksum finds damage and proves nothing about the sender. */
const char *frame_read(const char *path, adapter *out);

/* Write an adapter of the same spec with other values, whole or not at all. NULL, or what failed. */
const char *frame_write(const char *path, const adapter *from);

void frame_free(adapter *of);

void sha256(const uint8_t *bytes, size_t size, uint8_t digest[32]);

#endif
