"""Calls of the JavaScript module that are cancelled, reset or fail: their results, and the remaining resources."""

import shutil
from pathlib import Path

import pytest
from browsing import BROWSER, WEB, needs_node, needs_onnxruntime_web, run_module
from manifests import flipped

pytestmark = [needs_node, needs_onnxruntime_web, pytest.mark.slow]

CALLS = Path(__file__).parent / "javascript" / "calls.mjs"
SCRIPTS = {
    "serve.mjs": f"""
        import {{ createRequire }} from 'node:module';
        import {{ serve }} from '{(WEB / "worker.js").as_uri()}';
        const ort = createRequire('{BROWSER}/')('onnxruntime-node');
        serve({{ ort, sessionOptions: {{ executionProviders: ['cpu'], intraOpNumThreads: 1 }} }});
    """,
    "fail.mjs": "throw new Error('no onnxruntime');",
    "exit.mjs": "process.exit(3);",
}
"""Workers."""
WAITING = "AudioOverflowError: 0.40 s of audio is waiting to be recognised: "
OVERFLOW = WAITING + "0.10 s more would exceed the limit of 0.45 s"


@pytest.fixture(scope="module")
def found(exported, sound, tmp_path_factory):
    """Return the results of all calls by name. They use 2.5 seconds, and a bundle without experts, which is faster."""
    folder, bundle = tmp_path_factory.mktemp("workers"), exported("dense_tiny")
    for name, script in SCRIPTS.items():
        (folder / name).write_text(script, encoding="utf-8")
    flipped("ctc.onnx")(shutil.copytree(bundle, folder / "damaged"))
    samples = (sound[:40_000] * 32767).astype(int).tolist()
    given = {"bundle": str(bundle), "folder": str(folder), "samples": samples}
    return run_module(CALLS.read_text(encoding="utf-8"), given)


def test_loading_from_a_url_is_cancelled(found):
    expected = {"isReason": True, "closed": ["/encoder.onnx"], "isQuiet": True, "created": 2, "open": 0, "runs": 0}
    assert found["loadingFromUrl"] == expected


def test_a_bundle_is_loaded_from_a_cache_that_fails_once_and_one_that_fails_is_named(found):
    problem = "http://here/bundle.json: cannot be read: no network; the browser's cache also failed: it is lost"
    assert found["cacheThatFails"] == [4, 4, problem]


def test_loading_from_a_reader_is_cancelled_and_leaves_no_session(found):
    names, left = found["loadingFromReader"]
    refused = "TypeError: signal must be an AbortSignal, got [object Object]"
    assert names == [[["bundle.json", True]], "before", "AbortError", "AbortError", True, refused]
    assert left == [{"error": "enough", "created": last, "open": 0, "runs": 0} for last in (1, 2, 3)]


def test_a_transcription_is_cancelled(found):
    assert found["transcription"] == {
        "before": "before", "error": "enough", "late": "enough", "runs": 7, "isSame": True, "open": 3, "left": 0,
        "after": "StreamError: this recogniser has been released", "stopped": "no noise", "listeners": 0,
    }  # fmt: skip


def test_a_stream_is_reset_in_flight_after_its_end_after_a_failure_and_by_its_own_listeners(found):
    expected = {"isSame": True, "isLong": True, "isIdle": True, "settled": ["fulfilled"] * 3, "result": ["", 0, []]}
    flying, landed = found["resets"]
    assert flying == [expected] * 4
    assert landed == [
        *([moment, True, True, None] for moment in ("finished", "partial", "final")),
        *([moment, True, True, "InferenceError"] for moment in ("failed", "error")),
    ]


ENCODER = "encoder.onnx: onnxruntime failed on chunk float32 [1, 67, 80], chunk_lens int64 [1], offset int64 [1], "
FAILURES = [
    (ENCODER + "required_cache_size int64 [], att_cache float32 [3, 1, 4, 0, 17], cnn_cache", "Expected: 32"),
    (ENCODER, "'cnn_cache' is missing"),
    ("encoder.onnx: output output is [1, 16, 64], expected [1, 16, 33]", ""),
    ("ctc.onnx: onnxruntime failed on encoder_out float32 [1, 16, 64]: ", "'samples' is missing"),
]
"""Beginnings of messages, and their reasons."""


@pytest.mark.parametrize("number", [0, 1], ids=["onnxruntime-node", "onnxruntime-web/wasm"])
def test_errors_of_onnxruntime_name_the_graph(found, number):
    """They also name the inputs, and their cause is the error of onnxruntime."""
    refused, *failures = found["errorsOfOnnxruntime"][number]
    assert (refused[0], refused[2]) == ("BundleError", True)
    assert refused[1].startswith("ctc.onnx: onnxruntime refuses it: ")
    for (name, message, has_cause, is_event), (start, reason) in zip(failures, FAILURES, strict=True):
        assert (name, has_cause, is_event) == ("InferenceError", bool(reason), True)
        assert message.startswith(start)
        assert reason in message


def test_other_errors_keep_their_causes_and_name_the_file(found):
    expected = [
        ("BundleError", "bundle.json: is not valid JSON: ", None),
        ("BundleError", "tokens.txt: cannot be read: ENOENT", "ENOENT"),
        ("BundleError", "http://127.0.0.1:9/bundle.json: cannot be read: ", "TypeError"),
        ("InferenceError", "encoder.onnx: output output is [], expected [1, 16, ", None),
        ("InferenceError", "ctc.onnx: returned NaN: its weights are damaged", None),
    ]
    for (name, message, cause), (kind, start, why) in zip(found["otherErrors"], expected, strict=True):
        assert (name, cause) == (kind, why)
        assert message.startswith(start)


def test_a_thread_of_node_recognises_as_the_program_does(found):
    """The worker has the same results, cancellation and error classes, and it can be terminated."""
    is_same, events, reasons, errors, refused, no_url, queues = found["threads"]
    assert (is_same, reasons) == (True, ["enough", "enough"])
    assert queues == [[True, [OVERFLOW]]] * 2
    assert set(events[:-1]) == {"partial"}
    assert events[-1] == "final"
    starts = [
        ("LanguageModelError", "language model: line 1: there is no "),
        ("LanguageModelError", "language model: line 1: there is no "),
        ("IntegrityError", "ctc.onnx does not match the manifest of the model"),
        ("U2moeError", "the worker failed: no onnxruntime"),
        ("U2moeError", "the worker failed: it has ended with code 3"),
        ("StreamError", "the recogniser of this stream has been released"),
    ]
    for (name, is_kind, message), (expected, start) in zip(errors, starts, strict=True):
        assert (name, is_kind) == (expected, True)
        assert message.startswith(start)
    assert refused == "serve must be called in a worker"
    assert no_url == "TypeError: source must be a URL: a worker cannot be sent functions"


def test_a_stream_of_a_worker_that_is_reset_is_like_a_new_one_at_once(found):
    assert found["lateEvents"] == [["before", "after"], "", []]


def test_samples_of_another_context_are_recognised_and_transferred_ones_refused(found):
    """A transcription copies 16-bit samples first."""
    assert found["foreignSamples"] == [[True, True], ["TypeError", None, "TypeError", "TypeError"]]
