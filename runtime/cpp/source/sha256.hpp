// SHA-256.
#pragma once

#include "standard.hpp"

namespace u2moe::runtime {

/// Whether this processor has instructions for SHA-256, which take a fifth of the time. Looked for on x86-64 alone.
bool has_sha256_instructions();

/// Bytes in hexadecimal.
std::string hex_of(std::string_view bytes);

/// The digest, 32 bytes; the same with the processor's instructions and without.
std::string sha256(std::string_view content, bool with_instructions = has_sha256_instructions());

}  // namespace u2moe::runtime
