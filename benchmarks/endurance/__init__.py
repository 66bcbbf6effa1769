"""Does it last: hours of audio, many streams, damaged files."""
