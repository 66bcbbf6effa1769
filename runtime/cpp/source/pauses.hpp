// Quiet stretches of audio, and words that end there.
#pragma once

#include <cstddef>
#include <optional>
#include <utility>
#include <vector>

#include "manifest.hpp"

namespace u2moe::runtime {

using Seconds = std::pair<double, double>;  ///< start and end

/// Loudness of each frame of features [frames, feature_size], on the scale of log energy; of MFCC, the mean of log energies.
std::vector<float> loudness(const std::vector<float>& features, const Manifest& m);

/// Quiet stretches of an utterance with these levels, in seconds from its first frame.
std::vector<Seconds> find_pauses(const std::vector<float>& levels, double frame_s);

/// The first pause after some audio that lasts at least `min_pause_s` and has its middle after `after_s`.
std::optional<Seconds> first_pause(const std::vector<float>& levels, double frame_s, double min_pause_s, double after_s);

/// Words end where the longest pause between two peaks begins, and the next word begins where it ends.
void end_at_pauses(std::vector<Seconds>& words, const std::vector<Seconds>& peaks, const std::vector<Seconds>& pauses);

}  // namespace u2moe::runtime
