"""Live captions: read sound in buffers, as live audio arrives, and print each final result with its times.

The names on the command line are hotwords.

python examples/live_captions.py talk.wav [NAME ...]
"""

import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import soundfile

from u2moe import DecodingOptions, EndpointConfig, EndpointRule, Recognizer, Result

# An utterance ends after 0.8 s of silence, or when it is 15 s long. Limited left context keeps memory constant.
OPTIONS = DecodingOptions(
    num_left_chunks=4,
    endpoint=EndpointConfig(
        rule2=EndpointRule(must_contain_nonsilence=True, min_trailing_silence=0.8),
        rule3=EndpointRule(min_utterance_length=15.0),
    ),
)


def captions(
    recognizer: Recognizer, buffers: Iterable[np.ndarray], sample_rate: int, names: Sequence[str] = ()
) -> Iterator[Result]:
    """Yield final results as soon as they are found. For partial text, see `stream.get_result().text`."""
    stream = recognizer.create_stream(OPTIONS, hotwords=names or None)
    for buffer in buffers:
        stream.accept_waveform(sample_rate, buffer)
        recognizer.decode_streams([stream])
        yield from stream.take_segments()
    stream.input_finished()
    recognizer.decode_streams([stream])
    yield from stream.take_segments()


def main(file: str, *names: str) -> None:
    recognizer = Recognizer.from_pretrained()
    with soundfile.SoundFile(file) as sound:  # in place of a microphone: 0.1 s at a time, at any rate
        buffers = (each.mean(axis=1) for each in sound.blocks(sound.samplerate // 10, dtype="float32", always_2d=True))
        for segment in captions(recognizer, buffers, sound.samplerate, names):
            print(f"{segment.start:8.2f} {segment.end:8.2f}  {segment.text}  ({segment.confidence:.2f})", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
