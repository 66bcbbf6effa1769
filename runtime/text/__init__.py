"""From tokens to text and files: vocabulary, output formats, subtitles, written text, word errors."""
