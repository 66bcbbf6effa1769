"""Studies, one question per module, to run in a clone: `python -m u2moe.benchmarks.studies.NAME`. Not packaged."""
