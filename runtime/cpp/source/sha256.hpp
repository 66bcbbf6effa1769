// SHA-256.
#pragma once

#include "standard.hpp"

namespace u2moe::runtime {

/// Whether this processor has SHA-256 instructions. With them, a digest takes a fifth of the time. Detected only on x86-64.
bool has_sha256_instructions();

/// Bytes as hexadecimal digits.
std::string hex_of(std::string_view bytes);

/// SHA-256 digest, 32 bytes. `with_instructions` affects only the speed.
std::string sha256(std::string_view content, bool with_instructions = has_sha256_instructions());

}  // namespace u2moe::runtime
