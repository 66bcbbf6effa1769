"""The benchmark of long videos, with a short one."""

import pytest

from u2moe.benchmarks.endurance.long_video import measure, values
from u2moe.runtime import Recognizer

pytestmark = pytest.mark.slow


def test_a_video_of_a_minute():
    pytest.importorskip("av")
    found = measure(Recognizer.from_pretrained(), "mkv", 0.02)
    assert found["audio_s"] == pytest.approx(60, abs=20)
    assert found["num_recognised"] == pytest.approx(found["num_words"], rel=0.1)  # the other track is silent
    shown = values({"found": {"mkv": {**found, "memory_mb": [100.0, 99.0, 103.0]}}})
    assert shown["growth"] == "3"
    assert "| 100 MB | 103 MB |" in shown["table"]
