"""The error tree: every error that u2moe raises on purpose, apart from ValueError and TypeError for bad arguments.

U2moeError
├── AudioError               audio that cannot be read or used
│   ├── AudioOverflowError   audio that comes faster than it is recognised, and was not taken
│   ├── TruncatedAudioError  a file that was cut off; raised after its last samples
│   └── MicrophoneError      a microphone that cannot be opened, or has stopped; or sounddevice is not installed
├── BundleError              a bundle that is incomplete, damaged, or not one
│   └── IntegrityError       a file differs from the digest in the manifest
├── CheckpointError          a checkpoint directory that cannot be read
│   └── UnsupportedError     a checkpoint that is whole, but of a kind that is not supported
├── ParityError              a graph differs from the network it was exported from
├── QuantizationError        a quantized bundle that loses more words than allowed; carries the report
├── ProviderError            an execution provider that is not installed, or that failed
└── StreamError              a stream used after its end, or asked for what its bundle cannot do

AudioWarning is a UserWarning: audio that can be used, but may not be what was meant.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "AudioError",
    "AudioOverflowError",
    "AudioWarning",
    "BundleError",
    "CheckpointError",
    "IntegrityError",
    "MicrophoneError",
    "ParityError",
    "ProviderError",
    "QuantizationError",
    "StreamError",
    "TruncatedAudioError",
    "U2moeError",
    "UnsupportedError",
]


class U2moeError(Exception):
    """Base of all errors of this project. All can be pickled, so that they reach the parent of a worker process."""

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is otherwise made again by its class of its message alone, which fails where more is required.
        return _restored, (type(self), self.args), self.__dict__


def _restored(kind: type[U2moeError], args: tuple[Any, ...]) -> U2moeError:
    """An error without its `__init__`: pickle sets its attributes next."""
    return kind.__new__(kind, *args)


class AudioError(U2moeError):
    """Audio that cannot be read or used; names the file or the property."""


class AudioOverflowError(AudioError):
    """Audio that came faster than it is recognised, and was not taken; names its seconds.

    Attributes:
        duration: seconds that were not taken; 0 where only the audio system knows.
    """

    def __init__(self, message: str, duration: float) -> None:
        super().__init__(message)
        self.duration = duration


class TruncatedAudioError(AudioError):
    """A file that was cut off; raised after its last samples. Names the file, and what shows it."""


class MicrophoneError(AudioError):
    """A microphone that cannot be opened, or has stopped; or its Python package is not installed."""


class BundleError(U2moeError):
    """A bundle that is incomplete, damaged, of another version, or not a bundle; names the file and the field."""


class IntegrityError(BundleError):
    """A file of a bundle differs from the digest in its manifest."""


class CheckpointError(U2moeError):
    """A checkpoint that cannot be read; names the file, the key, what was found and what was expected."""


class UnsupportedError(CheckpointError):
    """A checkpoint of a kind that is not supported; names the key, its value and what is supported."""


class ParityError(U2moeError):
    """A graph differs from torch by more than the limit; names the tensor, the largest difference and the limit."""


class ProviderError(U2moeError):
    """An execution provider that is not installed or failed; names those that are installed."""


class QuantizationError(U2moeError):
    """A quantized bundle loses more words than allowed.

    Attributes:
        report: what was measured, as `report.json` would hold it.
    """

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report


class StreamError(U2moeError):
    """A stream was used after its end, or asked for what its bundle cannot do."""


class AudioWarning(UserWarning):
    """Audio that can be used, but may not be what was meant: unfinished, cut off, or with channels that cancel."""
