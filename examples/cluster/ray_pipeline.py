"""The recogniser as a step of a Ray Data pipeline: python ray_pipeline.py s3://corpora/in s3://corpora/out.

Needs u2moe[cpu,ray]. Ray reads, writes and resumes. To get each utterance exactly once even if processes are killed,
use `u2moe corpus --ray`.
"""

import sys

import ray

from u2moe.runtime.corpus import ModelChoice
from u2moe.runtime.corpus.ray import Recognize


def main(source: str, target: str) -> None:
    """Recognise all files of a folder or bucket, and write a Parquet file for each batch."""
    num_actors = max(int(ray.cluster_resources()["CPU"]) - 2, 1)  # without CPUs to read and write, Ray waits forever
    (
        ray.data.read_binary_files(source, include_paths=True)
        .map_batches(
            Recognize,
            fn_constructor_args=(ModelChoice(),),
            batch_size=32,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=num_actors),
        )
        .write_parquet(target)
    )


if __name__ == "__main__":
    ray.init()
    main(*sys.argv[1:])
