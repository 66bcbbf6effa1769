"""Exceptions and warnings of u2moe. Invalid arguments raise ValueError or TypeError instead."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any


class U2moeError(Exception):
    """Base class of all exceptions of u2moe. They can be pickled, so worker processes can pass them to the parent."""

    def __reduce__(self) -> tuple[Any, ...]:
        # By default, pickle calls the class with only the message. This fails if `__init__` takes more arguments.
        return type(self).__new__, (type(self), *self.args), self.__dict__


class AlignmentError(U2moeError):
    """A text that cannot be aligned with its recording. The message names the cause, such as unknown words."""


class AudioError(U2moeError):
    """Audio that cannot be read or used. The message names the file or the property."""


class AudioOverflowError(AudioError):
    """Audio that was rejected because it arrived faster than it was recognised. The message states how much, if known.

    Attributes:
        duration: seconds of rejected audio; 0 if unknown.
    """

    def __init__(self, message: str, duration: float) -> None:
        super().__init__(message)
        self.duration = duration


class TruncatedAudioError(AudioError):
    """A truncated file. Raised after its last samples. The message names the file and the evidence."""


class MicrophoneError(AudioError):
    """A microphone that cannot be opened, that has stopped, or whose Python package is not installed."""


class BundleError(U2moeError):
    """An incomplete, damaged or incompatible bundle, or not a bundle. The message names the file and the field."""


class IntegrityError(BundleError):
    """A bundle file that does not match its digest in the manifest."""


class SignatureError(BundleError):
    """A bundle not signed with any of the required keys. The message names the file and the signers."""


class KernelsError(U2moeError):
    """Native kernels that were requested, but are missing or cannot run here. The message names a missing package."""


class CheckpointError(U2moeError):
    """A checkpoint that cannot be read. The message names the file, the key, the value found and the value expected."""


class UnsupportedError(CheckpointError):
    """A checkpoint or bundle that is not supported. The message states what is not supported."""


class CorpusError(U2moeError):
    """An unreadable list of recordings, or an unusable folder of results. The message names it and perhaps the line."""


class GrammarError(U2moeError, ValueError):
    """A grammar that cannot be read or used. The message names the phrase or slot, what was found and expected."""


class ParityError(U2moeError):
    """A graph whose outputs differ too much from those of its original. The message states what differs and how far."""


class LanguageModelError(U2moeError):
    """A damaged language model, or a file that is not one. The message names the file and, if known, the line."""


class ProviderError(U2moeError):
    """A provider that is missing, has failed, or would compute wrong results. The message suggests another provider."""


class QuantizationError(U2moeError):
    """A quantized bundle that would be larger or less accurate than allowed, or numbers that are not finite.

    Attributes:
        report: the measurements, in the format of `report.json`; None if nothing was measured yet.
    """

    def __init__(self, message: str, report: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.report = report


class StreamError(U2moeError):
    """A stream used after its end, or in a way that its bundle does not support."""


class AudioWarning(UserWarning):
    """Audio that is usable, but perhaps not as intended: unfinished, truncated, or with channels that cancel out."""


class BundleWarning(UserWarning):
    """A bundle written by a newer version of u2moe, with fields that this version does not know but can ignore."""


@contextlib.contextmanager
def handing_warnings_to(take: Callable[[str], object]) -> Iterator[None]:
    """Call `take` with the text of each AudioWarning or BundleWarning from the block; show others as usual."""
    with warnings.catch_warnings():
        for kind in (AudioWarning, BundleWarning):
            warnings.simplefilter("always", kind)
        show = warnings.showwarning

        def show_or_take(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, AudioWarning | BundleWarning):
                take(str(message))
            else:
                show(message, category, *where, **more)

        warnings.showwarning = show_or_take
        yield
