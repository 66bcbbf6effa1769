"""Do hotwords find names that would otherwise be missed, without affecting other words?

    python -m u2moe.benchmarks.studies.hotwords BUNDLE TEST.tsv ...
    python -m u2moe.benchmarks.studies.hotwords BUNDLE COMMANDS.tsv SPEECH.tsv ... --commands
    python -m u2moe.benchmarks.studies.hotwords BUNDLE TEST.tsv --memory

docs/results/accuracy.md explains the method. The long lists of each set contain all its rare words, padded with other
words of the bundle's language model. The unrelated lists contain only such other words. The longest lists are also
tried with half the weight, and restricted to words that sound like the text recognised without hotwords.

With `--commands`, the commands are the transcripts of the first list, in groups of about fifty. Each recording is
recognised without them, and with its group as hotwords, as a grammar, and as a grammar with `[unk]`. Recordings in the
other lists or folders, noise and babble (of the second list) are recognised with the first group, for false alarms.
"""

import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.benchmarks.results.files import publish, read_json
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.studies.shared.script import peak_memory, recognition_parser, script
from u2moe.runtime import Grammar, Recognizer
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.corpus.lists import Recording, read_recordings
from u2moe.runtime.decoding.context import DEFAULT_WEIGHT, ContextGraph
from u2moe.runtime.text.grammar import UNKNOWN
from u2moe.runtime.text.word_errors import edit_distance, matches, words

SHORTEST, MOST_RECORDINGS = 5, 3  # minimum letters of a rare word, maximum recordings of a set that contain it
LIST_LENS = (10, 100)  # numbers of words in a list for a single recording, such as the names in a meeting or a company
LONG_LISTS = (1000, 10_000)  # numbers of words in a list for all recordings, such as the names in a directory
ALIKE = 0.5  # minimum share of common letter pairs for words that sound alike
BY_SOUND, AT_HALF = (f"{LONG_LISTS[-1]} {how}" for how in ("by sound", "at half weight"))
"""Names of two variants of the longest list: restricted to words that sound alike, and with half the weight."""
GROUP = 50  # number of commands in a grammar
CONDITIONS = {"without": "none", "hotwords": "hotwords", "grammar": "grammar", "with_rest": "grammar with [unk]"}
RATE = 16_000
Samples = npt.NDArray[np.float32]
Lists = dict[str, Sequence[str]]  # Hotwords by condition. The condition "without" has none.


def counted(transcript: str, text: str, rare: set[str], hotwords: Sequence[str]) -> dict[str, int]:
    """Return the counts of words and errors in one recording. `num_false` counts hotwords recognised but not spoken."""
    said, recognised = words(transcript), words(text)
    false = Counter(word for word in recognised if word in hotwords) - Counter(said)
    num_found = sum(said[position] in rare for position, _ in matches(said, recognised))
    counts = {"num_words": len(said), "num_errors": edit_distance(said, recognised), "num_false": false.total()}
    return {**counts, "num_rare": sum(word in rare for word in said), "num_rare_found": num_found}


def rare_words(recordings: Sequence[Recording]) -> list[set[str]]:
    """Return the rare words of each recording."""
    said = [set(words(recording.transcript)) for recording in recordings]
    counts = Counter(word for one in said for word in one)
    return [{word for word in one if len(word) >= SHORTEST and counts[word] <= MOST_RECORDINGS} for one in said]


def others(everywhere: Sequence[str], said: set[str], num: int, random: np.random.Generator) -> list[str]:
    """Return up to `num` random rare words that are not in `said`."""
    drawn = [everywhere[position] for position in random.permutation(len(everywhere))[: num + len(said)].tolist()]
    return [word for word in drawn if word not in said][:num]


def lists_of_each(recordings: Sequence[Recording], list_len: int) -> Iterator[Lists]:
    """Yield two lists for each recording: one includes its rare words, the other has only those of other recordings."""
    random = np.random.default_rng(0)
    rare = rare_words(recordings)
    everywhere = sorted(set().union(*rare))
    for recording, own in zip(recordings, rare, strict=True):
        unrelated = others(everywhere, set(words(recording.transcript)), list_len, random)
        yield {"with": [*sorted(own), *unrelated[: max(list_len - len(own), 0)]], "unrelated": unrelated}


def lists_of_all(recordings: Sequence[Recording], list_len: int, vocabulary: Iterable[str]) -> Lists:
    """Return two shared lists: all rare words, filled up with words that no transcript contains; and only such."""
    said = {word for recording in recordings for word in words(recording.transcript)}
    unsaid = sorted({word.upper() for word in vocabulary if word.isalpha() and len(word) >= SHORTEST} - said)
    fillers = [unsaid[place] for place in np.random.default_rng(0).permutation(len(unsaid)).tolist()]
    named = sorted(set().union(*rare_words(recordings)))
    return {"with": [*named, *fillers][:list_len], "unrelated": fillers[:list_len]}


def lists_by_sound(recognizer: Recognizer, recordings: Sequence[Recording], lists: Lists) -> Iterator[Lists]:
    """Yield, for each recording, listed words similar in spelling to one or two adjacent words of its n-best list."""
    indexes: dict[str, dict[str, list[str]]] = {name: {} for name in lists}
    for name, listed in lists.items():
        for word in listed:
            for pair in _pairs(word):
                indexes[name].setdefault(pair, []).append(word)
    for recording in recordings:
        transcript = recognizer.transcribe(recording.path)
        heard = {transcript.text, *(each.text for segment in transcript.segments for each in segment.nbest)}
        runs = {run for text in map(words, heard) for run in (*text, *map("".join, itertools.pairwise(text)))}
        yield {name: sorted(set().union(*(_alike(run, index) for run in runs))) for name, index in indexes.items()}


def _alike(run: str, index: Mapping[str, Sequence[str]]) -> set[str]:
    own = _pairs(run)
    shared = Counter(word for pair in own for word in index.get(pair, ()))
    return {word for word, num in shared.items() if 2 * num >= ALIKE * (len(own) + len(_pairs(word)))}


def _pairs(word: str) -> set[str]:
    return set(map("".join, itertools.pairwise(f" {word} ")))


def measure(
    recognizer: Recognizer, recordings: Sequence[Recording], weight: float, lists: Iterable[Lists] | Lists
) -> dict[str, Any]:
    """Recognise recordings without hotwords and with each list. `times`: ratio of CPU times for lists shared by all."""
    counts = {name: Counter[str]() for name in ("without", "with", "unrelated")}
    seconds = dict.fromkeys(counts, 0.0)
    num_changed = num_listed = 0
    made: dict[str, ContextGraph | None] = {"without": None}
    if isinstance(lists, dict):
        made |= {name: _graph(recognizer, own, weight) for name, own in lists.items()}
        lists = itertools.repeat(lists, len(recordings))
    for recording, own, named in zip(recordings, rare_words(recordings), lists, strict=True):
        texts = {}
        for name, count in counts.items():
            graph = made[name] if name in made else _graph(recognizer, named[name], weight)
            begin = time.process_time()
            texts[name] = recognizer.transcribe(recording.path, hotwords=graph).text
            seconds[name] += time.process_time() - begin
            count.update(counted(recording.transcript, texts[name], own, named.get(name, named["unrelated"])))
        num_changed += texts["unrelated"] != texts["without"]
        num_listed = max(num_listed, len(named["with"]))
    found: dict[str, Any] = {name: dict(own) for name, own in counts.items()}
    for part in found.values():
        part["wer"] = round(part["num_errors"] / max(part["num_words"], 1), 4)
    if len(made) > 1:
        found["times"] = round(seconds["with"] / seconds["without"], 3)
    numbers = {"num_recordings": len(recordings), "num_listed": num_listed, "num_changed_by_unrelated": num_changed}
    return {**found, **numbers}


def measure_memory(bundle: Path, recording: Recording, listed: Sequence[str]) -> dict[str, int]:
    """Return a transcription's peak memory in bytes, by number of hotwords from the start of `listed`."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["transcribe", str(recording.path), "--model", str(bundle)]
        peaks = {"0": peak_memory(*arguments)}
        for num in LONG_LISTS:
            file = Path(folder, f"{num}.txt")
            file.write_text("\n".join(listed[:num]), encoding="utf-8")
            peaks[str(num)] = peak_memory(*arguments, "--hotwords", file)
    return peaks


def noises(recordings: Sequence[Recording]) -> dict[str, list[Samples]]:
    """Return 24 clips of noise and 24 of babble (six excerpts of reversed speech), each 15 seconds long."""
    random = np.random.default_rng(0)
    spoken = np.concatenate([read_audio(recording.path, RATE)[::-1] for recording in recordings])
    found: dict[str, list[Samples]] = {"noise": [], "babble": []}
    for number in range(24):
        white = random.standard_normal(15 * RATE)
        pink = np.fft.irfft(np.fft.rfft(white) / np.sqrt(np.arange(len(white) // 2 + 1) + 1))
        starts = random.integers(0, len(spoken) - len(white), 6)
        babble = np.sum([spoken[start : start + len(white)] for start in starts], axis=0)
        for name, samples in (("noise", (white, pink)[number % 2]), ("babble", babble)):
            found[name].append((0.05 * samples / samples.std()).astype(np.float32))
    return found


def measure_commands(
    recognizer: Recognizer, recordings: Sequence[Recording], others: Mapping[str, Sequence[tuple[Any, str]]]
) -> dict[str, Any]:
    """Count misrecognised commands, and false alarms in `others` (recordings, transcripts), for each condition."""
    named = sorted({recording.transcript for recording in recordings})
    order = np.random.default_rng(0).permutation(len(named))
    groups = [[named[place] for place in part] for part in np.array_split(order, max(round(len(named) / GROUP), 1))]
    seconds = dict.fromkeys(others, 0.0)
    conditions = {name: {"num_errors": 0, **dict.fromkeys(others, 0)} for name in CONDITIONS}
    for number, group in enumerate(groups):
        grammar, with_rest = Grammar(lines=tuple(group)), Grammar(lines=(*group, UNKNOWN))  # built once per group
        chosen: dict[str, dict[str, Any]] = {"without": {}, "hotwords": {"hotwords": group}}
        chosen |= {"grammar": {"grammar": grammar}, "with_rest": {"grammar": with_rest}}
        for recording in recordings:
            for name, found in conditions.items() if recording.transcript in group else ():
                text = recognizer.transcribe(recording.path, **chosen[name]).text
                found["num_errors"] += text != recording.transcript
        sounds = others.items() if number == 0 else ()
        for kind, audio, said in ((name, *each) for name, own in sounds for each in own):
            for name, found in conditions.items():
                transcript = recognizer.transcribe(audio, **chosen[name])
                found[kind] += (phrases_in(transcript.text, group) - phrases_in(said, group)).total()
            seconds[kind] += transcript.duration
    hours = {kind: round(num / 3600, 3) for kind, num in seconds.items()}
    numbers = {"num_recordings": len(recordings), "num_groups": len(groups), "group": max(map(len, groups))}
    return {**numbers, "hours": hours, "conditions": conditions}


def phrases_in(text: str, group: Sequence[str]) -> Counter[str]:
    """Return how often each command occurs in a text."""
    return Counter({command: f" {text} ".count(f" {command} ") for command in group})


def command_values(found: Mapping[str, Any]) -> dict[str, str]:
    """Return the values for pages: the largest group size, the minutes per kind of audio, and a table of conditions."""
    rows = []
    for name, own in found["conditions"].items():
        rates = [f"{own[kind] / hours:.0f}" for kind, hours in found["hours"].items()]
        rows.append((CONDITIONS[name], f"{own['num_errors']} of {found['num_recordings']}", *rates))
    minutes = ", ".join(f"{60 * hours:.0f} minutes of {kind}" for kind, hours in found["hours"].items())
    shown = {"commands_group": f"{found['group']}", "commands_minutes": minutes}
    return {**shown, "commands": table(("commands as", "wrong", *found["hours"]), rows)}


def _graph(recognizer: Recognizer, hotwords: Sequence[str], weight: float) -> ContextGraph | None:
    return ContextGraph([(word, weight) for word in hotwords], recognizer.vocabulary) if hotwords else None


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the values for pages: a row for each list of each set, and rates over all sets of all but short lists."""
    parts = command_values(results["commands"]) if "commands" in results else {}
    if "memory" in results:
        rows = [(f"{int(num):,}", f"{most / 1e6:.0f}") for num, most in results["memory"]["peaks"].items()]
        parts["memory"] = table(("hotwords", "peak memory, MB"), rows)
    if "sets" not in results:
        return parts
    lines = []
    for name, list_len, found in ((name, *item) for name, lists in results["sets"].items() for item in lists.items()):
        without, named, unrelated = found["without"], found["with"], found["unrelated"]
        lines.append((
            name, list_len, f"{without['num_rare_found']}, {named['num_rare_found']} of {named['num_rare']}",
            f"{without['wer']:.1%}, {named['wer']:.1%}",
            f"{found['num_changed_by_unrelated']} of {found['num_recordings']}", f"{unrelated['wer']:.1%}",
            f"{unrelated['num_false']} in {unrelated['num_words']} words",
            f"{found['times']:.2f}" if "times" in found else "",
        ))  # fmt: skip
    header = (
        "set", "list", "rare words found: without, with", "word errors: without, with",
        "texts changed by unrelated list", "word errors with it", "its words recognised", "relative time",
    )  # fmt: skip

    def share(num: int | str, condition: str, key: str, of: str) -> float:
        found = [lists[str(num)][condition] for lists in results["sets"].values() if str(num) in lists]
        above, below = (sum(int(item[name]) for item in found) for name in (key, of))
        return above / max(below, 1)

    shown = {"table": table(header, lines), "weight": f"{results['weight']:g}", **parts}
    suffixes: list[tuple[int | str, str]] = [(LIST_LENS[-1], ""), *((num, f"_{num}") for num in LONG_LISTS)]
    for num, name in [*suffixes, (BY_SOUND, "_by_sound"), (AT_HALF, "_at_half")]:
        shown[f"found_with{name}"] = f"{share(num, 'with', 'num_rare_found', 'num_rare'):.0%}"
        shown[f"errors_unrelated{name}"] = f"{share(num, 'unrelated', 'num_errors', 'num_words'):.1%}"
    shown["found_without"] = f"{share(LIST_LENS[-1], 'without', 'num_rare_found', 'num_rare'):.0%}"
    shown["errors_without"] = f"{share(LIST_LENS[-1], 'without', 'num_errors', 'num_words'):.1%}"
    return shown


@script
def main(argv: Sequence[str] | None = None) -> None:
    parser = recognition_parser("hotwords", __doc__)
    about = f"weight of hotwords (default: {DEFAULT_WEIGHT})"
    parser.add_argument("--weight", type=float, default=DEFAULT_WEIGHT, help=about)
    parser.add_argument("--commands", action="store_true", help="use the transcripts of the first list as commands")
    parser.add_argument("--memory", action="store_true", help="measure only the memory of long hotword lists")
    parser.add_argument("--most", type=int, help="maximum number of recordings per list (default: all)")
    args = parser.parse_args(argv)
    recognizer = Recognizer.from_pretrained(args.bundle)
    if args.commands:
        (_, *names), (named, *others) = args.lists, map(read_recordings, args.lists)
        sounds: dict[str, list[tuple[Any, str]]] = {}
        for path, own in zip(names, others, strict=True):
            sounds[path.stem] = [(each.path, each.transcript) for each in own[: args.most]]
        sounds |= {kind: [(samples, "") for samples in own] for kind, own in noises(others[0]).items()}
        found = measure_commands(recognizer, named, sounds)
        publish(args.results, found, values, bundle=args.bundle, part="commands")
        return
    model = recognizer.bundle.language_model()
    if args.memory and model is not None:
        recordings = read_recordings(args.lists[0])
        listed = lists_of_all(recordings, LONG_LISTS[-1], model.model.ngrams.words)["with"]
        peaks = measure_memory(args.bundle, recordings[0], listed)
        publish(args.results, {"peaks": peaks}, values, bundle=args.bundle, part="memory")
        return
    sets: dict[str, dict[str, Any]] = {}
    for path in args.lists:
        recordings = read_recordings(path)[: args.most]
        lists: dict[str, Iterable[Lists] | Lists] = {str(num): lists_of_each(recordings, num) for num in LIST_LENS}
        weights = {AT_HALF: args.weight / 2}
        if model is not None:
            long = {num: lists_of_all(recordings, num, model.model.ngrams.words) for num in LONG_LISTS}
            lists |= {str(num): own for num, own in long.items()}
            longest = long[LONG_LISTS[-1]]
            lists |= {AT_HALF: longest, BY_SOUND: lists_by_sound(recognizer, recordings, longest)}
        sets[path.stem] = {
            name: measure(recognizer, recordings, weights.get(name, args.weight), own) for name, own in lists.items()
        }
    kept = {name: part for name, part in read_json(args.results).items() if name in ("commands", "memory")}
    publish(args.results, {"weight": args.weight, "sets": sets, **kept}, values, bundle=args.bundle)
