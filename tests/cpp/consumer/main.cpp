#include <cstdio>

#include "u2moe.hpp"

const char* kind_of(const u2moe::Error& error);

int main() {
  try {
    u2moe::Recognizer("/none");
  } catch (const u2moe::Error& error) {
    std::printf("%s: %s\n", kind_of(error), error.what());
  }
}
