"""The report of the study of committed words, on invented results."""

from u2moe.benchmarks.studies.committed import values


def test_values_are_medians_and_the_share_that_is_revised():
    waits = {"word": {"p50": 1.18, "p95": 5.134}, "committed": {"p50": 1.78, "p95": 2.816}}
    found = values({"sets": {"books": {"16": {**waits, "revised": 2, "words": 40}}}})
    assert (found["median_16"], found["revised_16"]) == ("1.78", "5.0%")
    assert "| books | 16 | 1180, 5134 ms | 1780, 2816 ms | 5.0% |" in found["table"]
