"""Sound in JavaScript: a part of the module, and data of the page of `u2moe serve`, which resamples with it."""
