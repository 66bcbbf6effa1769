// SHA-256.
#pragma once

#include <string>
#include <string_view>

namespace u2moe::runtime {

/// Whether this processor has instructions for SHA-256, which take a fifth of the time. Looked for on x86-64 alone.
bool has_sha256_instructions();

/// The digest in hexadecimal; the same with the processor's instructions and without.
std::string sha256_hex(std::string_view content, bool with_instructions = has_sha256_instructions());

}  // namespace u2moe::runtime
