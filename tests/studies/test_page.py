"""The study of the page: what it shows, and when memory counts as flat."""

from u2moe.benchmarks.studies.page import growth, targets, values


def test_memory_that_grows_misses_its_target_and_one_part_shows_without_the_other():
    flat, growing = [300, 350, *[340] * 18], list(range(300, 500, 10))
    assert growth(flat) == 1
    assert growth(growing) > 1.1
    starts = [{"ready": seconds, "cpu": 3.0} for seconds in (1.0, 1.5, 9.0)]
    results = {"ready": {"starts": starts}, "microphone": {"mb": growing, "segments": list(range(20))}}
    assert [target.met for target in targets(results)] == [True, False]
    assert values({})["ready.ready"] == "(not measured)"
