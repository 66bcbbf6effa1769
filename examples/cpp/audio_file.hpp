// Audio input of the program: WAV or raw 16-bit samples, read in parts from a file or standard input.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "u2moe.hpp"

/// Reads WAV files with 8-, 16-, 24- or 32-bit or float samples at any rate. Channels are averaged.
class AudioFile {
 public:
  /// @param file a path, or "-" for standard input.
  /// @param raw_rate sample rate if the file has no header and contains 16-bit little-endian mono samples; 0: the file is WAV.
  /// @throws u2moe::Error if the file cannot be read or has another format.
  AudioFile(const std::string& file, int raw_rate)
      : name_(file), file_(file == "-" ? stdin : std::fopen(file.c_str(), "rb"), close), rate_(raw_rate) {
    if (!file_) fail("cannot be read");
    if (!raw_rate) read_header();
  }

  int sample_rate() const { return rate_; }

  /// Whether the file had fewer samples than its header states. Valid after all samples have been read.
  bool is_cut_off() const { return left_ != kEndless && left_ > 0; }

  /// Return the next samples in [-1, 1]: a tenth of a second at 16 kHz, or none at the end. Drops an incomplete last frame.
  std::vector<float> read() {
    const std::size_t frame = num_channels_ * sample_size_;
    std::vector<unsigned char> bytes(static_cast<std::size_t>(std::min<std::uint64_t>(left_, 1600 * frame)));
    const std::size_t num = std::fread(bytes.data(), 1, bytes.size(), file_.get());
    if (std::ferror(file_.get())) fail("cannot be read");
    if (left_ != kEndless) left_ -= num;
    std::vector<float> samples(num / frame);
    for (std::size_t i = 0; i < samples.size(); ++i) {
      float sum = 0;
      for (std::size_t channel = 0; channel < num_channels_; ++channel) sum += sample(&bytes[i * frame + channel * sample_size_]);
      samples[i] = sum / static_cast<float>(num_channels_);
    }
    return samples;
  }

 private:
  static constexpr std::uint64_t kEndless = ~std::uint64_t{0};

  static void close(std::FILE* file) {
    if (file != stdin) std::fclose(file);
  }

  [[noreturn]] void fail(const std::string& what) const { throw u2moe::Error(U2MOE_AUDIO_ERROR, name_ + ": " + what); }

  void take(unsigned char* bytes, std::size_t num) {
    if (std::fread(bytes, 1, num, file_.get()) != num) fail("is not a WAV file or ends within its header");
  }

  static std::uint32_t number(const unsigned char* bytes, std::size_t size) {
    std::uint32_t value = 0;
    for (std::size_t i = size; i-- > 0;) value = value << 8 | bytes[i];
    return value;
  }

  float sample(const unsigned char* bytes) const {
    const std::uint32_t value = number(bytes, sample_size_) << (32 - 8 * sample_size_);
    if (is_float_) {
      float found;
      std::memcpy(&found, &value, sizeof found);
      return found;
    }
    const std::uint32_t centred = sample_size_ == 1 ? value ^ 0x80000000U : value;  // 8-bit samples are unsigned
    return static_cast<float>(static_cast<std::int32_t>(centred)) / 2147483648.0F;
  }

  void read_header() {
    unsigned char head[12], chunk[8];
    take(head, 12);
    if (std::memcmp(head, "RIFF", 4) != 0 || std::memcmp(head + 8, "WAVE", 4) != 0) fail("is not a WAV file");
    for (;;) {
      take(chunk, 8);
      std::uint64_t size = number(chunk + 4, 4);
      if (std::memcmp(chunk, "data", 4) == 0) {
        if (!rate_) fail("has no format chunk before its data");
        left_ = size == 0xffffffffU || size == 0 ? kEndless : size;  // programs that write to a pipe do not know the size
        return;
      }
      if (std::memcmp(chunk, "fmt ", 4) == 0 && size >= 16) size -= read_format(size);
      for (size += size % 2; size > 0; --size) {
        if (std::fgetc(file_.get()) == EOF) fail("ends within its header");
      }
    }
  }

  // Read the format chunk. Return the number of bytes read.
  std::size_t read_format(std::uint64_t size) {
    unsigned char format[26];
    const std::size_t num = size >= 26 ? 26 : 16;
    take(format, num);
    const bool is_extensible = number(format, 2) == 0xfffe && num == 26;
    const std::uint32_t kind = number(format + (is_extensible ? 24 : 0), 2), bits = number(format + 14, 2);
    num_channels_ = number(format + 2, 2);
    const std::uint32_t rate = number(format + 4, 4);
    rate_ = static_cast<int>(std::min<std::uint32_t>(rate, 1U << 30));
    sample_size_ = bits / 8;
    is_float_ = kind == 3;
    const bool is_known = is_float_ ? bits == 32 : kind == 1 && bits % 8 == 0 && bits >= 8 && bits <= 32;
    if (!is_known || num_channels_ < 1 || rate_ < 1) {
      fail("has " + std::to_string(num_channels_) + " channels of " + std::to_string(bits) + " bits in format " + std::to_string(kind) +
           " at " + std::to_string(rate) + " Hz, expected samples of 8, 16, 24 or 32 bits, or float of 32");
    }
    return num;
  }

  std::string name_;
  std::unique_ptr<std::FILE, void (*)(std::FILE*)> file_;
  int rate_;
  std::size_t num_channels_ = 1, sample_size_ = 2;  // bytes
  bool is_float_ = false;
  std::uint64_t left_ = kEndless;  // in bytes
};
