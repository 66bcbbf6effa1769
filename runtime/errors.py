"""The error tree: all errors that u2moe raises deliberately, except ValueError and TypeError for invalid arguments.

U2moeError
├── AlignmentError           a text that cannot be aligned with its recording
├── AudioError               audio that cannot be read or used
│   ├── AudioOverflowError   audio that arrives faster than it is recognised, and was not accepted
│   ├── TruncatedAudioError  a truncated file; raised after its last samples
│   └── MicrophoneError      a microphone that cannot be opened or has stopped, or sounddevice is not installed
├── BundleError              an incomplete or damaged bundle, or not a bundle
│   ├── IntegrityError       a file differs from the digest in the manifest
│   └── SignatureError       a bundle that nobody signed whose public key was demanded
├── KernelsError             native kernels that are not installed, or cannot run a bundle here
├── CheckpointError          a checkpoint directory that cannot be read
│   └── UnsupportedError     a valid checkpoint of a kind that is not supported
├── CorpusError              a list of recordings that cannot be read, or a folder of results that cannot be used
├── GrammarError             a grammar that cannot be read or used; a ValueError, too
├── LanguageModelError       a file that is not a language model, or a damaged one
├── ParityError              a graph differs from the network it was exported from
├── QuantizationError        a quantized bundle with a larger loss of accuracy than allowed; carries the report
├── ProviderError            an execution provider that is not installed, has failed or computes wrongly
└── StreamError              a stream used after its end, or for something its bundle does not support

AudioWarning and BundleWarning are UserWarnings: audio or a bundle that is usable, but may not do what was intended.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

__all__ = [
    "AlignmentError",
    "AudioError",
    "AudioOverflowError",
    "AudioWarning",
    "BundleError",
    "BundleWarning",
    "CheckpointError",
    "CorpusError",
    "GrammarError",
    "IntegrityError",
    "KernelsError",
    "LanguageModelError",
    "MicrophoneError",
    "ParityError",
    "ProviderError",
    "QuantizationError",
    "SignatureError",
    "StreamError",
    "TruncatedAudioError",
    "U2moeError",
    "UnsupportedError",
]


class U2moeError(Exception):
    """Base class of all errors of this project. All can be pickled, to reach the parent of a worker process."""

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is recreated from its message alone, which fails if its class requires more.
        return _restored, (type(self), self.args), self.__dict__


def _restored(kind: type[U2moeError], args: tuple[Any, ...]) -> U2moeError:
    """An error created without `__init__`: pickle then sets its attributes."""
    return kind.__new__(kind, *args)


class AlignmentError(U2moeError):
    """A text that cannot be aligned with its recording: names the words that cannot be written, or what is missing."""


class AudioError(U2moeError):
    """Audio that cannot be read or used; names the file or the property."""


class AudioOverflowError(AudioError):
    """Audio arrived faster than it is recognised and was not accepted; states how many seconds.

    Attributes:
        duration: seconds that were not accepted; 0 if only the audio system knows.
    """

    def __init__(self, message: str, duration: float) -> None:
        super().__init__(message)
        self.duration = duration


class TruncatedAudioError(AudioError):
    """A truncated file; raised after its last samples. Names the file and the evidence."""


class MicrophoneError(AudioError):
    """A microphone cannot be opened or has stopped, or its Python package is not installed."""


class BundleError(U2moeError):
    """A bundle that is incomplete, damaged, of another version, or not a bundle; names the file and the field."""


class IntegrityError(BundleError):
    """A file of a bundle differs from the digest in its manifest."""


class SignatureError(BundleError):
    """A bundle is not signed by a key that was demanded; names the file, its signers, and who was expected."""


class KernelsError(U2moeError):
    """Native kernels were requested, but are not installed or cannot run here; says what to install."""


class CheckpointError(U2moeError):
    """A checkpoint that cannot be read; names the file, the key, what was found and what was expected."""


class UnsupportedError(CheckpointError):
    """A checkpoint of a kind that is not supported; names the key, its value and what is supported."""


class CorpusError(U2moeError):
    """A list of recordings that cannot be read, or a folder of results that cannot be used; names file and line."""


class GrammarError(U2moeError, ValueError):
    """A grammar that cannot be read or used; names the phrase, the slot, what was found and what was expected."""


class ParityError(U2moeError):
    """A graph differs from torch by more than the limit; names the tensor, the largest difference and the limit."""


class LanguageModelError(U2moeError):
    """A file that is not a language model, or a damaged one; names the file, the line or part, and what was found."""


class ProviderError(U2moeError):
    """An execution provider that is not installed, failed, or would compute a bundle wrongly; says what would do."""


class QuantizationError(U2moeError):
    """A quantized bundle has a larger loss of accuracy than allowed.

    Attributes:
        report: the measurements, in the form of `report.json`; None if there are none yet.
    """

    def __init__(self, message: str, report: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.report = report


class StreamError(U2moeError):
    """A stream was used after its end, or for something its bundle does not support."""


class AudioWarning(UserWarning):
    """Audio that is usable, but may not be what was intended: unfinished, truncated, or with channels that cancel."""


class BundleWarning(UserWarning):
    """A bundle of a newer version of u2moe, which says something that this one does not know and can do without."""


@contextlib.contextmanager
def handing_warnings_to(take: Callable[[str], object]) -> Iterator[None]:
    """Call `take` with the text of every AudioWarning and BundleWarning; other warnings are shown as usual."""
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
