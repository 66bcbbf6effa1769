// Messages that are no errors of a call: for whoever asks for them, and onnxruntime's with them.
#pragma once

#include <mutex>
#include <string>

#include "u2moe.h"

namespace u2moe::runtime {

/// Where they go: nowhere until a program sets a callback. After `set` the one before is not called any more, nor running elsewhere.
class Log {
 public:
  static Log& all() {
    static Log* const only = new Log;  // never destroyed: threads may outlive `main`
    return *only;
  }

  void set(u2moe_log_callback callback, void* context) {
    const std::lock_guard<std::recursive_mutex> lock(used_);
    callback_ = callback;
    context_ = context;
  }

  void write(int severity, const char* origin, const std::string& message) {
    const std::lock_guard<std::recursive_mutex> lock(used_);
    if (callback_) callback_(context_, severity, origin, message.c_str());
  }

 private:
  std::recursive_mutex used_;
  u2moe_log_callback callback_ = nullptr;
  void* context_ = nullptr;
};

}  // namespace u2moe::runtime
