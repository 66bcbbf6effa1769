"""Prepares hotwords, language models and grammars for the vocabulary of a bundle."""

import functools
import weakref
from collections.abc import Mapping

from u2moe.runtime.bundle.manifest import MANIFEST_FILE
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.decoding.context import ContextGraph, Hotwords, parse_hotwords
from u2moe.runtime.decoding.fusion import Fusion
from u2moe.runtime.decoding.phrases import PhraseGraph
from u2moe.runtime.errors import BundleError
from u2moe.runtime.language.model import LanguageModelOptions
from u2moe.runtime.options import DefiniteOptions
from u2moe.runtime.text.grammar import Grammar


class SearchWords:
    """Language models and grammars that the streams of a bundle share."""

    def __init__(self, bundle: Bundle, blank: int) -> None:
        self._bundle = bundle
        self._blank = blank
        self._fusions: weakref.WeakKeyDictionary[LanguageModelOptions, Fusion] = weakref.WeakKeyDictionary()
        self._graphs: weakref.WeakKeyDictionary[Grammar, PhraseGraph] = weakref.WeakKeyDictionary()

    def context(self, hotwords: Hotwords | ContextGraph | None) -> ContextGraph | None:
        """Return the automaton of `hotwords`, or of the bundle's hotwords if `hotwords` is None."""
        vocabulary = self._bundle.vocabulary
        if hotwords is None:
            lines = self._bundle.manifest.decoding.hotwords
            try:
                return ContextGraph(parse_hotwords("\n".join(lines)), vocabulary) if lines else None
            except ValueError as error:
                raise BundleError(f"{self._bundle.path / MANIFEST_FILE}: decoding: hotwords: {error}") from error
        if isinstance(hotwords, ContextGraph):
            if hotwords.symbols != vocabulary.symbols:
                raise ValueError("hotwords are for the vocabulary of another bundle")
            return hotwords
        is_empty = isinstance(hotwords, list | tuple | Mapping) and not hotwords
        return None if is_empty else ContextGraph(hotwords, vocabulary)

    @functools.cached_property
    def language_model(self) -> LanguageModelOptions | None:
        """The bundle's language model, or None."""
        found = self._bundle.language_model() if self._bundle.manifest.decoding.language_model else None
        if found is not None:
            fusion = self._fusions[found] = Fusion(found, self._bundle.vocabulary)
            fusion.check_words(f"{self._bundle.path / MANIFEST_FILE}: decoding: language_model")
        return found

    def fusion(self, options: DefiniteOptions) -> Fusion | None:
        """Return the language model that the options select, prepared for the vocabulary; None: no language model."""
        chosen = options.language_model
        if isinstance(chosen, LanguageModelOptions) and chosen not in self._fusions:
            self._fusions[chosen] = Fusion(chosen, self._bundle.vocabulary)
        return self._fusions[chosen] if isinstance(chosen, LanguageModelOptions) else None

    def graph(self, options: DefiniteOptions, hotwords: object) -> PhraseGraph | None:
        """Return the automaton of the options' grammar, if any; raise ValueError if there are also hotwords."""
        chosen = options.grammar
        if chosen is None:
            return None
        if hotwords:
            raise ValueError("a grammar replaces hotwords: pass only one of them")
        if chosen not in self._graphs:
            self._graphs[chosen] = PhraseGraph(chosen, self._bundle.vocabulary, self._blank)
        return self._graphs[chosen]
