// English as people write it: digits for numbers, times, dates and money, and capitals; as runtime/text/written.
#pragma once

#include "result.hpp"

namespace u2moe::runtime {

/// The result with written texts and words; tokens, their times and scores stay. Other languages stay as they are spoken.
Result written(Result result);

}  // namespace u2moe::runtime
