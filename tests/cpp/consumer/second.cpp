// The headers a second time in one program: whatever they define there is inline.
#include "u2moe/recognizer.hpp"

const char* kind_of(const u2moe::Error& error);

const char* kind_of(const u2moe::Error& error) { return dynamic_cast<const u2moe::BundleError*>(&error) ? "BundleError" : "another"; }
