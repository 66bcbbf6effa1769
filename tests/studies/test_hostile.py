import time
from multiprocessing.synchronize import Event

import pytest

from u2moe.benchmarks.studies import hostile


def test_attackers_must_outlive_the_speakers(monkeypatch):
    monkeypatch.setattr(hostile, "_AHEAD_S", 0.0)
    with hostile.meanwhile(hostile.burn, [0], 19):
        pass
    with pytest.raises(RuntimeError, match="set ended before the speakers did"), hostile.meanwhile(Event.set):
        time.sleep(3.0)


def test_the_median_round_counts():
    rounds = [{"partial": {"p95": seconds}} for seconds in (0.5, 0.02, 0.01)]
    assert hostile.ratio({"before": {"partial": {"p95": 0.01}}, "rounds": rounds}) == 2.0
