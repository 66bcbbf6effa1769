"""Converts a bundle to the graphs of a profile, optionally in ORT format, and compares them with the bundle.

ORT format is onnxruntime's own. It loads faster, and builds of onnxruntime without optimizers can read it.
"""

import io
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import onnxruntime
import soundfile

from u2moe.export.comparison import Array, ParityReport, compared, parity_samples
from u2moe.export.profiles.graphs import (
    LONGEST_CLIP_S,
    PROFILES,
    Profile,
    detokenizer_graph,
    profile_graph,
    samples_per_frame,
    window_samples,
)
from u2moe.runtime.audio.padding import Padding
from u2moe.runtime.bundle.manifest import MANIFEST_FILE, TOKENS_FILE
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_writer import BundleWriter, write_manifest
from u2moe.runtime.declarations import plain
from u2moe.runtime.decoding.ctc import ctc_greedy_search
from u2moe.runtime.errors import ParityError, UnsupportedError
from u2moe.runtime.graph.features import features_graph
from u2moe.runtime.graph.file import save_graph
from u2moe.runtime.model.encoder import required_cache_size
from u2moe.runtime.model.features import fbank
from u2moe.runtime.model.native import ONNXRUNTIME_ERRORS
from u2moe.runtime.model.settings import SessionSettings

Feeds = dict[str, Array]
Run = Callable[[Mapping[str, Array]], Feeds]  # runs a graph: takes its inputs by name, and returns its outputs by name

ONE_FILE_LIMIT = 1_500_000_000  # bytes of weights up to which a graph is one file, as users of these profiles expect
CHUNKS = ((16, -1), (16, 4), (5, 2))  # (chunk size, left chunks) of the compared streams


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        path: the folder that was written.
        profile: the profile.
        files: names of the files in the folder.
        report: comparison of the written graphs with the bundle.
    """

    path: Path
    profile: Profile | Literal["static"]
    files: tuple[str, ...]
    report: ParityReport


def convert_bundle(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    profile: Profile,
    *,
    ort: bool = False,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Conversion:
    """Write the graphs of a profile into `out`, after comparing them with the bundle.

    Args:
        bundle: folder of a bundle, quantized or not.
        out: folder to write; left unchanged on failure.
        profile: `streaming`, `offline` and `clip` each write one graph and tokens.txt; `streaming` also writes
            the decoder graph for the second pass. `ort` writes every graph of the bundle in ORT format, with
            tokens.txt, a manifest and the language model, if any.
        ort: also write the graphs in ORT format, and the list of operators that they use.
        overwrite: replace `out` if it is a folder with tokens.txt and without bundle.json; for `ort`, with bundle.json.
        progress: called with a line for each step.

    Raises:
        UnsupportedError: the bundle's encoder does not support the profile.
        ParityError: a written graph differs from the bundle.
        BundleError: the bundle cannot be read, or `out` cannot be written.
        ModuleNotFoundError: `clip` needs onnxruntime-extensions, which is not installed.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    opened = open_source(bundle)
    if Path(out).resolve() == opened.path.resolve():
        raise UnsupportedError(f"{opened.path}: cannot convert a bundle in place: choose another folder")
    marker = MANIFEST_FILE if profile == "ort" else TOKENS_FILE
    with BundleWriter(out, overwrite=overwrite, marker=marker) as staging:
        folder = staging.path
        staging.add(TOKENS_FILE, opened.path / TOKENS_FILE)
        if profile == "ort":
            report, features = ParityReport(sides="the bundle and its graphs in ORT format"), folder / "features.onnx"
            save_graph(features_graph(opened.manifest), features)
            graphs = [features, *(opened.path / graph.file for graph in opened.manifest.model.graphs())]
            write_ort(graphs, folder, opened, report, progress)
            features.unlink()
            if (language_model := opened.manifest.decoding.language_model) is not None:
                staging.add(language_model.file, opened.path / language_model.file)
            write_manifest(folder, opened.manifest)
        else:
            report = _write_one(opened, folder, profile, ort=ort, progress=progress)
        files = tuple(sorted(file.name for file in folder.iterdir()))
        return Conversion(path=staging.publish(), profile=profile, files=files, report=report)


def _write_one(
    bundle: Bundle, folder: Path, profile: Profile, *, ort: bool, progress: Callable[[str], None]
) -> ParityReport:
    """Write the graph of a profile and compare it with the bundle; if `ort`, also write and compare ORT files."""
    file, has_padding = folder / f"{profile}.onnx", profile in ("offline", "clip")
    if chosen := [name for name in plain(bundle.manifest.decoding) if name != "padding_s" or not has_padding]:
        progress(f"settings that the graphs do not include, left to the program: {', '.join(chosen)}")
    progress(f"writing {file.name}")
    save_graph(profile_graph(bundle, profile), file, limit=ONE_FILE_LIMIT)
    if profile == "streaming" and bundle.manifest.model.decoder != "none":
        save_graph(ir.load(bundle.path / "decoder.onnx"), folder / "decoder.onnx", limit=ONE_FILE_LIMIT)
    run = session_of(file, extensions=profile == "clip")
    report = ProfileParity(bundle, run, subject=bundle.path).compare(profile, progress)
    if ort:
        write_ort(sorted(folder.glob("*.onnx")), folder, bundle, report, progress)
    return report


def write_ort(
    files: Sequence[Path], folder: Path, bundle: Bundle, report: ParityReport, progress: Callable[[str], None]
) -> None:
    """Write graphs in ORT format and a list of their operators. Compare each with its original on the same inputs."""
    from onnxruntime.tools.ort_format_model import create_config_from_models  # noqa: PLC0415 - loads slowly

    outputs: Feeds = {}
    for file in files:
        converted, session = folder / f"{file.stem}.ort", partial(session_of, extensions=file.stem == "clip")
        progress(f"writing {converted.name}")
        session(file, portable=True, target=converted)
        feeds = _feeds(file.stem, bundle, outputs)
        outputs, found = session(file, portable=True)(feeds), session(converted)(feeds)
        if "text" in outputs and found.pop("text").tolist() != outputs.pop("text").tolist():
            raise ParityError(f"{converted.name}: its output text differs from that of {file.name}")
        for name, value in outputs.items():
            report.add(compared(converted.name, name, [(value, found[name])]), file.parent, f"it and {file.name}")
    written = [folder / f"{file.stem}.ort" for file in files]
    target = folder / "required_operators.config"  # for `--include_ops_by_config` of onnxruntime's build
    with warnings.catch_warnings():
        logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
        warnings.simplefilter("ignore", ResourceWarning)  # onnxruntime leaves files open until garbage collection
        create_config_from_models(written, target, enable_type_reduction=False)
    lines = target.read_text(encoding="utf-8").splitlines(keepends=True)
    target.write_text("".join(line for line in lines if not line.startswith("#")), encoding="utf-8")  # no local paths


def _feeds(graph: str, bundle: Bundle, before: Feeds) -> Feeds:
    """Return inputs for a graph: outputs of the preceding graph, samples, or random values, as the graph requires."""
    config, samples = bundle.manifest.model, parity_samples(bundle.manifest, 4.0)
    if graph == "clip":
        return {"audio": encoded(samples, bundle.manifest.features.sample_rate, "FLAC")}
    if graph == "ctc":
        return {"encoder_out": before["output"]}
    if graph == "decoder":
        random = np.random.default_rng(0)
        return {
            "hyps": random.integers(0, config.vocab_size, (1, 4, 9)),
            "hyps_lens": np.array([[9, 4, 1, 0]]),
            "encoder_out": random.standard_normal((1, 30, config.output_size)).astype(np.float32),
            "encoder_lens": np.array([30]),
        }
    feeds: Feeds = {"samples": samples[np.newaxis]}
    if graph == "encoder":
        feeds = {"chunk": before["features"], "chunk_lens": np.array([before["features"].shape[1]])}
    if graph in ("encoder", "streaming") and config.streaming:
        feeds |= {"offset": np.zeros(1, np.int64), "required_cache_size": np.array(-1)}
        for cache in config.caches:
            feeds[cache.name] = np.zeros((cache.num_blocks, 1, *cache.shape), np.float32)
    return feeds


def open_source(bundle: str | os.PathLike[str]) -> Bundle:
    """Open a bundle to convert it. Raises UnsupportedError if its graphs have a fixed shape."""
    opened = Bundle.open(bundle)
    if opened.manifest.model.static is not None:
        raise UnsupportedError(f"{opened.path}: model.static: graphs of fixed shape: convert the source bundle")
    return opened


def session_of(
    file: Path | bytes, *, extensions: bool = False, portable: bool = False, target: Path | None = None
) -> Run:
    """Return a function that runs the graph `file` in ONNX or ORT format, or its content.

    `extensions` registers the operators of onnxruntime-extensions; ModuleNotFoundError if it is not installed.
    `portable` allows only the optimisations of ORT format. Others may add the products of a convolution in another
    order, which changes the rounding, in a quantized network by a whole step. The optimized graph is written to
    `target`, in ORT format.
    """
    options = SessionSettings(kernels="onnxruntime").session_options()  # as in programs in other languages
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # otherwise 8 bits for activations
    if extensions:
        import onnxruntime_extensions  # noqa: PLC0415 - only the profile clip needs it

        options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    if target is not None:
        options.optimized_model_filepath = str(target)
        options.add_session_config_entry("session.save_model_format", "ORT")
    disabled = ["NchwcTransformer"] if portable else None  # its output runs only on some processors
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(file, options, providers=providers, disabled_optimizers=disabled)
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


class ProfileParity:
    """Compares the graph of one profile with a bundle. Error messages name `subject`."""

    def __init__(self, bundle: Bundle, run: Run, *, subject: Path) -> None:
        self.bundle, self.config, self.run, self.subject = bundle, bundle.manifest.model, run, subject
        self.features = partial(fbank, config=bundle.manifest.features)
        self.model = bundle.load(SessionSettings(kernels="onnxruntime"))
        self.samples = parity_samples(bundle.manifest, 6.0)
        self.report = ParityReport(sides="the bundle and the graph made from it")

    def compare(self, profile: Profile, progress: Callable[[str], None] = lambda _: None) -> ParityReport:
        """Run all comparisons of a profile. Raises ParityError, which names the case, tensor, difference and limit."""
        if profile == "streaming":
            whole = self.config.whole_chunk
            streams = [
                (f"chunk {whole(size)}, left {'all' if left < 0 else left}", size, left, 0) for size, left in CHUNKS
            ]
            streams.append(("where positions are moved back", 16, 4, self.config.max_position - 20))
            for name, size, left, start in streams:
                progress(case := f"stream, {name}")
                self._stream(case, whole(size), left, start)
        if profile == "offline":
            for num_samples in (0, 1, window_samples(self.bundle.manifest, self.config.window), len(self.samples)):
                progress(case := f"recording of {num_samples} samples")
                self._recording(case, self.samples[:num_samples])
        if profile == "clip":
            for kind in ("WAV", "FLAC"):
                progress(case := f"{kind} file")
                self._clip(case, kind)
            progress("detokenizer")
            self._detokenizer()
            progress("files that are refused")
            self._refusals()
        return self.report

    def _stream(self, case: str, chunk_size: int, left: int, start: int) -> None:
        """Compare the graph with the bundle on a stream that begins at position `start`. Each has its own caches."""
        encoder, required = self.model.encoder, required_cache_size(chunk_size, left)
        caches = encoder.start()
        caches.offset[:] = start
        mine = {"offset": caches.offset, **{name: np.asarray(tensor) for name, tensor in caches.tensors.items()}}
        step = samples_per_frame(self.bundle.manifest)
        shortest = window_samples(self.bundle.manifest, self.config.num_features(1))
        pairs: dict[str, list[tuple[Array, Array]]] = {}
        for begin in range(0, len(self.samples) - shortest + 1, chunk_size * step):
            window = self.samples[begin : begin + (chunk_size - 1) * step + shortest]
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

    def _recording(self, case: str, samples: Array) -> None:
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
            "times": np.clip(times, 0, len(samples) / rate).astype(np.float32),
        }
        self._compare(case, {name: [(value, found[name])] for name, value in expected.items()})

    def _clip(self, case: str, kind: str) -> None:
        content = encoded(self.samples, self.bundle.manifest.features.sample_rate, kind)
        samples, _ = soundfile.read(io.BytesIO(content.tobytes()), dtype="float32")
        log_probs = self.model.ctc(self.model.encode(self.features(self._padded(samples)[0])))
        best = ctc_greedy_search(log_probs, self.config.blank)
        found = self.run({"audio": content})
        self._compare(case, {"tokens": [(np.array(best.tokens, np.int64), found["tokens"])]})
        text = self.bundle.vocabulary.text(best.tokens)
        if found["text"].tolist() != [text]:
            raise ParityError(f"{self.subject}: {case}: text is {found['text'].tolist()}, expected {[text]}")

    def _padded(self, samples: Array) -> tuple[Array, int]:
        """Return a recording padded as the bundle requires, and the number of samples added before the recording."""
        manifest = self.bundle.manifest
        padding = Padding(manifest.decoding.padding_s, manifest.features.sample_rate, manifest.features.frame_len)
        return np.concatenate([padding.accept(samples), padding.finish()]), padding.num_before

    def _detokenizer(self) -> None:
        """Compare the detokenizer with the vocabulary, which it reads in three random orders."""
        run = session_of(ir.to_proto(detokenizer_graph(self.bundle)).SerializeToString(), extensions=True)
        random = np.random.default_rng(0)
        for row in range(3):
            for tokens in np.array_split(random.permutation(self.config.vocab_size), 1 + self.config.vocab_size // 20):
                found, expected = run({"tokens": tokens})["text"].tolist(), self.bundle.vocabulary.text(tokens.tolist())
                if found != [expected]:
                    raise ParityError(f"{self.subject}: detokenizer, row {row}: text is {found}, expected {[expected]}")

    def _refusals(self) -> None:
        """Check that unsuitable clips fail with the expected reason, and that 10 ms of silence yields no text."""
        # without the graph's own checks, AudioDecoder would cut long clips, and alias clips with another sample rate
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
