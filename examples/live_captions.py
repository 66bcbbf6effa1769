"""Live captions: sound as it is heard in, each finished utterance out once, with its times; names are preferred.

python examples/live_captions.py talk.wav [NAME ...]
"""

import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from u2moe.runtime import AudioError, DecodingOptions, EndpointConfig, EndpointRule, Recognizer, Result
from u2moe.runtime.audio.reading import read_blocks

# An utterance ends after 0.8 s of silence, or when it is 15 s long. The left context is bounded: memory is flat.
OPTIONS = DecodingOptions(
    num_left_chunks=4,
    endpoint=EndpointConfig(
        rule2=EndpointRule(must_contain_nonsilence=True, min_trailing_silence=0.8),
        rule3=EndpointRule(min_utterance_length=15.0),
    ),
)


def captions(
    recognizer: Recognizer, blocks: Iterable[np.ndarray], sample_rate: int, names: Sequence[str] = ()
) -> Iterator[Result]:
    """Final results as soon as they are; `stream.get_result().text` is what is being said meanwhile."""
    stream = recognizer.create_stream(OPTIONS, hotwords=names or None)
    damage = None
    try:
        for block in blocks:
            stream.accept_waveform(sample_rate, block)
            recognizer.decode_streams([stream])
            yield from stream.take_segments()
    except AudioError as error:  # the file is damaged here: what was said before counts
        damage = error
    stream.input_finished()
    recognizer.decode_streams([stream])
    yield from stream.take_segments()
    if damage is not None:
        raise damage


def main(file: str, *names: str) -> None:
    recognizer = Recognizer.from_pretrained()
    sample_rate = recognizer.bundle.manifest.features.sample_rate
    for segment in captions(recognizer, read_blocks(file, sample_rate, 0.1), sample_rate, names):
        print(f"{segment.start:8.2f} {segment.end:8.2f}  {segment.text}  ({segment.confidence:.2f})", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
