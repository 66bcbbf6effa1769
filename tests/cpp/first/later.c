/* For a header that is newer than the library. */
#include <stdio.h>
#include <u2moe.h>

int main(void) {
  u2moe_stream_options options;
  const u2moe_error error = u2moe_stream_options_init(&options, sizeof options);
  printf("%s: %s\n", u2moe_error_name(error), u2moe_error_message());
  return 0;
}
