// Include the header in a second file: all its definitions must be inline.
#include "u2moe.hpp"

const char* kind_of(const u2moe::Error& error);

const char* kind_of(const u2moe::Error& error) { return u2moe_error_name(error.code()); }
