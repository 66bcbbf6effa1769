#include <stdio.h>
#include <u2moe.h>

int main(void) {
  u2moe_recognizer recognizer = NULL;
  const u2moe_error error = u2moe_recognizer_open("/none", NULL, &recognizer);
  printf("%s: %s\n", u2moe_error_name(error), u2moe_error_message());
  return u2moe_api_version() == U2MOE_API_VERSION ? 0 : 1;
}
