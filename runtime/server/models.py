"""Named models of a server, their decoding options, and the options that clients may request."""

import asyncio
import gc
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, Literal
from weakref import WeakValueDictionary

import numpy as np

from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.declarations import Option, client_options_of
from u2moe.runtime.decoding.context import LONGEST_PHRASE, ContextGraph, writable
from u2moe.runtime.decoding.pipeline import MAX_BATCH
from u2moe.runtime.language.model import LanguageModelOptions
from u2moe.runtime.options import NONE, WITHOUT_BEAM, DecodingOptions
from u2moe.runtime.recognizer import Recognizer
from u2moe.runtime.server.errors import RequestError, UnavailableError, refusing
from u2moe.runtime.server.options import ServerOptions
from u2moe.runtime.server.transport import in_thread
from u2moe.runtime.text.grammar import UNKNOWN, Grammar
from u2moe.runtime.text.vocabulary import WORD_BOUNDARY, is_special
from u2moe.runtime.text.written.formatter import TextFormat

_SHARE = 0.35
"""Share of the measured throughput for streams. The rest is for the event loop, for chunks that arrive together, and
for other programs, which may later take up to half of the processor time."""
_MEASURED_STREAMS, _MEASURED_S, _MEASURED_HOTWORDS = 8, 4.0, 1000
_MOST_WEIGHTS = 4  # most weights of a language model in use besides the default; each takes as much memory as the model
_MOST_STEPS = 1 << 17  # of a grammar; they take 0.1 s of the thread that all clients share
_MOST_CHOICES, _MOST_PLACES = 10_000, 30_000  # in a grammar; 380,000 and 229,000 took 60 times the work and 107 MB
_LEFT_CHUNKS = 4  # left context of live streams in chunks; it limits the memory and time of a stream
_SEPARATORS = re.compile(r"[,;\n\r\u3001\uff0c\uff1b]+")
_EDGES = " \t.!?\"'()[]:\u3002"
_SYNTAX = re.compile(r"[][()<>|]")
_HOTWORDS = Option(kind="record", help="phrases, each a string or [phrase, weight]", otherwise="the server's")
REQUEST_OPTIONS = {"hotwords": _HOTWORDS} | {
    name: replace(declared, otherwise="the server's")
    for name, (_, declared) in client_options_of(DecodingOptions).items()
}
"""Decoding options that a request may set, by the names that clients use."""
MOST_BEAM = int(REQUEST_OPTIONS["beam_size"].most or 1)  # maximum beam size that a request may set


class ServedModel:
    """A model that clients may choose. Files are decoded with the options of `recognizer`.

    `languages` are codes, from the options or the vocabulary. `costs`, relative to a plain stream (default beam and no
    hotwords), are those of streams with the default beam, the widest beam, and the same two with hotwords.
    """

    def __init__(self, name: str, recognizer: Recognizer, options: ServerOptions) -> None:
        self.name, self.recognizer = name, recognizer
        self.stream_options = replace(
            recognizer.options,
            chunk_size=options.chunk_size or recognizer.model.config.stream_chunk_size,
            num_left_chunks=_LEFT_CHUNKS,
            endpoint=recognizer.options.endpoint or recognizer.default_endpoint,
        )
        self.languages = list(options.languages) or languages_of(recognizer.vocabulary.symbols)
        self._limits = options.limits
        self.beam_size: int = self.stream_options.beam_size or recognizer.bundle.manifest.decoding.beam_size
        self._is_greedy = self.stream_options.search in WITHOUT_BEAM
        self.costs = (1.0, 1.0, 1.0, 1.0)
        self._weighted: WeakValueDictionary[float, LanguageModelOptions] = WeakValueDictionary()
        self._kept: list[LanguageModelOptions] = []  # keeps weights that no stream uses at the moment
        self._preparing = asyncio.Lock()

    def measure_capacity(self) -> int:
        """Measure how many live streams one thread can recognise with time to spare; the faster of two runs counts."""
        return max(int(_SHARE / min(self._decode_speech(_MEASURED_STREAMS, _MEASURED_S) for _ in range(2))), 1)

    def prepare(self, capacity: int) -> None:
        """Make onnxruntime allocate its memory, then measure the costs. The faster of two runs counts.

        onnxruntime keeps the memory that a call needed, and doubles it when a later call needs more. Without the
        largest possible batch, memory would grow when many streams are first decoded together, perhaps after hours.
        """
        self._decode_speech(min(capacity, MAX_BATCH), _MEASURED_S)
        if self._is_greedy:
            return
        vocabulary = self.recognizer.vocabulary
        written = (symbol.strip(WORD_BOUNDARY + " ") for symbol in vocabulary.symbols if not is_special(symbol))
        hotwords = ContextGraph(list(islice(filter(None, written), _MEASURED_HOTWORDS)), vocabulary)
        beams = (self.beam_size, max(self.beam_size, MOST_BEAM))
        kinds = [(beam_size, graph) for graph in (None, hotwords) for beam_size in beams]
        rounds = [[self._decode_speech(2, _MEASURED_S / 2, *kind) for kind in kinds] for _ in range(2)]
        plain, *others = (min(each) for each in zip(*rounds, strict=True))
        self.costs = (1.0, *(max(seconds / plain, 1.0) for seconds in others))

    def _decode_speech(
        self, num_streams: int, speech_s: float, beam_size: int | None = None, hotwords: ContextGraph | None = None
    ) -> float:
        """Decode the demo's clips, or noise, in several streams; return the seconds of work per second of audio."""
        rate = self.recognizer.bundle.manifest.features.sample_rate
        clips = [read_audio(clip, rate) for clip in sorted((DEMO_FOLDER / "clips").glob("*.flac"))]
        noise = np.random.default_rng(0).normal(0, 0.1, round(_MEASURED_S * rate)).astype(np.float32)
        samples = np.resize(np.concatenate(clips) if clips else noise, round(speech_s * rate))
        options = self.stream_options if beam_size is None else replace(self.stream_options, beam_size=beam_size)
        streams = [self.recognizer.create_stream(options, hotwords=hotwords) for _ in range(num_streams)]
        begin = time.perf_counter()
        for start in range(0, len(samples), rate // 5):
            for stream in streams:
                stream.accept_waveform(rate, samples[start : start + rate // 5])
            self.recognizer.decode_streams(streams)
        for stream in streams:
            stream.input_finished()
        self.recognizer.decode_streams(streams)
        return (time.perf_counter() - begin) / (len(streams) * len(samples) / rate)

    def check_language(self, language: Any) -> None:
        """Raise RequestError if the model is known not to support the language of a request: "en", or "en-GB"."""
        if language and self.languages and str(language).partition("-")[0].lower() not in self.languages:
            told = f"the model supports {' and '.join(self.languages)}, not the language {language!r:.80}"
            raise RequestError(told, "language", "unsupported_language")

    async def decoding(
        self, default: DecodingOptions, given: Mapping[str, Any], *, prompt: str = ""
    ) -> tuple[DecodingOptions, ContextGraph | None]:
        """Return the decoding options and hotwords of a request. Raises RequestError with the name of a wrong value.

        A value of None in `given` stands for the default. Phrases in `prompt`, between commas, semicolons or line ends,
        are used as hotwords if `given` has neither hotwords nor a grammar. It ignores phrases that it cannot spell.
        """
        changes: dict[str, Any] = {}
        for name, (field, declared) in client_options_of(DecodingOptions).items():
            if name == "grammar" and given.get(name) is not None:
                changes |= {field: self._grammar(given[name]), "language_model": NONE}
            elif given.get(name) is not None:
                with refusing():
                    changes[field] = declared.checked(name, given[name])
        if "text_format" in changes:
            changes["text_format"] = (default.text_format or TextFormat()) if changes["text_format"] else None
        if changes.get("language_model", NONE) != NONE:
            changes["language_model"] = await self._language_model(round(changes["language_model"], 1))
        hotwords = given.get("hotwords")
        prompted = (phrase.strip(_EDGES) for phrase in _SEPARATORS.split("" if "grammar" in changes else prompt))
        words = await (self._hotwords(hotwords) if hotwords is not None else self.writable_hotwords(prompted))
        options = replace(default, **changes)
        if "grammar" in changes:
            with refusing("grammar"):  # builds and caches the grammar outside the event loop
                graph = (await in_thread(partial(self.recognizer.create_stream, options, hotwords=words))).state.grammar
                if graph and (graph.num_choices > _MOST_CHOICES or graph.num_places > _MOST_PLACES):
                    most = f"{_MOST_PLACES} characters, with its slots, and {_MOST_CHOICES} ways to go on after them"
                    raise ValueError(f"a grammar may have at most {most}")
        return options, words

    def cost(self, options: DecodingOptions, hotwords: ContextGraph | None) -> float:
        """Return an upper bound on a stream's cost, relative to a plain stream: linear between the measured beam sizes.

        The real cost grows more slowly at first. A language model adds no cost: plain streams use it too, so their
        measured cost includes it. A stream without it (`lm_weight` 0) does not count as cheaper.
        """
        least, most = self.costs[:2] if hotwords is None and options.grammar is None else self.costs[2:]
        wider = max((options.beam_size or self.beam_size) - self.beam_size, 0)
        return least + (most - least) * min(wider / max(MOST_BEAM - self.beam_size, 1), 1.0)

    async def _language_model(self, weight: float) -> LanguageModelOptions | Literal["none"]:
        """Return the language model with the given weight, prepared outside the event loop; "none" for weight 0."""
        chosen = self.recognizer.language_model
        if chosen is None or self._is_greedy:
            raise RequestError(f"the model {self.name} has no language model on this server", "lm_weight")
        if not weight:
            return NONE
        async with self._preparing:
            if (found := self._weighted.get(weight)) is None:
                for let_go in (self._kept.clear, gc.collect):  # closed streams may be in reference cycles
                    if len(self._weighted) >= _MOST_WEIGHTS:
                        let_go()
                if len(self._weighted) >= _MOST_WEIGHTS:
                    raise UnavailableError(f"the server is full: {_MOST_WEIGHTS} other values of lm_weight are in use")
                found = replace(chosen, weight=weight)
                await in_thread(self.recognizer.create_stream, replace(self.stream_options, language_model=found))
                self._weighted[weight] = found
                self._kept.append(found)
            return found

    def _grammar(self, value: Any) -> Grammar:
        """Convert a JSON value to a grammar, and check it against the limits."""
        if self._is_greedy:
            raise RequestError("a grammar needs beam search, which this server does not use", "grammar")
        with refusing("grammar"):
            grammar = Grammar(lines=value, most_steps=_MOST_STEPS)
        if len(self.shortened(grammar.lines)) < len({*grammar.lines}):
            most = f"{self._limits.hotwords} phrases, {self._limits.hotword_letters} characters in total"
            told = f"a grammar may have at most {most} and {LONGEST_PHRASE} characters per phrase"
            raise RequestError(told, "grammar")
        return grammar

    async def restricted(self, phrases: Sequence[str]) -> DecodingOptions | None:
        """Return options that restrict streams to spellable phrases within the limits. None: greedy, or none left."""
        kept = await self._spellable([phrase for phrase in self.shortened(phrases) if not _SYNTAX.search(phrase)])
        lines = [*kept, *[UNKNOWN] * (UNKNOWN in phrases)]
        return (await self.decoding(self.stream_options, {"grammar": lines}))[0] if kept else None

    async def _hotwords(self, value: Any) -> ContextGraph | None:
        """Return the hotwords in a JSON value, or None for an empty list."""
        if value and self._is_greedy:
            raise RequestError("hotwords need beam search, which this server does not use", "hotwords")
        if not isinstance(value, list):
            raise RequestError(f"hotwords must be a list, got {type(value).__name__}", "hotwords")
        if len(value) > self._limits.hotwords:
            raise RequestError(f"at most {self._limits.hotwords} hotwords are allowed, got {len(value)}", "hotwords")
        phrases: list[str | tuple[str, float]] = []
        for item in value:
            match item:
                case str():
                    phrases.append(item)
                case [str() as text, int() | float() as weight] if not isinstance(weight, bool):
                    phrases.append((text, weight))
                case _:
                    raise RequestError(f"a hotword must be a phrase or [phrase, weight], got {item!r:.80}", "hotwords")
        num_letters = sum(len(each if isinstance(each, str) else each[0]) for each in phrases)
        if num_letters > (most := self._limits.hotword_letters):
            raise RequestError(f"hotwords may have at most {most} characters in total, got {num_letters}", "hotwords")
        with refusing("hotwords"):
            return await in_thread(ContextGraph, phrases, self.recognizer.vocabulary) if phrases else None

    def shortened(self, phrases: Iterable[str]) -> list[str]:
        """Return the distinct phrases that fit the limits on their number and length."""
        kept, left = [], self._limits.hotword_letters
        for phrase in islice(dict.fromkeys(phrases), self._limits.hotwords):
            if len(phrase) <= min(left, LONGEST_PHRASE):
                kept.append(phrase)
                left -= len(phrase)
        return kept

    async def writable_hotwords(self, phrases: Iterable[str]) -> ContextGraph | None:
        """Return hotwords for the spellable phrases within the limits. None: greedy search, or no phrase is left."""
        kept = await self._spellable(self.shortened(filter(None, phrases)))
        return await in_thread(ContextGraph, kept, self.recognizer.vocabulary) if kept else None

    async def _spellable(self, phrases: Sequence[str]) -> list[str]:
        """Return the phrases that the tokens can spell. In greedy search, which cannot use phrases, there are none."""
        return [] if self._is_greedy or not phrases else await in_thread(writable, phrases, self.recognizer.vocabulary)


def languages_of(symbols: Sequence[str]) -> list[str]:
    """Return which languages of WeNet's models ("zh", "en") have characters in symbols other than `<NAME>`."""
    text = "".join(symbol for symbol in symbols if not symbol.startswith("<"))
    return [code for code, letters in (("zh", "[\u4e00-\u9fff]"), ("en", "[A-Za-z]")) if re.search(letters, text)]
