/* Recognise 16-bit mono samples from standard input:  transcribe BUNDLE RATE < samples
 * cc -std=c99 transcribe.c $(pkg-config --cflags --libs u2moe) -o transcribe */
#include <stdio.h>
#include <stdlib.h>

#include "u2moe.h"

static void check(u2moe_error error) {
  if (error == U2MOE_OK) return;
  fprintf(stderr, "%s: %s\n", u2moe_error_name(error), u2moe_error_message());
  exit(1);
}

static void print_segments(u2moe_stream stream) {
  u2moe_result result = NULL;
  u2moe_result_view view;
  size_t i;
  view.size = sizeof view;
  for (;;) {
    check(u2moe_stream_take_segment(stream, &result));
    if (!result) return;
    check(u2moe_result_get(result, &view));
    printf("%.2f %.2f %s\n", view.start, view.end, view.text);
    for (i = 0; i < view.num_words; ++i) {
      const u2moe_word *word = &view.words[i];
      printf("  %.2f %.2f %.2f %s\n", word->start, word->end, word->confidence, word->text);
    }
    check(u2moe_result_free(result));
  }
}

int main(int argc, char **argv) {
  u2moe_recognizer recognizer = NULL;
  u2moe_stream stream = NULL;
  int16_t samples[1600];
  size_t num;
  if (argc != 3) {
    fprintf(stderr, "usage: %s BUNDLE RATE < samples\n", argv[0]);
    return 2;
  }
  check(u2moe_recognizer_open(argv[1], NULL, &recognizer));
  check(u2moe_stream_create(recognizer, NULL, &stream));
  while ((num = fread(samples, sizeof *samples, 1600, stdin)) > 0) {
    check(u2moe_stream_accept_waveform_int16(stream, atoi(argv[2]), samples, num));
    print_segments(stream);
  }
  check(u2moe_stream_input_finished(stream));
  print_segments(stream);
  check(u2moe_stream_free(stream));
  check(u2moe_recognizer_free(recognizer));
  return 0;
}
