"""Examples: live captions run; the files for clusters are valid, and their commands can be parsed."""

import ast
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from u2moe.runtime import bundle_location, cli
from u2moe.runtime.corpus import Shard

EXAMPLES = Path(__file__).parent.parent / "examples"
CLUSTER = EXAMPLES / "cluster"


def test_live_captions(bundle, sound, tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "talk.wav", np.tile(sound, 6), 16_000)
    monkeypatch.setattr(bundle_location, "DEMO_FOLDER", bundle.path)
    runpy.run_path(str(EXAMPLES / "live_captions.py"))["main"](str(tmp_path / "talk.wav"), bundle.tokens[5])
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) >= 2  # 24 seconds of noise without a pause, at most 15 in each
    assert all(float(start) < float(end) <= 24 for start, end, _ in lines)
    assert [float(line[0]) for line in lines] == sorted(float(line[0]) for line in lines)


def text_of(name):
    return (CLUSTER / name).read_text(encoding="utf-8")


def understood(command, **variables):
    """Parse a `u2moe corpus` command with these variables."""
    text = re.sub(r"\$\{?(\w+)\}?", lambda found: variables[found[1]], command.replace('"$@"', ""))
    program, *arguments = shlex.split(text)
    assert program == "u2moe"
    return cli.parser(["corpus"]).parse_args(arguments)


def document(name):
    (found,) = pytest.importorskip("yaml").safe_load_all(text_of(name))
    return found


def test_slurm():
    subprocess.run(["bash", "-n", str(CLUSTER / "slurm.sbatch")], check=True)
    text = text_of("slurm.sbatch")
    command = re.search(r"^exec (.*)$", text, re.MULTILINE)[1]
    args = understood(command, list="m", output="o", SLURM_CPUS_PER_TASK="32")
    assert (args.list, args.output, args.num_workers) == ("m", "o", 32)
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert re.fullmatch(r"0-\d+", directives["array"])
    assert {"cpus-per-task", "time", "requeue", "signal"} <= directives.keys()
    assert text.rindex("#SBATCH") < text.index("\nset ")  # sbatch ignores directives after the first command
    assert re.search(r'--shard "(\S+)"', text)[1] == "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"


def test_kubernetes():
    job = document("kubernetes.yaml")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"  # needs restartPolicy Never for a policy by pod and index
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    (container,) = spec["template"]["spec"]["containers"]
    command = shlex.join([*container["command"], *container["args"]]).replace("$(JOB_COMPLETION_INDEX)", "$INDEX")
    found = [understood(command.replace("'", ""), INDEX=str(index)) for index in range(spec["completions"])]
    assert [args.shard for args in found] == [Shard(index=i, count=spec["completions"]) for i in range(len(found))]
    assert found[0].num_workers == int(container["resources"]["limits"]["cpu"])


def test_ray():
    job = document("ray_job.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert understood(job["spec"]["entrypoint"]).ray == "auto"
    cluster = job["spec"]["rayClusterSpec"]
    assert all(isinstance(value, str) for value in cluster["headGroupSpec"]["rayStartParams"].values())
    assert cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    comment = re.search(r"ray job submit -- (.*)$", text_of("ray_job.yaml"), re.MULTILINE)
    assert understood(comment[1]).ray == "auto"


def test_the_pipeline_and_the_image_name_what_is_there():
    nodes = [node for node in ast.walk(ast.parse(text_of("ray_pipeline.py"))) if isinstance(node, ast.ImportFrom)]
    imported = {node.module: [name.name for name in node.names] for node in nodes}
    assert imported["u2moe.runtime.corpus"] == ["ModelChoice"]
    source = (EXAMPLES.parent / "runtime" / "corpus" / "ray.py").read_text(encoding="utf-8")
    assert all(f"class {name}" in source for name in imported["u2moe.runtime.corpus.ray"])
    text = text_of("Dockerfile")
    assert text.count("FROM ") == 2
    assert 'ENTRYPOINT ["u2moe", "corpus"]' in text
