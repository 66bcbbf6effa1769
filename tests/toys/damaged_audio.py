"""Clips in many formats with changed bytes, recognised or decoded: sound files, and media files."""

import contextlib
import io
import itertools
import tempfile

import numpy as np
import soundfile
from damage import damaged, one_of
from media import LAYOUTS, add_track, encode

from u2moe.runtime.audio.decoder import DecoderError
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


def use_damaged_audio(recognizer, clip, file, *, media):
    """Return a function that recognises a damaged sound or media file, and reports if it was "accepted" or "partly"
    read."""
    rate = recognizer.bundle.manifest.features.sample_rate
    pairs, make = (CONTAINERS, encoded_media) if media else (FORMATS, encoded)
    originals = [make(clip, rate, *pair) for pair in pairs]

    def use(random):
        file.write_bytes(damaged_audio(originals, random))
        return "accepted" if recognizer.transcribe(file).complete else "partly"

    return use


def use_damaged_uploads(clip, rate, decoder):
    """Return a function that decodes a damaged file, of any format and up to eight channels, in a separate process. It
    reports whether the file was "accepted" or "partly" read, or how the process ended."""
    originals = []
    for num_channels, make in itertools.product(LAYOUTS, (encoded, encoded_media)):
        for pair in FORMATS if make is encoded else CONTAINERS + MORE_CONTAINERS:
            with contextlib.suppress(av.FFmpegError, soundfile.SoundFileError, ValueError):  # no such pair
                originals.append(make(np.repeat(clip[:, None], num_channels, axis=1), rate, *pair))

    def use(random):
        try:
            decoded = list(decoder.read(io.BytesIO(damaged_audio(originals, random)), "upload", rate))
        except DecoderError as error:
            return str(error)
        except TruncatedAudioError:
            return "partly"
        assert all(np.isfinite(samples).all() for samples in decoded)
        return "accepted"

    return use


def encoded(clip, rate, file_format, subtype):
    """Return a clip as a file; libsndfile draws the serial numbers of Ogg streams itself."""
    with tempfile.TemporaryFile() as file:
        soundfile.write(file, clip, rate, subtype=subtype, format=file_format)
        file.seek(0)
        return file.read()


def encoded_media(clip, rate, container_format, codec):
    """Return a clip [n] or [n, channels] as a media file."""
    content = io.BytesIO()
    with av.open(content, "w", format=container_format) as container:
        encode(container, add_track(container, codec, RATES.get(codec, 44_100), clip), clip, rate)
    return content.getvalue()


def damaged_audio(originals, random):
    """Return one of the files with some bytes changed, or random bytes."""
    if random.random() < 0.02:
        return random.bytes(random.integers(0, 5000))
    return damaged(one_of(originals, random), random)
