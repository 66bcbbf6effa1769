"""Clips in many formats with changed bytes, recognised or decoded: sound files, and media files."""

import contextlib
import io
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
from damage import damaged, one_of
from media import LAYOUTS

from u2moe.runtime import Recognizer
from u2moe.runtime.audio.decoder import DecoderError, FileDecoder
from u2moe.runtime.errors import TruncatedAudioError

with contextlib.suppress(ModuleNotFoundError):  # an optional dependency
    import av

RATES = {"libopus": 48_000, "libopencore_amrnb": 8000}
"""Codecs with a fixed rate."""

FORMATS = (("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "ULAW"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"),
           ("AIFF", "PCM_24"), ("MP3", "MPEG_LAYER_III"), ("CAF", "PCM_16"), ("W64", "PCM_16"),
           ("OGG", "OPUS"), ("AU", "PCM_16"), ("WAV", "IMA_ADPCM"))  # fmt: skip
CONTAINERS = (("mp4", "aac"), ("mp4", "alac"), ("mov", "pcm_s16le"), ("adts", "aac"), ("matroska", "libmp3lame"),
              ("webm", "libopus"), ("asf", "wmav2"), ("avi", "pcm_u8"), ("flv", "aac"), ("mpegts", "aac"),
              ("3gp", "aac"), ("ac3", "ac3"))  # fmt: skip
MORE_CONTAINERS = (("aiff", "pcm_s16be"), ("amr", "libopencore_amrnb"), ("au", "pcm_s16be"), ("caf", "alac"),
                   ("caf", "pcm_s16le"), ("dts", "dca"), ("eac3", "eac3"), ("flac", "flac"), ("ipod", "aac"),
                   ("latm", "aac"), ("matroska", "aac"), ("matroska", "flac"), ("matroska", "pcm_f32le"),
                   ("matroska", "truehd"), ("mov", "alac"), ("mp2", "mp2"), ("mp3", "libmp3lame"), ("mpeg", "mp2"),
                   ("mpegts", "ac3"), ("mxf", "pcm_s16le"), ("nut", "pcm_s24le"), ("ogg", "flac"), ("ogg", "libopus"),
                   ("ogg", "libvorbis"), ("rm", "ac3"), ("tta", "tta"), ("voc", "pcm_u8"), ("w64", "pcm_s16le"),
                   ("wav", "adpcm_ms"), ("wav", "pcm_s16le"), ("webm", "libvorbis"), ("wv", "wavpack"))  # fmt: skip
"""Further pairs; PyAV may not write all, or not for each number of channels."""
OTHER_BYTES = 0.02
"""Share of files that are random bytes."""


def use_damaged_audio(
    recognizer: Recognizer, clips: list[npt.NDArray[np.float32]], folder: Path
) -> Callable[[np.random.Generator], str]:
    """Return a function that recognises a damaged file, and reports whether it was "accepted" or "partly" read."""
    rate = recognizer.bundle.manifest.features.sample_rate
    originals = [encoded(clip, rate, *file_format) for clip in clips for file_format in FORMATS]
    return _use(recognizer, originals, folder / "audio")


def use_damaged_media(
    recognizer: Recognizer, clips: list[npt.NDArray[np.float32]], folder: Path
) -> Callable[[np.random.Generator], str]:
    """Return the same for media files; needs the extra [media]."""
    rate = recognizer.bundle.manifest.features.sample_rate
    originals = [encoded_media(clip, rate, *container) for clip in clips for container in CONTAINERS]
    return _use(recognizer, originals, folder / "media")


def use_damaged_uploads(
    clips: list[npt.NDArray[np.float32]], rate: int, decoder: FileDecoder
) -> Callable[[np.random.Generator], str]:
    """Return a function that decodes a damaged file, of any format and up to eight channels, in a separate process. It
    reports whether the file was "accepted" or "partly" read, or how the process ended."""
    originals = []
    for clip, num_channels in itertools.product(clips, LAYOUTS):
        samples = np.repeat(clip[:, None], num_channels, axis=1)
        for make, forms in ((encoded, FORMATS), (encoded_media, CONTAINERS + MORE_CONTAINERS)):
            for form in forms:
                with contextlib.suppress(av.FFmpegError, soundfile.SoundFileError, ValueError):  # no such pair
                    originals.append(make(samples, rate, *form))

    def use(random: np.random.Generator) -> str:
        try:
            samples = np.concatenate(
                [np.zeros(0, np.float32), *decoder.read(io.BytesIO(damaged_audio(originals, random)), "upload", rate)]
            )
        except DecoderError as error:
            return str(error)
        except TruncatedAudioError:
            return "partly"
        assert np.isfinite(samples).all()
        return "accepted"

    return use


def _use(recognizer: Recognizer, originals: Sequence[bytes], file: Path) -> Callable[[np.random.Generator], str]:
    def use(random: np.random.Generator) -> str:
        file.write_bytes(damaged_audio(originals, random))
        return "accepted" if recognizer.transcribe(file).complete else "partly"

    return use


def encoded(clip: npt.NDArray[np.float32], rate: int, file_format: str, subtype: str) -> bytes:
    """Return a clip as a file; libsndfile draws the serial numbers of Ogg streams itself."""
    with tempfile.TemporaryFile() as file:
        soundfile.write(file, clip, rate, subtype=subtype, format=file_format)
        file.seek(0)
        return file.read()


def encoded_media(clip: npt.NDArray[np.float32], rate: int, container_format: str, codec: str) -> bytes:
    """Return a clip [n] or [n, channels] as a media file."""
    content = io.BytesIO()
    layout = LAYOUTS[clip.size // len(clip)]
    with av.open(content, "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=RATES.get(codec, 44_100), layout=layout)
        assert isinstance(stream, av.AudioStream)
        stream.bit_rate = 12_200 if container_format == "amr" else 64_000
        codec_context = stream.codec_context
        resampler = av.AudioResampler(codec_context.format, layout, codec_context.rate)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(clip.reshape(1, -1)), format="flt", layout=layout)
        frame.rate = rate
        fifo = av.AudioFifo()
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            part.pts = None
            fifo.write(part)
        size = codec_context.frame_size or 1024
        while part := fifo.read(size) or fifo.read():
            container.mux(stream.encode(part))
        container.mux(stream.encode())
    return content.getvalue()


def damaged_audio(originals: Sequence[bytes], random: np.random.Generator) -> bytes:
    """Return one of the files with some bytes changed, or random bytes."""
    if random.random() < OTHER_BYTES:
        return random.bytes(int(random.integers(0, 5000)))
    return damaged(one_of(originals, random), random)
