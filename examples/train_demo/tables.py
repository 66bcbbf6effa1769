"""Tables of the documentation, from the JSON files in `results/`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from u2moe.benchmarks.results.markdown import table
from u2moe.export.random_checkpoint import num_parameters

SETS = {
    "asterisk-sentences": "telephone prompts, one voice",
    "asterisk-words": "digits, letters, words, one voice",
    "pocketsphinx": "LibriVox, card names, commands",
    "queen-test": "acted game dialogue, 11 kHz",
    "saytime": "clock times, 8 kHz, one voice",
    "heldout": "held-out synthetic voices",
}
"""Descriptions of the test sets by their names in `results/`. The last set is used for validation during training."""
NARROW, UNGUIDED = ", beam 10", ", no language model"
"""Suffixes of a condition's name in `evaluate.py`: the library's beam size, and no language model."""
MODELS = {
    "demo model": ("int8", ""),
    "with `--beam-size 10`": ("int8", NARROW),
    "with `--lm none`": ("int8", UNGUIDED),
    "with `--lm none --beam-size 10`": ("int8", UNGUIDED + NARROW),
    "the same in float32": ("float32", UNGUIDED + NARROW),
}
"""Rows of the demo model: title, precision, and suffix of the condition."""
SHOWN = {
    "full context": "full attention_rescoring",
    "chunk 16": "16 attention_rescoring",
    "chunk 8": "8 attention_rescoring",
    "first pass, full context": "full ctc_prefix_beam",
    "first pass, chunk 16": "16 ctc_prefix_beam",
}
Results = Mapping[str, Any]


def percent(value: float) -> str:
    """Return a share as a percentage with one decimal."""
    return f"{value:.1%}"


def rate(found: Results) -> str:
    """Return a word error rate with its interval."""
    low, high = found["interval"]
    return f"{percent(found['wer'])} ({100 * low:.0f}-{100 * high:.0f})"


def wer_table(results: Results, peers: Results) -> str:
    """Return the table of word error rates: second pass by context, first pass, and other recognisers."""

    def rows() -> Iterator[Sequence[str]]:
        for name, title in SETS.items():
            if name not in results["float32"]["sets"]:  # not every work directory has the synthetic voices
                continue
            first = next(iter(results["float32"]["sets"][name].values()))
            yield (f"**{title}**", f"{first['num_utterances']} recordings, {first['num_words']} words", *[""] * 4)
            for model, (precision, beam) in MODELS.items():
                conditions = results[precision]["sets"][name]
                yield (model, *(rate(conditions[condition + beam]) for condition in SHOWN.values()))
            for peer in peers.values():
                if name in peer["sets"]:
                    yield (peer["title"], rate(peer["sets"][name]), *[""] * 4)

    return table(("", *SHOWN), rows())


def _card(results: Results) -> Iterator[tuple[str, str, dict[str, Results]]]:
    """Yield name, title and conditions of each set that training never uses, for the shipped demo model."""
    for name, title in SETS.items():
        if name != "heldout":
            conditions = results["int8"]["sets"][name]
            yield name, title, {mode: conditions[SHOWN[mode]] for mode in ("full context", "chunk 16")}


def card_table(results: Results) -> str:
    """Return the table of word error rates for the model card."""
    rows = [
        (title, str(modes["full context"]["num_words"]), *map(rate, modes.values()))
        for _, title, modes in _card(results)
    ]
    return table(("set", "words", "full context", "chunk 16"), rows)


def card_index(results: Results) -> str:
    """Return the word error rates for the model card as entries of `model-index`, which the Hugging Face hub reads."""
    return "\n".join(
        "  - task: {type: automatic-speech-recognition}\n"
        f'    dataset: {{type: {name}, name: "{title}"}}\n'
        "    metrics:\n"
        + "\n".join(
            f'    - {{type: wer, value: {100 * found["wer"]:.1f}, name: "word errors in %, {mode}"}}'
            for mode, found in modes.items()
        )
        for name, title, modes in _card(results)
    )


def silence(results: Results) -> str:
    """Return in how many recordings without speech the shipped model finds words, in any context or pass."""
    heard = {text.partition(":")[0] for texts in results["int8"]["silence"].values() for text in texts}
    return f"words in {len(heard)} of them" if heard else "no words in any of them"


def real_time_factors(results: Results) -> str:
    """Return the real-time factors of the shipped model on one thread, features included."""

    def factors(mode: str) -> str:
        own = results["int8"]["rtf"]
        return " and ".join(f"{own[SHOWN[context] + mode]:.4f}" for context in ("full context", "chunk 16"))

    return (
        f"{factors('')} of real time (full context, and chunks of 16), {factors(NARROW)} with a beam of 10, "
        f"{factors(UNGUIDED)} without the language model and {factors(UNGUIDED + NARROW)} with both changes"
    )


def chosen(results: Results) -> str:
    """Return word errors on the set for tuning beam and language model, with full context and in chunks of 16."""

    def total(mode: str) -> str:
        own = [results["int8"]["sets"]["queen-dev"][SHOWN[context] + mode] for context in ("full context", "chunk 16")]
        return percent(sum(found["num_errors"] for found in own) / sum(found["num_words"] for found in own))

    return (
        f"{total('')} of words are wrong with both, {total(NARROW)} with the language model and a beam of 10, "
        f"{total(UNGUIDED)} with only the beam of 40, and {total(UNGUIDED + NARROW)} with neither"
    )


def costs(results: Results) -> str:
    """Return the cost of the language model, in bytes of the bundle and time of loading."""
    own = results["int8"]["costs"]
    return (
        f"{own['bytes'] / 1e6:.1f} MB in addition to {own['rest_bytes'] / 1e6:.1f} MB, and loads in "
        f"{own['language_model_s']:.2f} s of processor time in addition to {own['rest_s']:.2f} s"
    )


def experts_table(shares: Mapping[str, Sequence[float]]) -> str:
    """Return the table of the smallest and the largest share of an expert in every layer."""
    rows = ((f"`{name}`", percent(min(own)), percent(max(own))) for name, own in shares.items())
    return table(("layer", "rarest expert", "most used expert"), rows)


def rare_experts(shares: Mapping[str, Sequence[float]], least: float = 0.02) -> str:
    """Return how many experts take less than the share `least` of the choices of their layer."""
    every = [share for own in shares.values() for share in own]
    return f"{sum(share < least for share in every)} of {len(every)}"


def overlap_table(report: Results) -> str:
    """Return the table of the shares of the test sets' n-grams that occur in training texts."""
    lengths = next(iter(report["overlap"].values()))
    header = ("test set", *(f"{length} word{'s' * (length != '1')}" for length in lengths))
    rows = ((SETS[name], *(percent(share) for share in shares.values())) for name, shares in report["overlap"].items())
    used, words, left_out = (report[f"num_{name}"] for name in ("training_texts", "training_words", "withheld_texts"))
    trained = f"Training uses {used:,} distinct texts with {words:,} distinct words; {left_out:,} texts are excluded."
    return f"{trained}\n\n{table(header, rows)}"


def proof_table(results: Results) -> str:
    """Return the table that compares the mixture of experts with its dense twin: words and costs."""
    condition, names = SHOWN["full context"], ("dense int8", "mixture int8")

    def rows() -> Iterator[Sequence[str]]:
        for name, title in SETS.items():
            own = results["sets"][name]
            found = own["difference"]["int8"][condition]
            low, high = found["interval"]
            points = f"{100 * found['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
            yield f"word errors, {title}", *(rate(own[name][condition]) for name in names), points
        for title in ("full context", "chunk 16"):
            dense, mixture = (results["rtf"][name][SHOWN[title]] for name in names)
            yield f"real-time factor, {title}", f"{dense:.4f}", f"{mixture:.4f}", f"x{mixture / dense:.2f}"
        here = Path(__file__).parent
        config, own = (yaml.safe_load((here / name).read_text()) for name in ("checkpoint/train.yaml", "dense.yaml"))
        counts = [[num_parameters(each, active=a) / 1e6 for a in (False, True)] for each in (config | own, config)]
        shares = (f"x{other / one:.2f}" for one, other in zip(*counts, strict=True))
        yield "million parameters / active", *("{:.1f} / {:.1f}".format(*each) for each in counts), " / ".join(shares)
        sizes = [results["bytes"][name] for name in names]
        yield "megabytes", *(f"{size / 1e6:.1f}" for size in sizes), f"x{sizes[1] / sizes[0]:.2f}"

    hours = results["hours"]
    trained = f"{hours['dense']:.1f} hours of the dense network, {hours['mixture']:.1f} of the mixture"
    header = ("int8, full context", "dense", "mixture of experts", "difference")
    return f"After {results['step']:,} steps: {trained}.\n\n{table(header, rows())}"


def edges_table(results: Results) -> str:
    """Return the table of word error rates of cut recordings, by the silence around them and by context."""
    titles = {
        "words": "words, cut out",
        "phrases": "phrases, cut out",
        "queen-dev": "`queen-dev`",
        "heldout": "held out",
    }

    def rows() -> Iterator[Sequence[str]]:
        for padding_s in results["paddings_s"]:
            own = [[results["sets"][name][f"{padding_s} {context}"] for context in ("full", 16)] for name in titles]
            yield (f"{padding_s:.2f} s", *(" / ".join(percent(found["wer"]) for found in pair) for pair in own))

    return table(("silence", *titles.values()), list(rows()))


def edges_gain(results: Results, padding_s: float) -> str:
    """Return the shares of wrong words in cut recordings with and without silence around them."""
    own, none = (results["sets"]["words"][f"{each} full"]["wer"] for each in (padding_s, 0.0))
    return f"{100 * own:.0f} % are wrong with {padding_s:g} s of silence, and {100 * none:.0f} % without"


def layer_name(name: str) -> str:
    """Return a short name of an expert layer: the number of its block, and "a" for its first or "b" for its second."""
    return f"{name.split('.')[2]}{'a' if name.endswith('macaron') else 'b'}"


def specialists(results: Results) -> str:
    """Return the largest information in the choice of an expert about phone, speaker and band."""

    def most(label: str) -> str:
        layer, found = max(results["layers"].items(), key=lambda item: item[1][label]["bits"])
        own = found[label]
        return f"{own['bits']:.2f} bits about the {label} in layer {layer_name(layer)} (by chance {own['chance']:.2f})"

    found = ", ".join(most(label) for label in ("phone", "speaker", "band"))
    return f"The maxima are {found}, over {results['num_recordings']} recordings in three bands"
