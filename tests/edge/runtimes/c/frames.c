/* frames FILE…: read every frame; print its tensors and write FILE.copy, or print why not. */
#include <stdio.h>

#include "frame.h"

int main(int count, char **paths) {
  for (int i = 1; i < count; i++) {
    char copy[4096];
    adapter read;
    const char *refusal = frame_read(paths[i], &read);
    if (refusal) {
      printf("refused %s\n", refusal);
      continue;
    }
    printf("read");
    for (size_t t = 0; t < read.count; t++) {
      const tensor *one = &read.tensors[t];
      printf(" %s", one->name);
      for (size_t d = 0; d < one->dimensions; d++) printf(",%lld", (long long)one->shape[d]);
      printf("=%.9g", (double)one->values[one->count - 1]);
    }
    printf("\n");
    snprintf(copy, sizeof copy, "%s.copy", paths[i]);
    refusal = frame_write(copy, &read);
    if (refusal) printf("%s\n", refusal);
    frame_free(&read);
  }
  return 0;
}
