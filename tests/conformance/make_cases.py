"""Write the cases of this folder with Python's results. Run it after an intended change of results. python
tests/conformance/make_cases.py"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "toys"))
from conformance import COMPUTED, FOLDER, load
from fbanks import CONFIGS, WENET
from language_models import random_arpa
from searches import HOTWORDS, SYMBOLS, random_frames

WORDS = ("A", "B", "CA", "CAB", "AB", "中", "BAC", "D")
SILENT = {"must_contain_nonsilence": True, "min_trailing_silence": 0.3, "min_utterance_length": 0.0}
LONG = {"must_contain_nonsilence": False, "min_trailing_silence": 0.0, "min_utterance_length": 2.0}
GRAMMARS = (
    ("a b", "cab", "[unk]"), ("a (b | cab) [a]", "<x> = a | ba", "<x> 中文"),
    ("<x> <x>", "<x> = ab | a b | c [d]", "[unk]"), ("中 文", "é 한d", "a", "a b c", "[unk]"),
)  # fmt: skip
COMMANDS = [
    "[now | please] get back to work", "what do you want [to (know | see)]", "<digit>", "get",
    "<digit> = one | two | three | five | six | seven", "<digit> <digit>",
]  # fmt: skip
TOKENS = ("▁A", "A", "▁B", "B", "C", "▁CA", "中", "D")


def listed(frames):
    """Return float32 values as JSON numbers with the fewest digits that read back as the same values."""
    return [[float(str(value)) for value in row] for row in np.asarray(frames, np.float32)]


def searches():
    models = {
        "words": random_arpa(1, WORDS, 3),
        "positive": random_arpa(2, WORDS, 2, positive_backoffs=True),
        "tokens": random_arpa(3, TOKENS, 3),
        "bare": random_arpa(4, WORDS, 2, markers=("<s>", "</s>")),
        "classes": random_arpa(5, WORDS, 3, markers=("<s>", "</s>", "<unk>", "<name>")),
    }
    cases = []

    def add(name, frames, **options):
        defaults = {
            "search": "ctc_prefix_beam", "beam_size": 5, "hotwords": None, "language_model": None, "blank_penalty": 0.0,
        }  # fmt: skip
        cases.append({"name": name, **defaults, **options, "frames": listed(frames)})

    def weights(model, **changes):
        chosen = {"weight": 0.5, "word_bonus": 0.5, "unknown_score": -5.0, "rescoring_weight": 1.0, "level": None}
        return {"model": model, **chosen, **changes}

    for seed in range(8):
        add(f"alone-{seed}", random_frames(seed, 1 + 5 * seed), beam_size=1 + seed)
        add(f"hotwords-{seed}", random_frames(20 + seed, 2 + 5 * seed), beam_size=1 + seed, hotwords=HOTWORDS)
    for seed, model in enumerate(("words", "positive", "tokens", "bare") * 3):
        change = ({}, {"weight": 2.0, "word_bonus": 1.5}, {"unknown_score": -20.0, "word_bonus": -1.0})[seed // 4]
        both = HOTWORDS if seed % 3 == 0 else None
        options = weights(model, **change)
        add(f"{model}-{seed}", random_frames(40 + seed, 30), beam_size=2 + seed, hotwords=both, language_model=options)
    classes = {"<name>": ["ABBA", "CAB", "DA", "dab"], "AB": ["ABBA", "DC"]}
    for seed in range(3):
        options = weights("classes", classes=classes, weight=1.0, word_bonus=1.0)
        add(f"classes-{seed}", random_frames(100 + seed, 30), beam_size=4 + 5 * seed, language_model=options)
    add("level", random_frames(60, 25), language_model=weights("words", level="token"))
    for seed in range(3):
        add(f"greedy-{seed}", random_frames(70 + seed, 1 + 12 * seed), search="ctc_greedy")
        add(f"greedy-penalty-{seed}", random_frames(80 + seed, 20), search="ctc_greedy", blank_penalty=0.5 + seed)
        add(f"penalty-{seed}", random_frames(90 + seed, 20), blank_penalty=0.5 + seed, hotwords=HOTWORDS)
    for seed in range(24):
        lines = GRAMMARS[seed % len(GRAMMARS)]
        add(f"grammar-{seed}", random_frames(110 + seed, 4 + 2 * seed), beam_size=1 + seed % 7, grammar=lines)
    ties = np.full((6, len(SYMBOLS)), np.log(1 / len(SYMBOLS)), np.float32)
    for name, frames in (("empty", ties[:0]), ("one frame", ties[:1]), ("ties", ties)):
        add(name, frames, beam_size=3)
        add(f"{name}, hotwords", frames, beam_size=3, hotwords=HOTWORDS)
        add(f"{name}, words", frames, beam_size=3, language_model=weights("words"))
    return {"symbols": SYMBOLS, "models": models, "cases": cases}


def endpoints():
    random = np.random.default_rng(1)
    silence = {**SILENT, "min_trailing_silence": 0.12}
    cases = []
    for seed in range(16):
        length = {**LONG, "min_utterance_length": 0.8 + seed / 10}
        rules = {"rule1": None, "rule2": silence if seed % 4 else None, "rule3": length if seed % 5 else None}
        tokens = random.choice([2, 4, 8, 3, 9], random.integers(0, 9)).tolist()
        frames = listed(random_frames(seed, 25 + 2 * seed if seed else 0))
        cases.append({"name": str(seed), "endpoint": rules, "frame_s": 0.04, "tokens": tokens, "frames": frames})
    return {"symbols": SYMBOLS, "cases": cases}


def partials():
    """Yield utterances that end within speech, with the partial results until their final ones."""
    cases = []
    for seed in range(4):
        rules = {"rule1": None, "rule2": None, "rule3": {**LONG, "min_utterance_length": 1.0 + seed / 5}}
        frames = listed(random_frames(60 + seed, 120))
        cases.append({"name": str(seed), "endpoint": rules, "chunk_size": 4 + seed, "frames": frames})
    return {"symbols": SYMBOLS, "cases": cases}


def pauses():
    random = np.random.default_rng(2)
    cases = []
    for seed in range(12):
        words = np.cumsum(random.uniform(0.1, 1.2, (6, 2)).ravel()).reshape(6, 2).round(3)
        levels = np.convolve(random.normal(0, 4, 80 if seed else 0) if seed else [0.0], np.ones(9) / 3, "same").round(2)
        cases.append({
            "name": str(seed), "frame_s": 0.01, "pause": 0.1 + 0.02 * seed, "after_s": 0.05 * seed,
            "levels": levels.tolist() if seed else [], "words": words.tolist(),
            "peaks": (words + np.array([0.03, -0.03])).round(3).tolist(),
        })  # fmt: skip
    return {"cases": cases}


def paddings():
    cases = []
    for begins, ends in ((True, True), (False, True), (True, False)):
        for num in (0, 1, 128, 399, 400, 700):
            samples = np.full(700, 40, np.int64)[:num]
            samples[:400] += 2000 * begins * (np.arange(len(samples[:400])) % 2)
            samples[-400:] += 2000 * ends * (np.arange(len(samples[-400:])) % 2)
            name = f"{num}, {begins}, {ends}"
            cases.append({"name": name, "padding_s": 0.18, "split": num // 3, "samples": samples.tolist()})
    return {"cases": cases}


def front_ends():
    random = np.random.default_rng(5)
    cases = []
    for number, config in enumerate([*CONFIGS, *WENET.values()]):
        num = config.frame_len + config.shift_len + 1
        samples = (random.normal(0, 10.0 ** random.uniform(0, 4), num)).round().clip(-32768, 32767).astype(int).tolist()
        cases.append({"name": str(number), "features": dataclasses.asdict(config), "samples": samples})
    return {"cases": cases}


def resamplings():
    random = np.random.default_rng(3)
    cases = []
    sizes = {8000: [120], 11_025: [150], 22_050: [150], 44_056: [300], 44_100: [300], 48_000: [1, 0]}
    for rate, num in ((rate, num) for rate, each in sizes.items() for num in each):
        samples = random.integers(-20_000, 20_000, num).tolist()
        cases.append({"name": f"{rate}, {num}", "rate": rate, "samples": samples})
    return {"cases": cases}


def rescorings():
    random = np.random.default_rng(4)
    cases = []
    for seed in range(6):
        hypotheses, width = [], 5
        for length in random.permutation(width)[:4].tolist():
            context, language, acoustic = random.uniform(-4, 0, 3).round(3).tolist()
            hypotheses.append({
                "tokens": random.integers(2, 9, length).tolist(), "times": list(range(length)),
                "score": context + language + acoustic, "context_score": context, "language_score": language,
                "probabilities": random.uniform(0, 1, length).round(3).tolist(),
            })  # fmt: skip
        left, right = random.uniform(-3, 0, (2, 4, width)).round(3).astype(np.float32)
        cases.append({
            "name": str(seed), "hypotheses": hypotheses, "left": listed(left), "right": listed(right) if seed else None,
            "ctc_weight": 0.1 * seed, "reverse_weight": 0.3 * (seed > 1), "rescoring_weight": 0.5 * seed,
        })  # fmt: skip
    return {"cases": cases}


def writings():
    """Return the texts of written.json, without results. To test another text, add a case with it to the file."""
    names = ("name", "text", "has_words")
    return {"cases": [{name: case[name] for name in names} for case in load("written")["cases"]]}


def recordings():
    """Return cases with the demo's clips, repeated `repeats` times. Tests compute the results."""
    weights = {"weight": 0.3, "word_bonus": 1.0, "unknown_score": -10.0, "rescoring_weight": 0.5}
    speech = {"threshold": 0.5, "end_threshold": 0.4, "min_silence": 0.3, "padding": 0.1}
    others = {"network": "sequences", **speech, "min_silence": 0.2}
    streamed, full = ({"chunk_size": size, "endpoint": {}} for size in (16, None))
    unpaused, other_words = {"chunk_size": None, "endpoint": {"pause": None}}, [*COMMANDS, "[unk]"]
    cases = {
        "stream": (1, streamed),
        "left chunks": (1, {"chunk_size": 8, "num_left_chunks": 2, "beam_size": 4, "endpoint": {}}),
        "one utterance": (1, {"chunk_size": 16, "endpoint": None}),
        "rules": (1, {"chunk_size": 16, "endpoint": {"rule1": None, "rule2": SILENT, "rule3": LONG}}),
        "turn": (1, {"chunk_size": 16, "endpoint": {"turn": 0.1}, "language_model": weights}),
        "weights": (1, {**streamed, "ctc_weight": 1.5, "reverse_weight": 0.0, "padding_s": 0.5, "blank_penalty": 8.0}),
        "one pass, written": (1, {**streamed, "search": "ctc_prefix_beam", "text_format": {}}),
        "hotwords": (1, {"chunk_size": 16, "beam_size": 10, "endpoint": {}, "hotwords": "time :2\nthe date"}),
        "grammar": (1, {**streamed, "grammar": COMMANDS}),
        "grammar, full context": (1, {**full, "grammar": COMMANDS}),
        "grammar, first pass": (1, {**streamed, "chunk_size": 8, "search": "ctc_prefix_beam", "grammar": other_words}),
        "grammar, other words": (1, {**streamed, "blank_penalty": 2.0, "grammar": other_words}),
        "grammar, other words, full context": (4, {**unpaused, "grammar": other_words}),
        "language model": (1, {**streamed, "language_model": weights}),
        "full context": (1, full),
        "long, full context": (4, full),
        "long, without pauses": (4, unpaused),
        "attention": (1, {**streamed, "search": "attention", "beam_size": 4, "length_penalty": 0.8}),
        "speech": (1, {**full, "vad": {"network": "windows", **speech}}),
        "speech, other network": (1, {**full, "padding_s": 0.2, "vad": others}),
    }  # fmt: skip
    return {"cases": [{"name": name, "repeats": num, "options": options} for name, (num, options) in cases.items()]}


def defaults():
    """Return cases for a bundle with `decoding` defaults. Tests compute the results."""
    weights = {"weight": 0.5, "word_bonus": 0.8, "unknown_score": -9.0, "rescoring_weight": 0.7}
    decoding = {
        "beam_size": 6, "ctc_weight": 0.6, "reverse_weight": 0.2, "padding_s": 0.4,
        "endpoint": {"rule1": None, "rule2": SILENT, "rule3": LONG, "pause": 0.4},
        "hotwords": ["# of the clips", "time :2", "the date"],
        "language_model": {"file": "language.lm", **weights, "level": "word"},
    }  # fmt: skip
    cases = {
        "the bundle's": {"chunk_size": 16},
        "the bundle's, full context": {"chunk_size": None},
        "none": {"chunk_size": 16, "hotwords": "", "language_model": None},
        "a search that uses neither": {"chunk_size": 16, "search": "ctc_greedy"},
        "others": {
            "chunk_size": 16, "beam_size": 10, "ctc_weight": 0.1, "reverse_weight": 0.7, "padding_s": 0.0,
            "endpoint": {}, "hotwords": "question :3", "language_model": {**weights, "weight": 0.1},
        },
    }  # fmt: skip
    return {
        "decoding": decoding,
        "cases": [{"name": name, "repeats": 1, "options": options} for name, options in cases.items()],
    }


def write():
    kinds = {
        "search": searches(), "endpoint": endpoints(), "partials": partials(), "pauses": pauses(),
        "padding": paddings(), "features": front_ends(),
        "resampling": resamplings(), "rescoring": rescorings(), "written": writings(), "recordings": recordings(),
        "defaults": defaults(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for kind, content in kinds.items():
            for case in content["cases"]:
                if kind in COMPUTED:
                    case["result"] = COMPUTED[kind](case, content, Path(folder))
            shared = [f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)},"
                      for name, value in content.items() if name != "cases"]  # fmt: skip
            cases = ",\n  ".join(
                json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in content["cases"]
            )
            text = "\n".join(["{", *shared, ' "cases": [\n  ' + cases + "\n ]", "}", ""])
            (FOLDER / f"{kind}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
