"""Feed a transcriber with live audio from a microphone."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any, Protocol, Self

from u2moe.runtime.audio.arrays import Samples
from u2moe.runtime.errors import AudioError, AudioOverflowError, MicrophoneError, StreamError
from u2moe.runtime.installation import install_command
from u2moe.runtime.validation import checked_number


class _Recipient(Protocol):
    """The part of `Transcriber` that a microphone uses."""

    @property
    def sample_rate(self) -> float: ...  # preferred, in Hz

    def feed(self, sample_rate: float, samples: Samples) -> None: ...  # accepts samples [n] without waiting

    def report(self, error: Exception) -> None: ...


class Microphone:
    """An input device that feeds a transcriber, from `start` to `close` or within a `with` block.

    The device is opened at the model's sample rate if it supports that rate, otherwise at its own default rate. The
    audio callback never waits. Audio that the transcriber rejects is lost and counted. The transcriber's `on_error`
    receives an AudioOverflowError if the queue is full or the audio system loses audio, and a MicrophoneError if
    samples are invalid or the device disappears. Times in results do not count lost audio.

    Attributes:
        sample_rate: sample rate in Hz.
        num_overflows: number of gaps in the audio.
        lost_s: seconds of audio that the transcriber rejected. Audio that the audio system lost is not counted.

    Args:
        transcriber: the transcriber to feed. The caller closes it, after the microphone.
        device: index of an input device, or part of its name; None: the system's default. See `input_devices`.
        block_s: seconds of audio per call to `feed`.

    Raises:
        MicrophoneError: sounddevice or its PortAudio library is not installed, or the device does not exist.
    """

    def __init__(self, transcriber: _Recipient, *, device: int | str | None = None, block_s: float = 0.05) -> None:
        block_s = checked_number("block_s", block_s, above=0, most=1, unit="seconds")
        self._transcriber = transcriber
        self._sounddevice = _import_sounddevice()
        self._is_closed = False
        self._cause: AudioError | None = None
        self._cause_s = 0.0
        self.num_overflows = 0
        self.lost_s = 0.0
        settings: dict[str, Any] = {"device": device, "channels": 1, "dtype": "float32"}
        with _device_errors(self._sounddevice):
            self.sample_rate = transcriber.sample_rate
            try:
                self._sounddevice.check_input_settings(samplerate=self.sample_rate, **settings)
            except self._sounddevice.PortAudioError:  # the device does not support the rate, or does not exist
                self.sample_rate = float(self._sounddevice.query_devices(device, "input")["default_samplerate"])
            settings |= {"callback": self._on_audio, "finished_callback": self._finish}
            settings |= {"samplerate": self.sample_rate, "blocksize": round(self.sample_rate * block_s)}
            self._stream = self._sounddevice.InputStream(**settings)

    def start(self) -> None:
        """Start recording. Raise MicrophoneError if the device does not start, or the microphone is closed."""
        if self._is_closed:
            raise MicrophoneError("this microphone is closed: create a new one")
        with _device_errors(self._sounddevice):
            self._stream.start()

    def close(self) -> None:
        """Stop recording and release the device. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._stream.stop()
            self._stream.close()
            self._report_loss()

    @property
    def is_active(self) -> bool:
        """Whether the device is recording. False if the device has disappeared or the transcriber has ended."""
        with _device_errors(self._sounddevice):
            return not self._is_closed and bool(self._stream.active)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()  # Python does not call `__exit__` after an error here
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The methods below run in PortAudio's thread, which must not wait and in which exceptions are lost.

    def _on_audio(self, buffer: Samples, num_frames: int, _time: Any, status: Any) -> None:
        if status.input_overflow:
            self._lose(0.0, AudioOverflowError("the audio system dropped it before it was delivered", 0.0))
        try:
            self._transcriber.feed(self.sample_rate, buffer[:, 0])
        except StreamError:  # the transcriber is closed, or has ended and reported the reason
            raise self._sounddevice.CallbackStop from None
        except AudioError as error:  # the queue is full, or the samples are not finite
            self._lose(num_frames / self.sample_rate, error)
        else:
            if not status.input_overflow:
                self._report_loss()

    def _lose(self, seconds: float, cause: AudioError) -> None:
        if self._cause is None:
            self._cause = cause
            self.num_overflows += 1
        self._cause_s += seconds
        self.lost_s += seconds

    def _report_loss(self) -> None:
        """Report a gap when it is over, so that the queue never contains more reports than buffers."""
        if self._cause is None:
            return
        amount = f"{self._cause_s:.2f} s of audio" if self._cause_s else "audio"
        message = f"lost {amount} from the microphone: {self._cause}"
        is_overflow = isinstance(self._cause, AudioOverflowError)
        self._report(AudioOverflowError(message, self._cause_s) if is_overflow else MicrophoneError(message))
        self._cause, self._cause_s = None, 0.0

    def _finish(self) -> None:
        if not self._is_closed:
            self._report(MicrophoneError("the microphone has stopped: is it connected?"))

    def _report(self, error: AudioError) -> None:
        with contextlib.suppress(StreamError):  # the transcriber has ended and accepts no reports
            self._transcriber.report(error)


def input_devices() -> list[tuple[int, str]]:
    """Return each input device's index and name. Raise MicrophoneError if sounddevice or PortAudio is not installed."""
    sounddevice = _import_sounddevice()
    with _device_errors(sounddevice):
        return [(item["index"], item["name"]) for item in sounddevice.query_devices() if item["max_input_channels"]]


def _import_sounddevice() -> Any:
    try:
        return importlib.import_module("sounddevice")
    except ImportError as error:
        raise MicrophoneError(f"a microphone needs sounddevice: {install_command('microphone')}") from error
    except OSError as error:  # the Linux wheels do not include the PortAudio library
        raise MicrophoneError(f"sounddevice: {error}: install libportaudio2 (Debian) or portaudio") from error


@contextlib.contextmanager
def _device_errors(sounddevice: Any) -> Iterator[None]:
    try:
        yield
    except (sounddevice.PortAudioError, ValueError) as error:
        raise MicrophoneError(f"the microphone cannot be used: {error}") from error
