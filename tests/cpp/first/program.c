/* For u2moe.h of the first version: memory after the structs that it knows must not change. */
#include <stdio.h>
#include <string.h>
#include <u2moe.h>

static int16_t samples[16000 * 4];

int main(int argc, char **argv) {
  struct { u2moe_stream_options options; double behind; } chosen;
  struct { u2moe_result_view view; double behind; } found;
  struct { u2moe_recognizer_options options; double behind; } settings;
  u2moe_recognizer recognizer;
  u2moe_stream stream;
  u2moe_result result;
  u2moe_error error = U2MOE_OK;
  FILE *file = fopen(argv[argc - 1], "rb");
  const size_t num = file ? fread(samples, sizeof *samples, sizeof samples / sizeof *samples, file) : 0;
  chosen.behind = found.behind = settings.behind = 7;
  error |= u2moe_recognizer_options_init(&settings.options, sizeof settings.options);
  error |= u2moe_recognizer_open(argv[1], &settings.options, &recognizer);
  error |= u2moe_stream_options_init(&chosen.options, sizeof chosen.options);
  chosen.options.num_left_chunks = 4;
  error |= u2moe_stream_create(recognizer, &chosen.options, &stream);
  error |= u2moe_stream_accept_waveform_int16(stream, 16000, samples, num);
  error |= u2moe_stream_input_finished(stream);
  error |= u2moe_stream_get_result(stream, &result);
  memset(&found.view, 0, sizeof found.view);
  found.view.size = sizeof found.view;
  error |= u2moe_result_get(result, &found.view);
  printf("%s %s\n", u2moe_error_name(error), found.view.text);
  printf("%d %d %d\n", chosen.behind == 7, found.behind == 7, settings.behind == 7);
  error |= u2moe_result_free(result);
  error |= u2moe_stream_free(stream);
  error |= u2moe_recognizer_free(recognizer);
  return error != U2MOE_OK || found.view.num_tokens == 0;
}
