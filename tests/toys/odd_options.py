"""Options, hotwords, sample rates and samples, odd or not: constructed, and used if they are accepted."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from damage import ODD_VALUES, one_of

from u2moe.runtime import (
    Bundle,
    DecodingOptions,
    EndpointConfig,
    EndpointRule,
    Recognizer,
    SessionSettings,
    SubtitleOptions,
    VadOptions,
)
from u2moe.runtime.options import SEARCHES
from u2moe.runtime.text.formats import FORMATS, format_transcript

Samples = npt.NDArray[np.float32]
_RATES = (8000, 16_000, 44_100, 11_025.5, 1, 1e9)
_DTYPES = ("float32", "float64", "int16", "int32", "uint8", "bool", "complex64", "O", "U4", "float16")
ODD = 0.15
"""Share of odd values."""
_LOADS = 0.02
"""Share of option sets that load the bundle again, which takes a fifth of a second."""


def use_odd_options(recognizer: Recognizer, clip: Samples) -> Callable[[np.random.Generator], str]:
    """Return a function that draws options, and recognises a clip with them, as a whole or as a stream."""
    transcript = recognizer.transcribe(clip)

    def transcribe(random: np.random.Generator) -> None:
        recognizer.transcribe(clip, options=decoding_options(random), hotwords=hotwords(random))

    def stream(random: np.random.Generator) -> None:
        own = Recognizer(recognizer.bundle, recognizer.model, decoding_options(random))
        source = own.create_stream(hotwords=hotwords(random))
        for portion in np.array_split(clip, int(random.integers(1, 9))):
            source.accept_waveform(own.bundle.manifest.features.sample_rate, portion)
            own.decode_streams([source])
        source.input_finished()
        own.decode_streams([source])
        source.get_result()

    def samples(random: np.random.Generator) -> None:
        rate = one_of(_RATES if random.random() > ODD else ODD_VALUES, random)
        recognizer.transcribe(odd_samples(clip, random), rate)

    def subtitles(random: np.random.Generator) -> None:
        names = (*FORMATS, *(value for value in ODD_VALUES if isinstance(value, str)))
        format_transcript(transcript, one_of(names, random), options=drawn(SubtitleOptions, random))

    def speech(random: np.random.Generator) -> None:
        drawn(VadOptions, random)

    def load(random: np.random.Generator) -> None:
        names = ("num_threads", "providers", "provider_options", "sess_options")
        settings = {name: one_of(ODD_VALUES, random) for name in names if random.random() < 0.5}
        Bundle.open(recognizer.bundle.path).load(SessionSettings(**settings))

    uses = (transcribe, transcribe, stream, stream, samples, subtitles, speech)

    def use(random: np.random.Generator) -> str:
        (load if random.random() < _LOADS else one_of(uses, random))(random)
        return "accepted"

    return use


def drawn(options: type[Any], random: np.random.Generator, **fields: Any) -> Any:
    """Return options with some fields odd or near their defaults, and some given."""
    for field in dataclasses.fields(options):
        if field.name not in fields and random.random() < 0.3:
            is_odd = random.random() < ODD
            fields[field.name] = one_of(ODD_VALUES, random) if is_odd else _near(field.default, random)
    return options(**fields)


def _near(default: object, random: np.random.Generator) -> object:
    """Return a value of the same type and magnitude."""
    if isinstance(default, bool):
        return bool(random.random() < 0.5)
    if isinstance(default, int):
        return one_of((int, np.int32), random)(round(default * random.uniform(0.1, 3)))
    number = random.uniform(0, 3) * (default if isinstance(default, float) and default else 0.5)
    return one_of((float, np.float32), random)(number)


def decoding_options(random: np.random.Generator) -> DecodingOptions:
    """Return options of a search, with endpoints of any kind."""
    fields: dict[str, Any] = {"search": one_of((None, *SEARCHES) if random.random() > ODD else ODD_VALUES, random)}
    if random.random() < 0.5:
        fields["chunk_size"] = one_of((None, 1, 3, 4, 16, 16, 100, 1000, 10**6, -1), random)
        fields["num_left_chunks"] = one_of((-1, 0, 1, 4, 4, 100, 10**6, 10**9), random)
    if random.random() < 0.3:
        fields["endpoint"] = endpoints(random)
    found: DecodingOptions = drawn(DecodingOptions, random, **fields)
    return found


def endpoints(random: np.random.Generator) -> EndpointConfig:
    """Return endpoint rules."""
    rules = {f"rule{number}": drawn(EndpointRule, random) for number in (1, 2, 3) if random.random() < 0.5}
    found: EndpointConfig = drawn(EndpointConfig, random, **rules)
    return found


def hotwords(random: np.random.Generator) -> Any:
    """Return hotwords as lists, mappings or something else; None half of the time."""
    if random.random() < 0.5:
        return None
    words = ("SEVEN", "the old harbour", "SEVEN FIFTEEN", "x" * 1000)
    odd_words = ("", " ", "ß", "a\0b", "\ud800", 3, None)
    num = int(random.integers(0, 4))
    phrases = [one_of(words if random.random() > ODD else odd_words, random) for _ in range(num)]
    weights = [one_of((1.5, 0.1, 100) if random.random() > ODD else ODD_VALUES, random) for _ in phrases]
    pairs = list(zip(phrases, weights, strict=True))
    return one_of((phrases, pairs, dict(pairs)) if random.random() > ODD else ODD_VALUES, random)


def odd_samples(clip: Samples, random: np.random.Generator) -> Any:
    """Return samples of some type and shape, with odd values among them."""
    if random.random() < 0.2:
        return one_of(ODD_VALUES, random)
    values = clip.copy()
    for _ in range(int(random.integers(0, 3))):
        values[int(random.integers(len(values)))] = one_of((np.nan, np.inf, -np.inf, 1e38, 0.0), random)
    shape = one_of(((-1,), (1, -1), (-1, 1), (2, -1), (-1, 2), (1, 1, -1)), random)
    some = one_of((values[: len(values) // 2 * 2], values[:2], values[:0]), random)
    with np.errstate(all="ignore"):
        return some.reshape(shape if some.size else (0,)).astype(one_of(_DTYPES, random))
