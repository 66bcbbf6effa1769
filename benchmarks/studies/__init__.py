"""Studies, one question per module. Run them in a clone: `python -m u2moe.benchmarks.studies.NAME`. Not packaged."""
