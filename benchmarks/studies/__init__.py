"""One question a file, measured in a clone: `python -m u2moe.benchmarks.studies.NAME`. Not packaged."""
