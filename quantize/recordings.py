"""Features of recordings: computed, stored in files, and for calibration cut into pieces and divided by purpose."""

import io
import json
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from u2moe.quantize.arithmetic import Array
from u2moe.quantize.comparison import DOUBT, share_of
from u2moe.quantize.observed import LeanSettings
from u2moe.quantize.recipes import LONGEST_S, Goal, Recipe
from u2moe.runtime.audio.reading import read_blocks
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.decoding.ctc import ctc_greedy_search
from u2moe.runtime.errors import AudioError
from u2moe.runtime.model.features import FeatureStream
from u2moe.runtime.whole_file import write_bytes

KEPT, FORMAT = ".npz", "u2moe calibration 1"  # suffix and format name of the files that `keep_calibration` writes
CHOSEN_S, JUDGED_S = 120, 1800  # maximum seconds of recordings for choosing formats, and for judging bundles
PIECE_S, SHORT_PIECE_S, NUM_PIECES = 20, 5, 8
"""Recordings longer than `PIECE_S` seconds are cut into equal pieces of at most this length. If that yields fewer than
`NUM_PIECES` pieces, the pieces are made shorter, down to `SHORT_PIECE_S` seconds."""


def features_of(bundle: Bundle, files: Sequence[Path], limit: int = 6000) -> list[Array]:
    """Return the float32 features [frames, mel] of each audio file. Files too short for the encoder are skipped.

    Reading stops after `limit` frames in total. Raises AudioError if a file cannot be read.
    """
    return [frames for _, frames in read_features(bundle, files, limit)]


def read_features(
    bundle: Bundle, files: Sequence[Path], limit: int = 6000, *, is_noisy: bool = False
) -> list[tuple[Path, Array]]:
    """Return the files with their features, as in `features_of`. `is_noisy` adds noise of half a 16-bit step to audio.

    For a file written by `keep_calibration`, the recordings that it stores are returned.
    """
    random = np.random.default_rng(0) if is_noisy else None
    result: list[tuple[Path, Array]] = []
    for file in files:
        for name, found in _kept(bundle, file) if file.suffix == KEPT else [(file, None)]:
            if limit <= 0:
                return result
            frames = (_heard(bundle, file, limit, random) if found is None else found)[:limit]
            if len(frames) >= bundle.manifest.model.window:
                result.append((name, frames))
                limit -= len(frames)
    return result


def _heard(bundle: Bundle, file: Path, limit: int, random: np.random.Generator | None) -> Array:
    """Return at least the first `limit` frames of a file, or all if it has fewer; add noise if `random` is given."""
    config = bundle.manifest.features
    stream = FeatureStream(config)
    for block in read_blocks(file, config.sample_rate):
        heard = block if random is None else block + random.uniform(-0.5, 0.5, len(block)) / 2**15
        stream.accept(heard.astype(np.float32))
        if stream.num_ready >= limit:
            break
    return stream.take(stream.num_ready)


def _kept(bundle: Bundle, file: Path) -> Iterator[tuple[Path, Array]]:
    """Yield each recording's name and features from a calibration file for this bundle."""
    try:
        with file.open("rb") as stream, np.load(stream) as arrays:
            about, *features = (arrays[name] for name in arrays.files)
        about, shape = json.loads(str(about)), (bundle.manifest.model.feature_size,)
        are_features = [frames.dtype == np.float32 and frames.shape[1:] == shape for frames in features]
        names, owner, is_ours = about["recordings"], about["bundle"], about["format"] == FORMAT and all(are_features)
    except (OSError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise AudioError(f"{file}: cannot be read as a calibration file: {error}") from error
    if owner != bundle.fingerprint:
        raise AudioError(
            f"{file}: was made for bundle {owner[:16]}, expected {bundle.fingerprint[:16]} ({bundle.path})"
        )
    if not is_ours or len(names) != len(features):
        raise AudioError(f"{file}: is incomplete or was written by another version of u2moe")
    yield from zip(map(Path, names), features, strict=True)


def keep_calibration(bundle: str | os.PathLike[str], recordings: Sequence[Path], file: Path) -> None:
    """Write the features of recordings to a file that can replace the recordings in `Recipe.calibration`.

    The file can be used with any goal, but only for this bundle. It takes 32 kB per second of audio.
    Bundles quantized with the file are bit-identical to those quantized with the recordings.

    Args:
        bundle: folder of the float32 bundle.
        recordings: audio files.
        file: file to write; its name must end with ".npz".

    Raises:
        AudioError: a recording cannot be read, or all recordings are too short for the encoder.
    """
    if file.suffix != KEPT:
        raise ValueError(f"{file}: the name of a calibration file must end with {KEPT}")
    source = Bundle.open(bundle)
    frames_s = 1000 / source.manifest.features.frame_shift_ms
    found = read_features(source, recordings, round((LONGEST_S + CHOSEN_S + JUDGED_S) * frames_s))
    if not found:
        raise AudioError(f"calibration: {recordings[0]} and all other recordings are too short for the encoder")
    about = {"format": FORMAT, "bundle": source.fingerprint, "recordings": [path.name for path, _ in found]}
    content = io.BytesIO()
    np.savez(content, np.array(json.dumps(about)), *(frames for _, frames in found))
    write_bytes(file, content.getvalue())


@dataclass(frozen=True, kw_only=True)
class Audio:
    """Features [frames, mel] of recordings or their pieces, and their total duration in `calibrates` in seconds.

    If the `Goal` limits damage, size or time, `judges` differs from `chooses`. Otherwise, both are equal, and
    `calibrates` contains them if the audio is shorter than four minutes in total.
    """

    calibrates: Sequence[Array] = ()  # pieces that determine how layers are scaled and rounded
    chooses: Sequence[Array] = ()  # pieces on which the damage of each layer is measured, in order to choose formats
    judges: Sequence[Array] = ()  # pieces on which written bundles are compared with the float32 bundle
    seconds: float = 0.0


def read_audio(bundle: Bundle, recipe: Recipe, goal: Goal) -> Audio:
    """Read the recordings of a recipe and divide them, in order, among the purposes in `Audio`.

    If the goal has limits that are met by choosing formats, the first quarter of the audio (at most `CHOSEN_S` seconds)
    is used to choose formats. Half of the rest is used to judge bundles, and the other half to calibrate. At most
    `LONGEST_S` seconds are used to calibrate; the surplus is also used to judge.

    Raises AudioError if a recording cannot be read, all recordings are too short for the encoder, or those for judging
    have too few tokens to show that a limit on damage is met.
    """
    frames_s = 1000 / bundle.manifest.features.frame_shift_ms
    read_s = LONGEST_S + (CHOSEN_S + JUDGED_S if goal.searched else 0)
    features = features_of(bundle, recipe.calibration, limit=round(read_s * frames_s))
    if not features:
        raise AudioError(f"calibration: {recipe.calibration[0]} and all other recordings are too short for the encoder")
    total, first = sum(map(len, features)), round(CHOSEN_S * frames_s)
    longest = round(min(max(total / NUM_PIECES, SHORT_PIECE_S * frames_s), PIECE_S * frames_s))
    pieces = [piece for frames in features for piece in np.array_split(frames, math.ceil(len(frames) / longest))]
    chooses, others = _divided(pieces, min(first, total / 4) if goal.searched else first)
    rest = sum(map(len, others))
    if goal.searched:
        judges, calibrates = _divided(others, max(rest / 2, rest - LONGEST_S * frames_s))
        if goal.max_damage is not None:
            _check_length(bundle, judges, goal.max_damage, total / frames_s)
    else:
        judges, calibrates = chooses, others if rest >= first else pieces
    used = calibrates or chooses
    return Audio(calibrates=used, chooses=chooses, judges=judges or chooses, seconds=sum(map(len, used)) / frames_s)


def _check_length(bundle: Bundle, judges: Sequence[Array], limit: float, total_s: float) -> None:
    """Raise AudioError if the recordings have too few tokens to show that a limit is met even if no token changes."""
    model = bundle.load(LeanSettings())
    found = sum(len(ctc_greedy_search(model.ctc(model.encode(frames))).tokens) for frames in judges)
    needed = math.ceil(share_of(np.zeros(1), np.ones(1), DOUBT).high / limit)
    if found < needed:
        more = f"; use about {total_s * needed / found:.0f} s of such recordings" if found else ""
        raise AudioError(
            f"calibration: {total_s:.0f} s of recordings cannot show that at most {limit:.2%} of the tokens change: "
            f"the part reserved for judging bundles has {found} tokens, but needs at least {needed}{more}"
        )


def _divided(pieces: Sequence[Array], limit: float) -> tuple[Sequence[Array], Sequence[Array]]:
    """Split `pieces` after the first ones that together have at least `limit` frames. Return both parts."""
    ends = np.cumsum([0, *map(len, pieces)])
    number = int(np.searchsorted(ends, limit))
    return pieces[:number], pieces[number:]
