import json

import numpy as np
import pytest
import soundfile

from u2moe.benchmarks.instruments.probe import Mode
from u2moe.benchmarks.quality.levers import Setting, best, main, reference, second_share, settings, values
from u2moe.quantize.routing import ExpertInputs, RoutedLayer
from u2moe.runtime import Bundle, BundleError

pytestmark = pytest.mark.slow

CHUNKS = Mode(chunk_size=16, num_left_chunks=4)


def test_limits_are_tried_with_and_without_chunks_and_left_chunks_without_skipping():
    found = settings((0.0, 0.5), (4, -1), streaming=True)
    assert found == [
        Setting(skip_below=0.0, mode=Mode()),
        Setting(skip_below=0.5, mode=Mode()),
        Setting(skip_below=0.0, mode=CHUNKS),
        Setting(skip_below=0.5, mode=CHUNKS),
        Setting(skip_below=0.0, mode=Mode(chunk_size=16, num_left_chunks=-1)),
    ]
    assert [reference(setting, found) for setting in found] == [found[0]] * 2 + [found[2]] * 3
    assert settings((0.0,), (4, 2), streaming=False) == [Setting(skip_below=0.0, mode=Mode())]


def test_the_second_share_is_that_of_the_softmax_over_the_chosen():
    gate = np.eye(3, dtype=np.float32)
    layer = RoutedLayer(name="", tokens="", gate=gate, gate_name="", top_k=2, expert_bytes=0)
    tokens = np.log(np.array([[1, 6, 3], [4, 4, 0.1]], np.float32))
    np.testing.assert_allclose(second_share(layer, tokens), [3 / 9, 0.5], rtol=1e-6)


@pytest.fixture(scope="module")
def measured(exported, sound, tmp_path_factory):
    """The file that the command wrote about moe_tiny, and its arguments."""
    folder = tmp_path_factory.mktemp("levers")
    for name, text in (("one", "A B C"), ("two", "D")):
        soundfile.write(folder / f"{name}.wav", sound, 16000)
        (folder / f"{name}.tsv").write_text(f"{name}.wav\t{text}\n" * 2, encoding="utf-8")
    manifests = [str(folder / "one.tsv"), str(folder / "two.tsv")]
    options = ["--skip-below", "0.3", "0.6", "--left-chunks", "1", "--repetitions", "2", "--at-most", "1"]
    output = folder / "levers.json"
    arguments = [exported("moe_tiny").as_posix(), "--manifest", *manifests, *options, "--output", str(output)]
    assert main(arguments) == 0
    return output, arguments


@pytest.fixture(scope="module")
def results(measured):
    """What it found."""
    return json.loads(measured[0].read_text(encoding="utf-8"))


def test_every_setting_has_words_and_times(results):
    found = [(item["mode"], item["skip_below"]) for item in results["settings"]]
    modes = ("full context", "chunk 16, left 4")
    assert found == [(mode, limit) for mode in modes for limit in (0, 0.3, 0.6)] + [("chunk 16, left 1", 0)]
    for item in results["settings"]:
        assert [item["words"][name]["num_words"] for name in ("one", "two", "all")] == [3, 1, 4]
        parts = [item["words"][name]["num_errors"] for name in ("one", "two")]
        assert sum(parts) == item["words"]["all"]["num_errors"] > 0
        assert item["encoder_s"]["count"] == 2
        assert item["encoder_s"]["low"] > 0
    assert [results["settings"][index]["faster"]["median"] for index in (0, 3)] == [1, 1]
    assert results["timed_frames"] == 2 * 398


def test_more_tokens_skip_below_a_higher_limit_and_all_above_a_half(results):
    skipped = results["skipped"]
    assert skipped["0"] == 0 < skipped["0.3"] < skipped["0.6"] == 1


def test_second_experts_of_all_tokens_weigh_at_most_a_half(exported):
    bundle = Bundle.open(exported("moe_tiny"))
    inputs = ExpertInputs(bundle)
    frames = np.random.default_rng(0).normal(8, 2, (200, bundle.manifest.model.feature_size)).astype(np.float32)
    tokens = inputs.tokens(frames)
    shares = [second_share(layer, tokens[name]) for name, layer in inputs.layers.items()]
    assert sum(map(len, shares)) == sum(layer.counts(tokens[name]).sum() for name, layer in inputs.layers.items()) / 2
    assert min(share.min() for share in shares) > 0
    assert max(share.max() for share in shares) <= 0.5


def test_the_table_compares_with_the_first_row_of_the_same_chunks(results):
    errors = iter([100, 101, 150, 200, 202, 100, 180])
    changed = json.loads(json.dumps(results))
    for item in changed["settings"]:
        item["words"]["all"]["num_errors"] = next(errors)
    rows = [line.split(" | ") for line in values(changed)["table"].splitlines()[2:]]
    assert [row[6] for row in rows] == ["+0.0%", "+1.0%", "+50.0%", "+0.0%", "+1.0%", "-50.0%", "-10.0%"]
    assert rows[0][-1].startswith("1.00 (1.00-1.00)")
    assert [row[2] for row in rows][2] == "100%"


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([100, 101, 150], {"below": 0.3, "tokens": 0.4, "cost": 0.01}),
        ([100, 101, 99], {"below": 0.6, "tokens": 1.0, "cost": -0.01}),
        ([100, 150, 150], {}),
        ([0, 0, 1], {"below": 0.3, "tokens": 0.4, "cost": 0.0}),
        ([0, 1, 1], {}),
    ],
)
def test_the_best_limit_skips_most_among_those_that_cost_little(errors, expected):
    words = [{"all": {"num_errors": number}} for number in errors]
    found = [
        {"mode": Mode().name, "skip_below": below, "words": own}
        for below, own in zip((0.0, 0.3, 0.6), words, strict=True)
    ]
    assert best({"settings": found, "skipped": {"0.3": 0.4, "0.6": 1.0}}) == pytest.approx(expected)
    assert best({}) == {}


def test_dense_models_have_nothing_to_skip(exported, sound, tmp_path):
    soundfile.write(tmp_path / "a.wav", sound, 16000)
    (tmp_path / "a.tsv").write_text("a.wav\tA\n", encoding="utf-8")
    with pytest.raises(BundleError, match="no token has more than one"):
        main([exported("dense_tiny").as_posix(), "--manifest", str(tmp_path / "a.tsv")])


def without_times(results):
    """Which settings, and their words."""
    return [(item["mode"], item["skip_below"], item["words"]) for item in results["settings"]]


def test_times_are_replaced_and_words_are_kept(measured, results, tmp_path):
    _, arguments = measured
    again = tmp_path / "again.json"
    marked = json.loads(json.dumps(results))
    for number, item in enumerate(marked["settings"]):
        item["words"]["all"]["num_errors"] = 100 + number  # nothing counts them again
        item["encoder_s"] = item["faster"] = None
    again.write_text(json.dumps(marked), encoding="utf-8")
    assert main([*arguments[:-1], str(again), "--times"]) == 0
    found = json.loads(again.read_text(encoding="utf-8"))
    assert found.keys() == results.keys()
    assert without_times(found) == without_times(marked)
    assert [found[name] for name in ("skipped", "timed_frames")] == [
        results[name] for name in ("skipped", "timed_frames")
    ]
    assert [item["encoder_s"]["count"] for item in found["settings"]] == [2] * 7
    assert [found["settings"][index]["faster"]["median"] for index in (0, 3)] == [1, 1]


def test_times_alone_need_words_of_the_same_bundle_and_settings(measured, results, tmp_path, capsys):
    _, arguments = measured
    other = tmp_path / "other.json"
    with pytest.raises(SystemExit):
        main([*arguments[:-1], str(other), "--times"])
    assert "has no words of this bundle" in capsys.readouterr().err
    other.write_text(json.dumps({**results, "bundle": "another"}), encoding="utf-8")
    with pytest.raises(SystemExit):
        main([*arguments[:-1], str(other), "--times"])
    fewer = {**results, "settings": results["settings"][:-1]}
    other.write_text(json.dumps(fewer), encoding="utf-8")
    with pytest.raises(ValueError, match="words were counted with"):
        main([*arguments[:-1], str(other), "--times"])
