/* Captions for raw 16-bit mono samples from standard input, read as from a microphone: cc -std=c11 captions.c -lu2moe
 * -lpthread
 *
 *     captions BUNDLE [RATE [SECONDS]] < samples    a thread feeds 10 ms every 10 ms, like an audio callback
 *
 * Prints partial results to stderr and final results to stdout. After SECONDS, cancels recognition. */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <u2moe.h>

typedef struct {
  u2moe_transcriber transcriber;
  int32_t rate;
  double limit;
  unsigned long num_lost;
} source;

static void fail(const char *what) {
  fprintf(stderr, "captions: %s: %s\n", what, u2moe_error_message());
  exit(1);
}

static void print(FILE *file, u2moe_result result) {
  u2moe_result_view view;
  view.size = sizeof view;
  if (u2moe_result_get(result, &view) == U2MOE_OK) fprintf(file, "%.2f %s\n", view.start, view.text);
}

/* The library calls this in its own thread. */
static void on_partial(void *context, u2moe_result result) {
  (void)context;
  print(stderr, result);
}

static void on_final(void *context, u2moe_result result) {
  (void)context;
  print(stdout, result);
}

static void on_error(void *context, u2moe_error error, const char *message) {
  (void)context;
  fprintf(stderr, "captions: %s: %s\n", u2moe_error_name(error), message);
}

/* Takes the place of an audio system's thread. Such a thread must never wait, and feeding does not wait. */
static void *play(void *argument) {
  source *self = argument;
  const size_t num = (size_t)self->rate / 100;
  int16_t *samples = malloc(num * sizeof *samples);
  struct timespec next;
  double played = 0;
  size_t found;
  clock_gettime(CLOCK_MONOTONIC, &next);
  while (samples && played < self->limit && (found = fread(samples, sizeof *samples, num, stdin)) > 0) {
    const u2moe_error error = u2moe_transcriber_feed_int16(self->transcriber, self->rate, samples, found);
    if (error == U2MOE_QUEUE_FULL) ++self->num_lost; /* recognition is too slow; times do not count lost samples */
    else if (error != U2MOE_OK) break;
    played += (double)found / self->rate;
    next.tv_nsec += 10 * 1000000;
    if (next.tv_nsec >= 1000000000) next.tv_sec += 1, next.tv_nsec -= 1000000000;
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL);
  }
  free(samples);
  return NULL;
}

int main(int argc, char **argv) {
  u2moe_recognizer recognizer;
  u2moe_transcriber_callbacks callbacks;
  u2moe_stream_options options;
  source self = {NULL, argc > 2 ? atoi(argv[2]) : 16000, argc > 3 ? atof(argv[3]) : 1e9, 0};
  pthread_t thread;
  u2moe_error error;
  if (argc < 2) return fprintf(stderr, "usage: captions BUNDLE [RATE [SECONDS]] < samples\n"), 2;
  if (u2moe_recognizer_open(argv[1], NULL, &recognizer)) fail(argv[1]);
  u2moe_transcriber_callbacks_init(&callbacks, sizeof callbacks);
  callbacks.on_partial = on_partial;
  callbacks.on_final = on_final;
  callbacks.on_error = on_error;
  u2moe_stream_options_init(&options, sizeof options);
  options.num_left_chunks = 4;
  if (u2moe_transcriber_create(recognizer, &options, &callbacks, &self.transcriber)) fail("transcriber");
  if (pthread_create(&thread, NULL, play, &self)) return 1;
  pthread_join(thread, NULL);
  if (argc > 3) u2moe_transcriber_cancel(self.transcriber);
  error = u2moe_transcriber_wait(self.transcriber);
  fprintf(stderr, "%s, %lu buffers lost\n", u2moe_error_name(error), self.num_lost);
  u2moe_transcriber_free(self.transcriber);
  u2moe_recognizer_free(recognizer);
  return error == U2MOE_OK || error == U2MOE_CANCELLED ? 0 : 1;
}
