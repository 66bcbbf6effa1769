"""Recognisers behind one interface, each run as a separate process in the environment that has its package.

    python engines.py NAME [JSON]      reads a JSON request per line, writes a JSON reply per line

Needs only the standard library and the package of the recogniser: other environments run this file by its path.
`process` is the other side. Recordings are WAV files with one channel of 16 bits.
"""
# ruff: noqa: D102 - what the methods of engines do is documented once, in Engine

from __future__ import annotations

import json
import os
import sys
import time
import wave
from array import array
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Protocol, TextIO

INT16_SCALE = 32768.0


class Engine(Protocol):
    """A recogniser for one recording at a time. Its methods are called in the order of their definition."""

    packages: ClassVar[tuple[str, ...]] = ()
    """Names of distributions whose versions are reported."""

    def begin(self, sample_rate: int) -> None:
        """Start a recording."""

    def accept(self, samples: array[int]) -> str:
        """Accept the next samples; returns the text so far, or "" if there is no text before the end."""

    def finish(self) -> str:
        """End the recording; returns the final text."""

    def details(self) -> dict[str, Any]:
        """Further details to report about the recording just recognised."""
        return {}


def floats(samples: array[int]) -> Any:
    """Samples as float32 in [-1, 1], numpy's."""
    import numpy as np  # noqa: PLC0415 - not all environments have it

    return np.frombuffer(samples, np.int16).astype(np.float32) / np.float32(INT16_SCALE)


class U2moe(Engine):
    """Our runtime, streaming (`chunk_size`) or each recording as a whole (None), as `u2moe transcribe` does."""

    packages = ("u2moe", "onnxruntime")

    def __init__(
        self,
        *,
        model: str | None = None,
        num_threads: int = 1,
        kernels: str | None = None,
        chunk_size: int | None = None,
        **options: Any,
    ) -> None:
        from u2moe.runtime import DecodingOptions, EndpointConfig, Recognizer  # noqa: PLC0415

        never = EndpointConfig(rule1=None, rule2=None, rule3=None)
        endpoint = EndpointConfig() if options.pop("endpoint", True) else never
        self.chunk_size = chunk_size
        decoding = DecodingOptions(chunk_size=chunk_size, endpoint=endpoint, **options)
        self.recognizer = Recognizer.from_pretrained(model, num_threads=num_threads, kernels=kernels, options=decoding)
        self.segments: list[Any] = []

    def begin(self, sample_rate: int) -> None:
        self.sample_rate = sample_rate
        self.samples = array("h")
        self.segments = []
        if self.chunk_size is not None:
            self.stream = self.recognizer.create_stream()

    def accept(self, samples: array[int]) -> str:
        if self.chunk_size is None:
            self.samples.extend(samples)
            return ""
        self.stream.accept_waveform(self.sample_rate, floats(samples))
        self.recognizer.decode_streams([self.stream])
        self.segments += self.stream.take_segments()
        return self._text(self.stream.get_result().text)

    def finish(self) -> str:
        if self.chunk_size is None:
            return self.recognizer.transcribe(floats(self.samples), self.sample_rate).text
        self.stream.input_finished()
        self.recognizer.decode_streams([self.stream])
        self.segments += self.stream.take_segments()
        return self._text("")

    def _text(self, following: str) -> str:
        return " ".join(text for text in (*(segment.text for segment in self.segments), following) if text)


class SherpaOnline(Engine):
    """sherpa-onnx's streaming client for WeNet's CTC models, greedy search."""

    packages = ("sherpa-onnx",)

    def __init__(self, *, tail_s: float = 0.0, **options: Any) -> None:
        import sherpa_onnx  # noqa: PLC0415

        self.tail_s = tail_s
        self.recognizer = sherpa_onnx.OnlineRecognizer.from_wenet_ctc(**options)

    def begin(self, sample_rate: int) -> None:
        self.sample_rate = sample_rate
        self.stream = self.recognizer.create_stream()

    def accept(self, samples: array[int]) -> str:
        self.stream.accept_waveform(self.sample_rate, floats(samples))
        return self._decode()

    def finish(self) -> str:
        tail = array("h", bytes(2 * int(self.tail_s * self.sample_rate)))
        if tail:
            self.stream.accept_waveform(self.sample_rate, floats(tail))
        self.stream.input_finished()
        return self._decode()

    def _decode(self) -> str:
        while self.recognizer.is_ready(self.stream):
            self.recognizer.decode_stream(self.stream)
        text: str = self.recognizer.get_result(self.stream)
        return text

    def details(self) -> dict[str, Any]:
        found = json.loads(self.recognizer.get_result_as_json_string(self.stream))
        return {"tokens": found["tokens"], "timestamps": found["timestamps"]}


class Whole(Engine):
    """An engine that collects the recording until its end."""

    def begin(self, sample_rate: int) -> None:
        self.sample_rate = sample_rate
        self.samples = array("h")

    def accept(self, samples: array[int]) -> str:
        self.samples.extend(samples)
        return ""


class SherpaOffline(Whole):
    """sherpa-onnx's client for whole recordings and WeNet's CTC models, greedy search."""

    packages = ("sherpa-onnx",)

    def __init__(self, **options: Any) -> None:
        import sherpa_onnx  # noqa: PLC0415

        self.recognizer = sherpa_onnx.OfflineRecognizer.from_wenet_ctc(**options)

    def finish(self) -> str:
        self.stream = self.recognizer.create_stream()
        self.stream.accept_waveform(self.sample_rate, floats(self.samples))
        self.recognizer.decode_stream(self.stream)
        text: str = self.stream.result.text
        return text

    def details(self) -> dict[str, Any]:
        result = self.stream.result
        return {"tokens": list(result.tokens), "timestamps": list(result.timestamps)}


class FasterWhisper(Whole):
    """Whisper in CTranslate2, int8, English, each recording as a whole."""

    packages = ("faster-whisper", "ctranslate2")

    def __init__(self, *, package: str, folder: str, num_threads: int = 1, beam_size: int = 5) -> None:
        from importlib.util import find_spec  # noqa: PLC0415

        from faster_whisper import WhisperModel  # noqa: PLC0415

        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{package} is not installed")
        weights = Path(spec.origin).parent / folder
        self.model = WhisperModel(str(weights), device="cpu", compute_type="int8", cpu_threads=num_threads)
        self.beam_size = beam_size

    def finish(self) -> str:
        segments, _ = self.model.transcribe(floats(self.samples), language="en", beam_size=self.beam_size)
        return " ".join(segment.text.strip() for segment in segments)


class Moonshine(Engine):
    """Moonshine tiny with the weights in its package, through its streaming interface."""

    packages = ("moonshine-voice",)

    def __init__(self, *, folder: str = "tiny-en") -> None:
        from moonshine_voice import ModelArch, Transcriber, get_assets_path  # noqa: PLC0415

        self.transcriber = Transcriber(str(Path(get_assets_path()) / folder), ModelArch.TINY)

    def begin(self, sample_rate: int) -> None:
        self.sample_rate = sample_rate
        self.stream = self.transcriber.create_stream()
        self.lines: dict[int, str] = {}
        self.stream.add_listener(self._listen)
        self.stream.start()

    def _listen(self, event: Any) -> None:
        if hasattr(event, "error"):
            raise event.error
        self.lines[event.line.line_id] = event.line.text.strip()

    def accept(self, samples: array[int]) -> str:
        self.stream.add_audio(floats(samples).tolist(), self.sample_rate)
        return self._text()

    def finish(self) -> str:
        self.stream.stop()
        text = self._text()
        self.stream.close()
        return text

    def _text(self) -> str:
        return " ".join(text for text in self.lines.values() if text)


class PocketSphinx(Engine):
    """PocketSphinx with the US English models in its package, streaming."""

    packages = ("pocketsphinx",)

    def __init__(self) -> None:
        from pocketsphinx import Decoder  # noqa: PLC0415

        self.decoder = Decoder(samprate=16000, loglevel="FATAL")

    def begin(self, sample_rate: int) -> None:
        if sample_rate != 16000:
            raise ValueError(f"sample_rate must be 16000, got {sample_rate}")
        self.decoder.start_utt()

    def accept(self, samples: array[int]) -> str:
        self.decoder.process_raw(samples.tobytes(), no_search=False, full_utt=False)
        return self._text()

    def finish(self) -> str:
        self.decoder.end_utt()
        return self._text()

    def _text(self) -> str:
        best = self.decoder.hyp()
        return best.hypstr if best else ""


ENGINES: dict[str, Any] = {
    "u2moe": U2moe,
    "sherpa-online": SherpaOnline,
    "sherpa-offline": SherpaOffline,
    "faster-whisper": FasterWhisper,
    "moonshine": Moonshine,
    "pocketsphinx": PocketSphinx,
}


def recognise(engine: Engine, wav: str, portion_s: float) -> dict[str, Any]:
    """Recognise a WAV file in portions as from a live source, but without waiting for them.

    Time is simulated: a portion arrives when its last sample has been spoken; work on it starts then, or when the work
    before it is finished, and takes the measured time. A second of audio thus costs less than a second, and the delays
    are those that a user would see.

    Returns:
        audio_s, text, compute_s; first_partial_s: from the start of the
        recording to the first text; final_s: from the end of the recording to the final text.
    """
    with wave.open(wav, "rb") as file:
        if (file.getnchannels(), file.getsampwidth()) != (1, 2):
            raise ValueError(f"{wav}: expected one channel of 16 bits")
        sample_rate = file.getframerate()
        samples = array("h", file.readframes(file.getnframes()))
    size = max(int(portion_s * sample_rate), 1)
    audio_s = len(samples) / sample_rate
    clock = compute_s = 0.0
    first_partial_s = None
    engine.begin(sample_rate)
    for start in range(0, len(samples), size):
        portion = samples[start : start + size]
        began = time.perf_counter()
        text = engine.accept(portion)
        took = time.perf_counter() - began
        clock = max(clock, (start + len(portion)) / sample_rate) + took
        compute_s += took
        if text.strip() and first_partial_s is None:
            first_partial_s = clock
    began = time.perf_counter()
    text = engine.finish()
    took = time.perf_counter() - began
    clock = max(clock, audio_s) + took
    return {
        "audio_s": audio_s,
        "text": text,
        "compute_s": compute_s + took,
        "first_partial_s": clock if first_partial_s is None else first_partial_s,
        "final_s": clock - audio_s,
        **engine.details(),
    }


def peak_mb() -> float:
    """Largest resident memory so far, in megabytes; 0 where the system does not tell it for this process alone."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:")), 0.0)


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(argv: list[str]) -> None:
    """Start an engine and answer requests until they end."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keep output of libraries out of the replies
    began = time.perf_counter()
    engine = ENGINES[argv[0]](**json.loads(argv[1] if len(argv) > 1 else "{}"))
    load_s = time.perf_counter() - began
    _reply(replies, {"load_s": load_s, "versions": _versions(engine.packages)})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            found = recognise(engine, request["wav"], request["portion_s"])
        except Exception as error:  # noqa: BLE001 - whatever it is, the other side wants to know and go on
            found = {"error": f"{type(error).__name__}: {error}"}
        _reply(replies, {**found, "peak_mb": peak_mb()})


def _reply(replies: TextIO, content: dict[str, Any]) -> None:
    replies.write(json.dumps(content) + "\n")
    replies.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
