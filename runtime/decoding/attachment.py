"""Puts a language model into a bundle, with the weights and the beam that it was tuned for."""

from __future__ import annotations

import dataclasses
import os

from u2moe.runtime.bundle.manifest import MANIFEST_FILE, BundledLanguageModel
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_writer import BundleWriter
from u2moe.runtime.decoding.fusion import Fusion
from u2moe.runtime.errors import BundleError, IntegrityError
from u2moe.runtime.language.compact import write_compact
from u2moe.runtime.language.model import LanguageModelOptions

LANGUAGE_MODEL_FILE = "language.lm"


def attach(
    folder: str | os.PathLike[str], model: LanguageModelOptions | None, *, beam_size: int | None = None
) -> Bundle:
    """Write a bundle anew in its place, with a language model in it. Its graphs stay as they are.

    Args:
        folder: the bundle.
        model: the language model and its weights; None: the bundle will have none.
        beam_size: default of `DecodingOptions.beam_size`; None: as before.

    Raises:
        BundleError: not a bundle, or the folder holds other files, which would be lost.
        LanguageModelError: the model does not fit the vocabulary.
        ValueError: the model has classes, or the beam is out of range.
    """
    bundle = Bundle.open(folder)
    kept, before = dict(bundle.manifest.files), bundle.manifest.decoding
    strangers = {file.name for file in bundle.path.iterdir()} - {MANIFEST_FILE, *kept}
    if strangers:
        raise BundleError(f"{bundle.path}: found {min(strangers)!r}, expected only its files: it is written anew")
    if before.language_model is not None:
        del kept[before.language_model.file]
    with BundleWriter(folder, overwrite=True) as staging:
        for name in kept:
            staging.add(name, bundle.path / name)
        language_model = None
        if model is not None:
            if model.classes:
                raise ValueError(f"classes: found {', '.join(model.classes)}, expected none: give them with --lm")
            Fusion(model, bundle.vocabulary).check_words("the language model")
            write_compact(model.model.ngrams, staging.path / LANGUAGE_MODEL_FILE)
            language_model = BundledLanguageModel(file=LANGUAGE_MODEL_FILE, **model.weights)
        decoding = dataclasses.replace(
            before, language_model=language_model, beam_size=before.beam_size if beam_size is None else beam_size
        )
        made = staging.seal(dataclasses.replace(bundle.manifest, decoding=decoding, files={}))
        for name, digest in kept.items():
            if made.manifest.files[name] != digest:
                raise IntegrityError(f"{bundle.path / name}: was replaced while it was being read: attach again")
        return staging.finish(made.manifest)
