import runpy
from pathlib import Path

import numpy as np
import soundfile

from u2moe.runtime import bundle_location

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_live_captions(bundle, sound, tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "talk.wav", np.tile(sound, 6), 16_000)
    monkeypatch.setattr(bundle_location, "DEMO_FOLDER", bundle.path)
    runpy.run_path(str(EXAMPLES / "live_captions.py"))["main"](str(tmp_path / "talk.wav"), bundle.tokens[5])
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) >= 2  # 24 seconds of noise without a pause, at most 15 in each
    assert all(float(start) < float(end) <= 24 for start, end, _ in lines)
    assert [float(line[0]) for line in lines] == sorted(float(line[0]) for line in lines)
