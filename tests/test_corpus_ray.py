"""Runs on Ray Data, and folders on S3. Needs ray, moto and s3fs (extra `dev`)."""

import importlib
import os
import shutil
import sys
import tempfile

import onnxruntime
import pytest
from corpora import ToyChoice, assert_survives_kill, crashing, files_in, listed, rows_in, write_list

from u2moe.runtime import CorpusError, SessionSettings
from u2moe.runtime.corpus.lists import ListOptions
from u2moe.runtime.corpus.results import read_outcomes
from u2moe.runtime.corpus.run_folder import OutputFolder
from u2moe.runtime.corpus.runner import CorpusOptions, run_corpus

pytestmark = [
    pytest.mark.slow,
    # Ray's settings warn about old names of each other on creation.
    pytest.mark.filterwarnings("ignore:`use_.*` is deprecated:DeprecationWarning:ray.data.context"),
]

OPTIONS = CorpusOptions(block_size=4, num_workers=1)


def needed(name):
    """Import a module that is always installed in CI; elsewhere, skip the test if it is missing."""
    return importlib.import_module(name) if "CI" in os.environ else pytest.importorskip(name)


@pytest.fixture(scope="module", autouse=True)
def surroundings():
    """Prepare Ray and S3: no telemetry, no files left behind, and workers find the modules of the tests."""
    # not in pytest's folder: socket names are limited to 107 bytes
    with tempfile.TemporaryDirectory(prefix="ray") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_enable_worker_prestart", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="module")
def cluster(surroundings):
    ray = needed("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    yield ray
    ray.shutdown()


def run_on_ray(*arguments, **options):
    from u2moe.runtime.corpus.ray import run_on_ray as run  # noqa: PLC0415

    return run(*arguments, **options)


def test_a_cluster_completes_what_one_machine_began(cluster, corpus, undisturbed, tmp_path):
    """Two actors take all CPUs."""
    shutil.copytree(undisturbed, tmp_path / "out")
    for place in ("*0-*4", "*8-*10"):
        next(tmp_path.glob(f"out/blocks/*/{place}.jsonl")).unlink()
    progress = run_on_ray(corpus, tmp_path / "out", ToyChoice(), CorpusOptions(block_size=4))
    assert (progress.num_before, progress.num_done, progress.num_failed, progress.total) == (4, 6, 0, 10)
    assert files_in(tmp_path / "out") == files_in(undisturbed)


def test_more_actors_than_fit_are_refused(cluster, corpus, tmp_path, monkeypatch):
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    settings = SessionSettings(providers=["CUDAExecutionProvider"])
    with pytest.raises(CorpusError, match=r"has room for 2 of 3 actors with .* each"):
        run_on_ray(corpus, tmp_path, ToyChoice(), CorpusOptions(num_workers=3))
    with pytest.raises(CorpusError, match=r"has room for 0 of 1 actors with .*'num_gpus': 1.* each"):
        run_on_ray(corpus, tmp_path / "gpu", ToyChoice(settings=settings), CorpusOptions())


def test_actors_that_are_killed_and_files_that_kill_them(cluster, corpus, tmp_path):
    marker = tmp_path / "once"
    command = f"test -e {marker} || {{ touch {marker}; kill -9 $PPID; }}; cat {corpus.with_name('2.wav')}"
    options = CorpusOptions(block_size=2, num_workers=2, list_options=ListOptions(allow_pipes=True))
    folder, out = crashing(corpus, tmp_path / "kaldi", command), tmp_path / "out"
    *wavs, _, last = (folder / "wav.scp").read_text().splitlines()
    (folder / "wav.scp").write_text("\n".join([*wavs, "k4 kill -9 $PPID; sleep 9 |", last]))
    with pytest.raises(CorpusError, match="2 utterances are missing"):
        run_on_ray(folder, out, ToyChoice(), options)
    expected = [line["txt"] for line in listed(corpus)[:6]]
    assert [row["text"] for row in rows_in(out)] == expected[:4]
    run_corpus(folder, out, ToyChoice(), options)  # this machine finds the one that kills
    assert [row["text"] for row in rows_in(out)] == [*expected[:4], "", expected[5]]


@pytest.mark.endurance
def test_a_driver_that_is_killed(corpus, undisturbed, tmp_path):
    """It is killed with all Ray processes; a second run does the missing blocks."""
    needed("ray")
    script = (
        "import sys, ray; from corpora import ToyChoice; from u2moe.runtime.corpus.ray import *\n"
        "from u2moe.runtime.corpus.lists import ListOptions\n"
        "ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level='ERROR')\n"
        "run_on_ray(sys.argv[1], sys.argv[2], ToyChoice(), CorpusOptions(block_size=2, num_workers=2, "
        "list_options=ListOptions(allow_pipes=True)))"
    )
    assert_survives_kill(script, corpus, tmp_path)


def test_a_step_of_a_pipeline(cluster, corpus, tmp_path):
    from u2moe.runtime.corpus.ray import Recognize  # noqa: PLC0415

    files = [*(str(corpus.with_name(f"{i}.wav")) for i in range(4)), str(tmp_path / "bad.wav")]
    (tmp_path / "bad.wav").write_text("no audio")
    dataset = cluster.data.read_binary_files(files, include_paths=True, override_num_blocks=1)
    compute = cluster.data.ActorPoolStrategy(size=1)
    found = dataset.map_batches(Recognize, fn_constructor_args=(ToyChoice(),), batch_size=2, compute=compute)
    rows = {row["key"]: row for row in found.take_all()}
    assert [rows[file]["text"] for file in files] == [*(line["txt"] for line in listed(corpus)[:4]), ""]
    assert "cannot be read as audio" in rows[files[4]]["error"]


@pytest.fixture
def bucket(monkeypatch):
    """Start an S3 server in this process; return the URL of a bucket."""
    server, s3fs = needed("moto.server"), needed("s3fs")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    _, port = running.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    s3fs.S3FileSystem().mkdir("corpora")
    yield "s3://corpora"
    running.stop()


def test_list_audio_and_results_on_s3(corpus, undisturbed, bucket):
    import fsspec  # noqa: PLC0415 - as s3fs

    files, outcomes = fsspec.filesystem("s3"), OutputFolder(f"{bucket}/out")
    for name in ("data.list", *(f"{number}.wav" for number in range(10))):
        files.pipe(f"{bucket}/in/{name}", corpus.with_name(name).read_bytes())
    for num_before in (0, 6, 10):
        progress = run_corpus(f"{bucket}/in/data.list", f"{bucket}/out", ToyChoice(), OPTIONS)
        assert (progress.num_before, progress.num_done, progress.num_failed) == (num_before, 10 - num_before, 0)
        found = [content for _, _, content in outcomes.contents()]
        assert found == [content for _, content in sorted(files_in(undisturbed).items())]
        if num_before == 0:
            files.rm(files.glob(f"{bucket}/out/blocks/*/*4-*8.jsonl"))
    assert (outcomes.num_missing(), outcomes.claims) == (0, None)
    missing = write_list(corpus.with_name("missing.list"), [{"key": "k", "wav": f"{bucket}/none.wav"}])
    run_corpus(missing, f"{bucket}/failed", ToyChoice(), OPTIONS)
    assert "none.wav: cannot be read" in next(read_outcomes(OutputFolder(f"{bucket}/failed"))).error
    with pytest.raises(CorpusError, match="Protocol not known: nosuch"):
        OutputFolder("nosuch://x").finished_blocks()
