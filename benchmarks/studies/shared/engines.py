"""A program that runs one of several recognisers behind a common interface.

    python engines.py NAME OPTIONS BUFFER_S FILE.wav...      prints a line of JSON for each file

The module `programs` runs this file by its path, in the environment of the recogniser. The file therefore needs only
the standard library and the recogniser's package. Recordings are WAV files with one channel and 16-bit samples.
Options are JSON.
"""

import importlib.resources
import json
import os
import platform
import sys
import time
import wave
from array import array
from collections.abc import Callable, Generator, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

Samples = Any  # samples of a recording or a buffer, as an array of int16 from the standard library
Recognise = Callable[[int, Iterable[Samples]], Generator[str, None, dict[str, Any]]]
"""A recogniser, called with the sample rate and the buffers of a recording. After each buffer, it yields the text so
far, or "" if it has no text before the end. It returns the final `text` and other results."""


def floats(samples: Samples) -> Any:
    """Return samples as a numpy array of float32 in [-1, 1]."""
    import numpy as np  # noqa: PLC0415 - missing in some environments

    return np.frombuffer(samples, np.int16).astype(np.float32) / np.float32(32768)


def whole(recognise: Callable[[Any, int], dict[str, Any]]) -> Recognise:
    """Return a recogniser that collects all buffers, then calls `recognise` with float32 samples and their rate."""

    def run(sample_rate: int, buffers: Iterable[Samples]) -> Generator[str, None, dict[str, Any]]:
        samples = array("h")
        for buffer in buffers:
            samples.extend(buffer)
            yield ""
        return recognise(floats(samples), sample_rate)

    return run


def u2moe(*, model: str | None = None, kernels: str | None = None, endpoint: bool = True, **options: Any) -> Recognise:
    """Load u2moe. It streams if `chunk_size` is given; otherwise it recognises whole recordings."""
    from u2moe.runtime import DecodingOptions, EndpointConfig, Recognizer, Result  # noqa: PLC0415

    rules = EndpointConfig() if endpoint else EndpointConfig(rule1=None, rule2=None, rule3=None)
    recognizer = Recognizer.from_pretrained(model, kernels=kernels, options=DecodingOptions(endpoint=rules, **options))

    def joined(segments: list[Result], following: str = "") -> str:
        return " ".join(text for text in (*(segment.text for segment in segments), following) if text)

    def stream(sample_rate: int, buffers: Iterable[Samples]) -> Generator[str, None, dict[str, Any]]:
        source, segments = recognizer.create_stream(), list[Result]()
        for buffer in buffers:
            source.accept_waveform(sample_rate, floats(buffer))
            recognizer.decode_streams([source])
            segments += source.take_segments()
            yield joined(segments, source.get_result().text)
        source.input_finished()
        recognizer.decode_streams([source])
        segments += source.take_segments()
        return {"text": joined(segments), "segments": segments}

    if "chunk_size" in options:
        return stream
    return whole(lambda samples, rate: {"text": recognizer.transcribe(samples, rate).text})


def sherpa_online(**options: Any) -> Recognise:
    """Load a WeNet CTC model into sherpa-onnx's streaming recogniser, which uses greedy search."""
    import sherpa_onnx  # noqa: PLC0415

    recognizer = sherpa_onnx.OnlineRecognizer.from_wenet_ctc(**options)

    def run(sample_rate: int, buffers: Iterable[Samples]) -> Generator[str, None, dict[str, Any]]:
        stream = recognizer.create_stream()

        def decode() -> str:
            while recognizer.is_ready(stream):
                recognizer.decode_stream(stream)
            return str(recognizer.get_result(stream))

        for buffer in buffers:
            stream.accept_waveform(sample_rate, floats(buffer))
            yield decode()
        stream.input_finished()
        text = decode()
        found = json.loads(recognizer.get_result_as_json_string(stream))
        return {"text": text, "tokens": found["tokens"], "timestamps": found["timestamps"]}

    return run


def sherpa_offline(**options: Any) -> Recognise:
    """Load a WeNet CTC model in sherpa-onnx's recogniser for whole recordings. It uses greedy search."""
    import sherpa_onnx  # noqa: PLC0415

    recognizer = sherpa_onnx.OfflineRecognizer.from_wenet_ctc(**options)

    def recognise(samples: Any, sample_rate: int) -> dict[str, Any]:
        stream = recognizer.create_stream()
        stream.accept_waveform(sample_rate, samples)
        recognizer.decode_stream(stream)
        found = stream.result
        return {"text": found.text, "tokens": list(found.tokens), "timestamps": list(found.timestamps)}

    return whole(recognise)


def faster_whisper(*, package: str, folder: str) -> Recognise:
    """Load int8 Whisper in CTranslate2, for whole English recordings. `package` has the weights in `folder`."""
    from faster_whisper import WhisperModel  # noqa: PLC0415

    weights = str(importlib.resources.files(package) / folder)
    model = WhisperModel(weights, device="cpu", compute_type="int8", cpu_threads=1)

    def recognise(samples: Any, _: int) -> dict[str, Any]:
        segments, _ = model.transcribe(samples, language="en", beam_size=5)
        return {"text": " ".join(segment.text.strip() for segment in segments)}

    return whole(recognise)


def moonshine() -> Recognise:
    """Load Moonshine tiny for streaming, with the weights in its package."""
    from moonshine_voice import ModelArch, Transcriber, get_assets_path  # noqa: PLC0415

    transcriber = Transcriber(str(Path(get_assets_path()) / "tiny-en"), ModelArch.TINY)

    def run(sample_rate: int, buffers: Iterable[Samples]) -> Generator[str, None, dict[str, Any]]:
        lines: dict[int, str] = {}

        def listen(event: Any) -> None:
            if hasattr(event, "error"):
                raise event.error
            lines[event.line.line_id] = event.line.text.strip()

        def text() -> str:
            return " ".join(line for line in lines.values() if line)

        stream = transcriber.create_stream()
        stream.add_listener(listen)
        stream.start()
        for buffer in buffers:
            stream.add_audio(floats(buffer).tolist(), sample_rate)
            yield text()
        stream.stop()
        found = {"text": text()}
        stream.close()
        return found

    return run


def pocketsphinx() -> Recognise:
    """Load PocketSphinx for streaming, with the US English models in its package."""
    from pocketsphinx import Decoder  # noqa: PLC0415

    decoder = Decoder(samprate=16000, loglevel="FATAL")

    def text() -> str:
        best = decoder.hyp()
        return best.hypstr if best else ""

    def run(sample_rate: int, buffers: Iterable[Samples]) -> Generator[str, None, dict[str, Any]]:
        if sample_rate != 16000:
            raise ValueError(f"sample_rate must be 16000, got {sample_rate}")
        decoder.start_utt()
        for buffer in buffers:
            decoder.process_raw(buffer.tobytes(), no_search=False, full_utt=False)
            yield text()
        decoder.end_utt()
        return {"text": text()}

    return run


ENGINES: dict[str, tuple[Callable[..., Recognise], tuple[str, ...]]] = {
    "u2moe": (u2moe, ("u2moe", "onnxruntime")),
    "sherpa-online": (sherpa_online, ("sherpa-onnx",)),
    "sherpa-offline": (sherpa_offline, ("sherpa-onnx",)),
    "faster-whisper": (faster_whisper, ("faster-whisper", "ctranslate2")),
    "moonshine": (moonshine, ("moonshine-voice",)),
    "pocketsphinx": (pocketsphinx, ("pocketsphinx",)),
}
"""By name: a function that loads a recogniser with options, and the distributions whose versions are reported."""


def recognised(recognise: Recognise, wav: str, buffer_s: float) -> dict[str, Any]:
    """Recognise a WAV file in buffers, as from a live source, but in simulated time.

    A buffer arrives when its last sample has been spoken. Its processing starts then, or once the previous buffer is
    finished, and takes the measured time. Delays are therefore as a live user would see them. To the results, add
    `audio_s`, the duration; `ms`, the processing time; `first_partial_s`, the seconds from the start of the recording
    to the first text; and `final_s`, those from its end to the final text.
    """
    with wave.open(wav, "rb") as file:
        if (file.getnchannels(), file.getsampwidth()) != (1, 2):
            raise ValueError(f"{wav}: must have one channel and 16-bit samples")
        sample_rate = file.getframerate()
        samples = array("h", file.readframes(file.getnframes()))
    size, audio_s = int(buffer_s * sample_rate), len(samples) / sample_rate
    starts = range(0, len(samples), size)
    steps = recognise(sample_rate, (samples[start : start + size] for start in starts))
    found: dict[str, Any] = {}
    clock = compute_s = 0.0
    first_partial_s = None
    for arrives_s in (*(min((start + size) / sample_rate, audio_s) for start in starts), audio_s):
        began = time.perf_counter()
        try:
            text = next(steps)
        except StopIteration as end:
            found = end.value
            text = found["text"]
        took = time.perf_counter() - began
        clock = max(clock, arrives_s) + took
        compute_s += took
        if text.strip() and first_partial_s is None:
            first_partial_s = clock
    waits = {"first_partial_s": clock if first_partial_s is None else first_partial_s, "final_s": clock - audio_s}
    return {"audio_s": audio_s, "ms": 1000 * compute_s, **waits, **found}


def main(name: str, options: str, buffer_s: str, *files: str) -> None:
    """Load a recogniser, recognise the files, and print a line of JSON for each file."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries must not mix with the replies
    load, packages = ENGINES[name]
    began = time.perf_counter()
    recognise = load(**json.loads(options))
    versions = {"python": platform.python_version(), **{package: version(package) for package in packages}}
    about = {"load_ms": 1000 * (time.perf_counter() - began), "versions": versions}
    for file in files:
        found = recognised(recognise, file, float(buffer_s))
        replies.write(json.dumps({"file": file, **about, **found}, default=vars) + "\n")
        replies.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
