"""Features of recordings for calibration: stored in a file, cut into pieces, and divided by purpose."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from u2moe.quantize.comparison import DOUBT, Array, share_of
from u2moe.quantize.features import FORMAT, KEPT, features_of, read_features
from u2moe.quantize.goals import Goal
from u2moe.quantize.observed import LeanSettings
from u2moe.quantize.recipes import LONGEST_S, Recipe
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.decoding.ctc import ctc_greedy_search
from u2moe.runtime.errors import AudioError
from u2moe.runtime.whole_file import write_bytes

CHOSEN_S, JUDGED_S = 120, 1800
"""Maximum seconds of the recordings for choosing formats, and of those for judging bundles."""
PIECE_S, SHORT_PIECE_S, NUM_PIECES = 20, 5, 8
"""Recordings longer than `PIECE_S` seconds are cut into equal pieces of at most this length. If that yields fewer than
`NUM_PIECES` pieces, the pieces are made shorter, down to `SHORT_PIECE_S` seconds."""


@dataclass(frozen=True, kw_only=True)
class Audio:
    """Features [frames, mel] of recordings or their pieces.

    Attributes:
        calibrates: pieces that determine how layers are scaled and rounded.
        chooses: pieces on which the damage of each layer is measured, in order to choose formats.
        judges: pieces on which written bundles are compared with the float32 bundle. If the `Goal` limits damage, size
            or time, these pieces differ from `chooses`. Otherwise, they equal `chooses`, and `calibrates` contains them
            if the audio is shorter than four minutes in total.
        seconds: total duration of the pieces in `calibrates`.
    """

    calibrates: Sequence[Array]
    chooses: Sequence[Array]
    judges: Sequence[Array]
    seconds: float


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


def read_audio(bundle: Bundle, recipe: Recipe, goal: Goal) -> Audio:
    """Read the recordings of a recipe and divide them, in order, among the purposes in `Audio`.

    If the goal has limits that are met by choosing formats, the first quarter of the audio (at most `CHOSEN_S` seconds)
    is used to choose formats. Half of the rest is used to judge bundles, and the other half to calibrate. At most
    `LONGEST_S` seconds are used to calibrate; the surplus is also used to judge.

    Raises:
        AudioError: a recording cannot be read, all recordings are too short for the encoder, or those for judging have
            too few tokens to show that a limit on damage is met.
    """
    frames_s = 1000 / bundle.manifest.features.frame_shift_ms
    read_s = LONGEST_S + (CHOSEN_S + JUDGED_S if goal.searched else 0)
    features = features_of(bundle, recipe.calibration, limit=round(read_s * frames_s))
    if not features:
        raise AudioError(f"calibration: {recipe.calibration[0]} and all other recordings are too short for the encoder")
    total, first = sum(map(len, features)), round(CHOSEN_S * frames_s)
    longest = round(min(max(total / NUM_PIECES, SHORT_PIECE_S * frames_s), PIECE_S * frames_s))
    pieces = [piece for frames in features for piece in np.array_split(frames, math.ceil(len(frames) / longest))]
    if not goal.searched:
        chooses, others = _divided(pieces, first)
        calibrates = others if sum(map(len, others)) >= first else pieces
        return Audio(calibrates=calibrates, chooses=chooses, judges=chooses, seconds=_seconds(calibrates, frames_s))
    chooses, others = _divided(pieces, min(first, total / 4))
    rest = sum(map(len, others))
    judges, calibrates = _divided(others, max(rest / 2, rest - LONGEST_S * frames_s))
    if goal.max_damage is not None:
        _check_length(bundle, judges, goal.max_damage, total / frames_s)
    return Audio(
        calibrates=calibrates or chooses, chooses=chooses, judges=judges or chooses,
        seconds=_seconds(calibrates or chooses, frames_s),
    )  # fmt: skip


def _check_length(bundle: Bundle, judges: Sequence[Array], limit: float, total_s: float) -> None:
    """Raise AudioError if the recordings have too few tokens to show that a limit is met.

    The check assumes that no token changes.
    """
    model = bundle.load(LeanSettings())
    found = sum(len(ctc_greedy_search(model.ctc(model.encode(frames))).tokens) for frames in judges)
    needed = math.ceil(share_of(np.zeros(1), np.ones(1), DOUBT).high / limit)
    if found < needed:
        more = f"; use about {total_s * needed / found:.0f} s of such recordings" if found else ""
        raise AudioError(
            f"calibration: {total_s:.0f} s of recordings cannot show that at most {limit:.2%} of the tokens change: "
            f"the part reserved for judging bundles has {found} tokens, but needs at least {needed}{more}"
        )


def _divided(pieces: Sequence[Array], limit: float) -> tuple[list[Array], list[Array]]:
    """Split `pieces` after the first ones that together have at least `limit` frames. Return both parts."""
    first: list[Array] = []
    for piece in pieces:
        if sum(map(len, first)) >= limit:
            break
        first.append(piece)
    return first, list(pieces[len(first) :])


def _seconds(pieces: Sequence[Array], frames_s: float) -> float:
    return sum(map(len, pieces)) / frames_s
