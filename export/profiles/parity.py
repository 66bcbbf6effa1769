"""Compares the graph of a profile with the bundle's own graphs, which u2moe's runtime runs."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import soundfile

from u2moe.export.comparison import ParityReport, compared, parity_samples
from u2moe.export.profiles.graphs import LONGEST_CLIP_S, Profile, detokenizer_graph, samples_per_frame, window_samples
from u2moe.runtime.audio.padding import Padding
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.decoding.ctc import ctc_greedy_search
from u2moe.runtime.errors import ParityError
from u2moe.runtime.model.encoder import required_cache_size
from u2moe.runtime.model.features import fbank
from u2moe.runtime.model.native import ONNXRUNTIME_ERRORS
from u2moe.runtime.model.settings import SessionSettings

Array = npt.NDArray[Any]
Run = Callable[[Mapping[str, Array]], dict[str, Array]]
"""Runs a graph: takes its inputs by name, and returns its outputs by name."""

CHUNKS = ((16, -1), (16, 4), (5, 2))
"""(chunk size, left chunks) of the compared streams."""
NOT_PORTABLE = ["NchwcTransformer"]
"""Optimizers disabled for graphs in ORT format, because their output runs only on some processors."""


def session_of(
    file: Path | bytes, *, extensions: bool = False, portable: bool = False, target: Path | None = None
) -> Run:
    """Return a function that runs a graph in ONNX or ORT format.

    Args:
        file: the graph, or its content.
        extensions: register the operators of onnxruntime-extensions; ModuleNotFoundError if it is not installed.
        portable: use only the optimisations that ORT format allows. Others may add the products of a convolution in
            another order, which changes the rounding. In a quantized network, this can change a value by a whole step.
        target: file to write the optimized graph to, in ORT format.
    """
    options = SessionSettings(kernels="onnxruntime").session_options()  # as in programs in other languages
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # otherwise 8 bits for activations
    if extensions:
        import onnxruntime_extensions  # noqa: PLC0415 - only the profile clip needs it

        options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    if target is not None:
        options.optimized_model_filepath = str(target)
        options.add_session_config_entry("session.save_model_format", "ORT")
    disabled, providers = NOT_PORTABLE if portable else None, ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(file, options, providers=providers, disabled_optimizers=disabled)
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


class ProfileParity:
    """Compares the graph of one profile with a bundle. Error messages name `subject`."""

    def __init__(self, bundle: Bundle, run: Run, *, subject: Path) -> None:
        self.bundle, self.config, self.run, self.subject = bundle, bundle.manifest.model, run, subject
        self.model = bundle.load(SessionSettings(kernels="onnxruntime"))
        self.samples = parity_samples(bundle.manifest, 6.0)
        self.report = ParityReport(sides="the bundle and the graph made from it")

    def compare(self, profile: Profile, progress: Callable[[str], None] = lambda _: None) -> ParityReport:
        """Run all comparisons of a profile. Raises ParityError, which names the case, tensor, difference and limit."""
        if profile == "streaming":
            chunks = [(self.config.whole_chunk(size), left) for size, left in CHUNKS]
            names = [f"stream, chunk {size}, left {left if left >= 0 else 'all'}" for size, left in chunks]
            cases = [(size, left, 0) for size, left in chunks]
            cases.append((self.config.whole_chunk(16), 4, self.config.max_position - 20))
            for case, stream in zip((*names, "stream, where positions are moved back"), cases, strict=True):
                progress(case)
                self._stream(case, *stream)
        for num_samples in (0, 1, window_samples(self.bundle.manifest, self.config.window), len(self.samples)):
            if profile == "offline":
                progress(f"recording of {num_samples} samples")
                self._recording(num_samples)
        if profile == "clip":
            for kind in ("WAV", "FLAC"):
                progress(f"{kind} file")
                self._clip(kind)
            progress("detokenizer")
            self._detokenizer()
            progress("files that are refused")
            self._refusals()
        return self.report

    def features(self, samples: Array) -> Array:
        """Return features [frames, mel] of samples."""
        return fbank(samples, self.bundle.manifest.features)

    def _stream(self, case: str, chunk_size: int, left: int, start: int) -> None:
        """Compare the graph with the bundle on a stream that begins at position `start`. Each has its own caches."""
        encoder, required = self.model.encoder, required_cache_size(chunk_size, left)
        caches = encoder.start()
        caches.offset[:] = start
        mine = {"offset": caches.offset, **{name: np.asarray(tensor) for name, tensor in caches.tensors.items()}}
        step = samples_per_frame(self.bundle.manifest)
        shortest = window_samples(self.bundle.manifest, self.config.num_features(1))
        length = (chunk_size - 1) * step + shortest
        pairs: dict[str, list[tuple[Array, Array]]] = {}
        for begin in range(0, len(self.samples) - shortest + 1, chunk_size * step):
            window = self.samples[begin : begin + length]
            found = self.run({"samples": window[np.newaxis], "required_cache_size": np.array(required), **mine})
            output, caches = encoder.step(self.features(window)[np.newaxis], caches, required_cache_size=required)
            expected: dict[str, Array] = {
                "log_probs": self.model.ctc(output[0])[np.newaxis],
                "encoder_out": np.asarray(output),
                "next_offset": caches.offset,
                **{f"r_{name}": np.asarray(tensor) for name, tensor in caches.tensors.items()},
            }
            for name, value in expected.items():
                pairs.setdefault(name, []).append((value, found[name]))
            mine = {"offset": found["next_offset"], **{name: found[f"r_{name}"] for name in caches.tensors}}
        self._compare(case, pairs)

    def _recording(self, num_samples: int) -> None:
        case, samples = f"recording of {num_samples} samples", self.samples[:num_samples]
        found = self.run({"samples": samples[np.newaxis]})
        padded, num_before = self._padded(samples)
        encoder_out = self.model.encode(self.features(padded))
        log_probs = self.model.ctc(encoder_out)
        best = ctc_greedy_search(log_probs, self.config.blank)
        rate = self.bundle.manifest.features.sample_rate
        times = np.array(best.times) * self.bundle.manifest.frame_s - num_before / rate
        expected: dict[str, Array] = {
            "log_probs": log_probs[np.newaxis],
            "encoder_out": encoder_out[np.newaxis],
            "tokens": np.array(best.tokens, np.int64),
            "times": np.clip(times, 0, num_samples / rate).astype(np.float32),
        }
        self._compare(case, {name: [(value, found[name])] for name, value in expected.items()})

    def _clip(self, kind: str) -> None:
        rate = self.bundle.manifest.features.sample_rate
        content = encoded(self.samples, rate, kind)
        samples, _ = soundfile.read(io.BytesIO(content.tobytes()), dtype="float32")
        log_probs = self.model.ctc(self.model.encode(self.features(self._padded(samples)[0])))
        best = ctc_greedy_search(log_probs, self.config.blank)
        found = self.run({"audio": content})
        self._compare(f"{kind} file", {"tokens": [(np.array(best.tokens, np.int64), found["tokens"])]})
        text = self.bundle.vocabulary.text(best.tokens)
        if found["text"].tolist() != [text]:
            raise ParityError(f"{self.subject}: {kind} file: text is {found['text'].tolist()}, expected {[text]}")

    def _padded(self, samples: Array) -> tuple[Array, int]:
        """Return a recording padded as the bundle requires, and the number of samples added before the recording."""
        manifest = self.bundle.manifest
        padding = Padding(manifest.decoding.padding_s, manifest.features.sample_rate, manifest.features.frame_len)
        return np.concatenate([padding.accept(samples), padding.finish()]), padding.num_before

    def _detokenizer(self) -> None:
        """Compare the detokenizer with the vocabulary, which it reads in three random orders."""
        graph = detokenizer_graph(self.bundle)
        run = session_of(ir.to_proto(graph).SerializeToString(), extensions=True)
        random = np.random.default_rng(0)
        for row in range(3):
            for tokens in np.array_split(random.permutation(self.config.vocab_size), 1 + self.config.vocab_size // 20):
                found, expected = run({"tokens": tokens})["text"].tolist(), self.bundle.vocabulary.text(tokens.tolist())
                if found != [expected]:
                    raise ParityError(f"{self.subject}: detokenizer, row {row}: text is {found}, expected {[expected]}")

    def _refusals(self) -> None:
        """Check that unsuitable clips fail with the expected reason, and that 10 ms of silence yields no text.

        Without the graph's own checks, AudioDecoder would cut long clips, and alias clips with another sample rate.
        """
        rate = self.bundle.manifest.features.sample_rate
        refused = {
            "shorter than": encoded(np.zeros((LONGEST_CLIP_S + 1) * rate, np.float32), rate, "WAV"),
            f"must be {rate} Hz": encoded(np.zeros(rate, np.float32), 2 * rate, "WAV"),
            "Cannot detect audio stream format": np.frombuffer(b"bytes that are not audio", np.uint8)[np.newaxis],
        }
        for reason, content in refused.items():
            try:
                self.run({"audio": content})
            except ONNXRUNTIME_ERRORS as error:
                if reason in str(error):
                    continue
                told = f"an unsuitable file failed with {error}, expected {reason!r}"
                raise ParityError(f"{self.subject}: {told}") from error
            raise ParityError(f"{self.subject}: an unsuitable file was recognised, expected the error {reason!r}")
        nothing = self.run({"audio": encoded(np.zeros(rate // 100, np.float32), rate, "WAV")})
        if nothing["text"].tolist() != [""]:
            raise ParityError(f"{self.subject}: 10 ms of silence yields text {nothing['text'].tolist()}, expected none")

    def _compare(self, case: str, values: Mapping[str, list[tuple[Array, Array]]]) -> None:
        for name, pairs in values.items():
            self.report.add(compared(case, name, pairs), self.subject, "the graph and the bundle")


def encoded(samples: Array, rate: int, kind: str) -> Array:
    """Return the bytes [1, bytes] of an audio file of format `kind`."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype="PCM_16")
    return np.frombuffer(file.getvalue(), np.uint8)[np.newaxis]
