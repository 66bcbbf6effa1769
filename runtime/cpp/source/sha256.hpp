// SHA-256 (FIPS 180-4).
#pragma once

#include <string>
#include <string_view>

namespace u2moe::runtime {

/// The digest of a content, in hexadecimal digits.
std::string sha256_hex(std::string_view content);

}  // namespace u2moe::runtime
