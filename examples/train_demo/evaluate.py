"""Measures word error rates of bundles on every test set, by context and search, and words found without speech.

    python evaluate.py float32=bundle int8=bundle-int8 --every-mode int8

Writes `wer.json`, with intervals. Results of a bundle on a set are cached in the work directory, and computed again
only if one of the two has changed.
"""

import argparse
import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from spelling import normalize
from tables import NARROW, UNGUIDED

from u2moe.benchmarks.results.files import of_bundle, read_json, write_json
from u2moe.benchmarks.studies.shared.script import named
from u2moe.runtime import Bundle, SessionSettings, attention_rescoring, ctc_prefix_beam_search
from u2moe.runtime.audio.arrays import Samples
from u2moe.runtime.audio.padding import padded
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.bundle.manifest import DecodingConfig
from u2moe.runtime.corpus.lists import read_recordings
from u2moe.runtime.corpus.results import GroupScore
from u2moe.runtime.decoding.fusion import Fusion
from u2moe.runtime.model.features import fbank
from u2moe.runtime.text.word_errors import edit_distance, words

Numbers = NDArray[np.float32]

CHUNK_SIZES = (None, 16, 8)
SEARCHES = ("ctc_prefix_beam", "attention_rescoring")
MODES = ("", NARROW, UNGUIDED, UNGUIDED + NARROW)
"""Suffixes of a condition's name that stand for changes to the bundle's defaults."""
PLAIN = UNGUIDED + NARROW
"""The library's default decoding, used to compare float32 and int8."""
TIMED = 12
"""One in this many recordings is timed."""
SILENCE_S = 5.0
LEVELS_DB = (None, -80, -60, -50, -40)
"""Levels of silences in dB below full scale; None: zeros."""


@dataclass(kw_only=True)
class Count(GroupScore):
    """Errors of one test set under one condition."""

    num_exact: int = 0

    def add(self, num_errors: int, num_words: int) -> None:
        """Count one utterance."""
        super().add(num_errors, num_words)
        self.num_exact += not num_errors

    def data(self) -> dict[str, Any]:
        """Return all numbers. `interval` is the 95 % interval of the word error rate (bootstrap over utterances)."""
        return {
            "num_words": self.num_words, "num_errors": self.num_errors, "wer": round(self.rate, 6),
            "interval": [round(limit, 6) for limit in self.interval()],
            "num_utterances": self.num_utterances, "num_exact": self.num_exact,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Heard:
    """The text that one search finds in a recording, and the processor time that it took, including features."""

    condition: str
    text: str
    cpu_s: float


class Listener:
    """A bundle that recognises recordings under every condition. It uses onnxruntime's kernels and one thread."""

    def __init__(self, path: Path, modes: Sequence[str] = ("",)) -> None:
        self.bundle = Bundle.open(path)
        self.model = self.bundle.load(SessionSettings(num_threads=1, kernels="onnxruntime"))
        self.sample_rate = self.bundle.manifest.features.sample_rate
        self.modes = modes
        language_model = self.bundle.language_model()
        self.fusion = None if language_model is None else Fusion(language_model, self.bundle.vocabulary)

    def hear(self, samples: Samples) -> Iterator[Heard]:
        """Yield the result of each search with each context."""
        begin = time.process_time()
        manifest = self.bundle.manifest
        frames = fbank(
            padded(samples, manifest.decoding.padding_s, manifest.features.sample_rate, manifest.features.frame_len),
            manifest.features,
        )
        features_s = time.process_time() - begin
        for chunk_size in CHUNK_SIZES:
            begin = time.process_time()
            encoder_out = self.model.encode(frames, chunk_size)
            log_probs = self.model.ctc(encoder_out)
            encoded_s = features_s + time.process_time() - begin
            for mode in self.modes:
                yield from self._searched(chunk_size, mode, encoder_out, log_probs, encoded_s)

    def _searched(
        self, chunk_size: int | None, mode: str, encoder_out: Numbers, log_probs: Numbers, encoded_s: float
    ) -> Iterator[Heard]:
        """Yield the results of the two passes in one mode."""
        decoding, fusion = self.bundle.manifest.decoding, None if UNGUIDED in mode else self.fusion
        beam_size = DecodingConfig().beam_size if NARROW in mode else decoding.beam_size
        factor = fusion.rescoring_weight if fusion else 1.0
        begin = time.process_time() - encoded_s
        beam = ctc_prefix_beam_search(log_probs, beam_size, self.model.config.blank, fusion=fusion)
        first_s = time.process_time() - begin
        scores = self.model.token_scores(encoder_out, [hypothesis.tokens for hypothesis in beam])
        rescored = attention_rescoring(beam, scores, decoding.weights(factor))
        both_s = time.process_time() - begin
        found = ((beam[0], first_s), (rescored[0].hypothesis, both_s))
        for search, (hypothesis, cpu_s) in zip(SEARCHES, found, strict=True):
            text = normalize(self.bundle.vocabulary.text(hypothesis.tokens))
            yield Heard(condition=f"{chunk_size or 'full'} {search}{mode}", text=text, cpu_s=cpu_s)


def hear_set(path: Path, manifest: Path, file: Path, modes: Sequence[str] = ("",)) -> dict[str, Any]:
    """Return results of a bundle on one set, cached in `file`: seconds of audio, and all `Heard` of each recording."""
    of_set = hashlib.sha256(manifest.read_bytes()).hexdigest()
    made_of = {**of_bundle(path), "set": of_set, "modes": [*modes]}
    content = read_json(file)
    if made_of.items() <= content.items():
        return content
    listener, recordings, audio_s = Listener(path, modes), [], 0.0
    for recording in read_recordings(manifest):
        samples = read_audio(recording.path, listener.sample_rate)
        audio_s += len(samples) / listener.sample_rate
        heard = [asdict(item) for item in listener.hear(samples)]
        recordings.append({"name": recording.path.name, "transcript": recording.transcript, "heard": heard})
    content = {**made_of, "audio_s": audio_s, "recordings": recordings}
    write_json(file, content)
    return content


def scores(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the word errors and the processor time on one set, by condition."""
    counts: dict[str, Count] = {}
    cpu_s: dict[str, float] = {}
    for recording in content["recordings"]:
        reference = words(recording["transcript"])
        for heard in recording["heard"]:
            name = heard["condition"]
            errors = edit_distance(reference, words(heard["text"]))
            counts.setdefault(name, Count()).add(errors, len(reference))
            cpu_s[name] = cpu_s.get(name, 0.0) + heard["cpu_s"]
    return {
        name: {**count.data(), "cpu_s": round(cpu_s[name], 3), "audio_s": round(content["audio_s"], 3)}
        for name, count in counts.items()
    }


def silences(sample_rate: int) -> Iterator[tuple[str, Samples]]:
    """Yield recordings without speech: zeros, white noise and hum."""
    rng, length = np.random.default_rng(0), int(SILENCE_S * sample_rate)
    hum = np.sin(2 * np.pi * 50 * np.arange(length) / sample_rate)
    for level in LEVELS_DB:
        scale = 0.0 if level is None else 10 ** (level / 20)
        for name, sound in (("noise", rng.standard_normal(length)), ("hum", np.sqrt(2) * hum)):
            yield f"{name} {level} dB" if level else f"zeros {name}", (scale * sound).astype(np.float32)


def words_in_silence(path: Path) -> dict[str, list[str]]:
    """Return the non-empty texts of recordings without speech, by condition."""
    listener = Listener(path, [*MODES])
    found: dict[str, list[str]] = {}
    for name, samples in silences(listener.sample_rate):
        for heard in listener.hear(samples):
            found.setdefault(heard.condition, []).extend([f"{name}: {heard.text}"] * bool(heard.text))
    return found


def real_time_factors(path: Path, manifest: Path) -> dict[str, float]:
    """Return the real-time factor of each condition on some recordings. The modes take turns."""
    listener, audio_s = Listener(path, MODES), 0.0
    cpu_s: dict[str, float] = {}
    for recording in list(read_recordings(manifest))[::TIMED]:
        samples = read_audio(recording.path, listener.sample_rate)
        audio_s += len(samples) / listener.sample_rate
        for heard in listener.hear(samples):
            cpu_s[heard.condition] = cpu_s.get(heard.condition, 0.0) + heard.cpu_s
    return {condition: round(seconds / audio_s, 6) for condition, seconds in cpu_s.items()}


def language_model_costs(path: Path) -> dict[str, float]:
    """Return bytes and median processor time of loading, for a bundle's language model and for the rest of it."""
    loads: dict[str, list[float]] = {"rest_s": [], "language_model_s": []}
    for _ in range(5):
        begin = time.process_time()
        bundle = Bundle.open(path)
        bundle.load(SessionSettings(num_threads=1, kernels="onnxruntime"))
        loads["rest_s"].append(time.process_time() - begin)
        begin = time.process_time()
        language_model = bundle.language_model()
        assert language_model is not None
        Fusion(language_model, bundle.vocabulary)
        loads["language_model_s"].append(time.process_time() - begin)
    sizes = {name: digest.size for name, digest in bundle.manifest.files.items()}
    config = bundle.manifest.decoding.language_model
    own = sizes[config.file] if config else 0
    medians = {name: round(sorted(each)[2], 3) for name, each in loads.items()}
    return {**medians, "bytes": own, "rest_bytes": sum(sizes.values()) - own}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", type=named, nargs="+", metavar="NAME=BUNDLE")
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--every-mode", metavar="NAME", help="bundle to measure also without its beam and language model"
    )
    parser.add_argument("--time", metavar="LIST", type=Path, help="only time --every-mode, on a quiet machine")
    args = parser.parse_args()
    if args.time:
        found = read_json(args.output / "wer.json")
        path = Path(dict(args.bundles)[args.every_mode])
        found[args.every_mode] |= {"rtf": real_time_factors(path, args.time), "costs": language_model_costs(path)}
        write_json(args.output / "wer.json", found)
        return
    manifests = [*sorted((args.work_dir / "test").glob("*.tsv")), *sorted((args.work_dir / "dev").glob("*.tsv"))]
    results: dict[str, Any] = {}
    with ProcessPoolExecutor(args.processes) as pool:
        jobs = {
            (name, manifest.stem): pool.submit(
                hear_set,
                Path(bundle),
                manifest,
                args.work_dir / "heard" / f"{manifest.stem}-{name}.json",
                [*MODES] if name == args.every_mode else [PLAIN],
            )
            for manifest in manifests
            for name, bundle in args.bundles
        }
        for (name, stem), job in jobs.items():
            own = results.setdefault(name, {"sets": {}})["sets"][stem] = scores(job.result())
            print(stem, name, {condition: f"{found['wer']:.1%}" for condition, found in own.items()}, flush=True)
    for name, bundle in args.bundles:
        results[name] |= {"num_silences": 2 * len(LEVELS_DB), "silence": words_in_silence(Path(bundle))}
        print(name, "without speech:", results[name]["silence"])
    write_json(args.output / "wer.json", results)


if __name__ == "__main__":
    main()
