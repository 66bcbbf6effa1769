import json

import numpy as np
import pytest
import soundfile

from u2moe.benchmarks.soak import main


@pytest.mark.parametrize("num_streams", [5])
def test_a_short_soak(bundle, sound, tmp_path, capsys, num_streams):
    for number in range(2):
        soundfile.write(tmp_path / f"{number}.wav", np.roll(sound, 9000 * number), 16_000)
    # Ten seconds are too few to judge memory by: its verdict, the exit code, is not tested here.
    main([str(bundle.path), str(tmp_path), "--hours", str(10 / 3600), "--streams", str(num_streams)])
    report = json.loads(capsys.readouterr().out)
    assert report["audio_s"] >= 10
    assert report["num_segments"] >= 1
    assert report["end_mb"] > 0
    assert (report["num_disordered"], report["num_different"], report["num_split_different"]) == (0, 0, 0)
    assert report["num_streams"] == report["num_splits"] == num_streams
