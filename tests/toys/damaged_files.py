"""Damaged bundles, train.yaml files and language models, opened and used."""

import copy
import gzip
import hashlib
import json
import os
import shutil
import warnings

import numpy as np
import yaml
from damage import ODD_VALUES, damaged, one_of, place_in

from u2moe.export.training_config import read_training_config
from u2moe.export.weights import expected_shapes
from u2moe.runtime import Bundle, Fusion, LanguageModel, LanguageModelOptions, Recognizer, ctc_prefix_beam_search
from u2moe.runtime.bundle.manifest import MANIFEST_FILE
from u2moe.runtime.language.files import BITS, DIGEST_SIZE, MAGIC, read_arpa, write_arpa, write_compact
from u2moe.runtime.language.kneser_ney import TrainingOptions, count_ngrams, train

# -------------------- bundles: a changed manifest, or a changed, missing, exchanged or special file


def use_damaged_bundles(bundle, clip, folder):
    """Return a function that damages a copy of a bundle, and recognises a clip with it."""
    target = folder / "bundle"

    def use(random):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(bundle, target, copy_function=os.link)
        damage_bundle(target, random)
        opened = Bundle.open(target)
        Recognizer(opened, opened.load()).transcribe(clip)
        return "accepted"

    return use


def damage_bundle(folder, random):
    """Damage a file; a changed one keeps its old digest or gets a correct one."""
    names, manifest = sorted(file.name for file in folder.iterdir()), folder / MANIFEST_FILE
    content = json.loads(manifest.read_bytes())
    file = folder / one_of([name for name in names if name != MANIFEST_FILE], random)
    match one_of(("manifest", "bytes of the manifest", "exchange", "bytes", "bytes", "special"), random):
        case "manifest":
            place, key = place_in(content, random)
            action, value = random.integers(4), one_of(ODD_VALUES, random)
            if action == 0:
                del place[key]
            else:
                place["odd" if action == 1 else key] = value
            _replace(manifest, json.dumps(content).encode())
        case "bytes of the manifest":
            _replace(manifest, damaged(manifest.read_bytes(), random))
        case "exchange":
            other = (folder / one_of(names, random)).read_bytes()
            file.unlink()
            if random.random() < 0.8:
                file.write_bytes(other)
        case "bytes":
            changed = damaged(file.read_bytes(), random)
            _replace(file, changed)
            if random.random() < 0.7:
                content["files"][file.name] = {"sha256": hashlib.sha256(changed).hexdigest(), "size": len(changed)}
                _replace(manifest, json.dumps(content).encode())
        case _:
            file = one_of((file, manifest), random)
            file.unlink()
            one_of((lambda: file.symlink_to(file), file.mkdir, lambda: os.mkfifo(file)), random)()


def _replace(file, content):
    """Write a new file instead of writing through the link, so that the original does not change."""
    file.unlink()
    file.write_bytes(content)


# -------------------- train.yaml: changed values, and odd texts, aliases and nesting that YAML allows

_ODD_SETTINGS = (
    *ODD_VALUES, 3, 1000, 20_000, 10**6, "1e-5", "1e999", "y" * 300, "null", "transformer", "conformer", "conv2d8",
    "moe", "gated", "batch_norm", "rms_norm", "abs_pos", "selfattn", {None: 1}, b"\xff\x00",
)  # fmt: skip
_ODD_TEXTS = (
    "!!timestamp x", "!!bool x", "!!int ''", "!!float x", "!!binary x", "!!set {a, b}", "!!omap [a: 1]", "!!null x",
    "!!python/name:os.system", "!!python/object/apply:os.system [id]", "2001-13-45", "2001-01-01", "*nothing",
    "0x" + "f" * 30_000, "9" * 5_000, "1:" * 5_000 + "1", "&a [*a]", "&b {c: *b}", "<<", "{<<: 1}", "{? [1] : 2}",
    "'open", "|\n ", "\t", "%", "---", "...", "\u2028", "\x07",
)  # fmt: skip
_ENCODINGS = ("utf-8-sig", "utf-16", "utf-32", "latin-1", "gbk", "cp037")


def use_damaged_configs(originals, folder):
    """Return a function that reads a damaged file and builds its network, without weights."""
    texts, file = [original.read_text(encoding="utf-8") for original in originals], folder / "train.yaml"

    def use(random):
        file.write_bytes(damaged_config(texts, random))
        with warnings.catch_warnings(action="error"):
            expected_shapes(read_training_config(file).architecture)
        return "accepted"

    return use


def damaged_config(originals, random):
    """Return one of the originals with changed values, then changed text, encoding or bytes."""
    config = yaml.safe_load(one_of(originals, random))
    for _ in range(random.integers(0, 4)):
        _change_setting(config, random)
    text = yaml.dump(config, allow_unicode=bool(random.random() < 0.5), default_flow_style=one_of((None, True), random))
    for _ in range(random.integers(0, 3) if random.random() < 0.5 else 0):
        text = _with_changed_text(text, random)
    if random.random() < 0.1:
        return text.encode(one_of(_ENCODINGS, random), errors="replace")
    content = text.encode("utf-8", errors="surrogatepass")
    return damaged(content, random) if random.random() < 0.2 else content


def _change_setting(config, random):
    (place, key), (other, other_key) = place_in(config, random), place_in(config, random)
    value = copy.deepcopy(one_of(_ODD_SETTINGS, random))
    match one_of(("replace", "replace", "replace", "delete", "add", "share", "nest"), random):
        case "replace":
            place[key] = value
        case "delete":
            if len(config) > 1:
                del place[key]
        case "add":  # a key that is unknown there, or that belongs elsewhere
            keys = (other_key, "odd", 3, None, True, "n_expert", "mlp_type", "head_dim", "n_kv_head")
            place[one_of(keys, random)] = value
        case "share":  # yaml.dump writes an alias
            other[other_key] = place[key]
        case _:
            for _ in range(int(2 ** random.uniform(0, 6))):
                place[key] = [place[key]] if random.random() < 0.5 else {"a": place[key]}


def _with_changed_text(text, random):
    lines, action = text.split("\n"), random.integers(4)
    if action == 0:  # odd text in place of a value or a line
        number = random.integers(len(lines))
        key, colon, _ = lines[number].partition(": ")
        lines[number] = f"{key}{colon if random.random() < 0.9 else ''}{one_of(_ODD_TEXTS, random)}"
        return "\n".join(lines)
    if action == 1:  # aliases of aliases, in lists or merged mappings, which grow exponentially
        width, depth = random.integers((2, 1), (20, 40)).tolist()
        form = one_of(("[{}]", "{{<<: [{}]}}"), random)
        own = [f"a{level}: &a{level} {form.format(', '.join([f'*a{level - 1}'] * width))}" for level in range(1, depth)]
        return "\n".join(["a0: &a0 {x: 1}", *own, text, f"encoder_conf: *a{depth - 1}", ""])
    if action == 2:  # a line or the whole file many times
        return text + f"\n{one_of((*lines, text), random)}" * int(2 ** random.uniform(0, 12))
    # a value inside many brackets, closed or not
    depth, bracket = int(2 ** random.uniform(0, 17)), one_of(("[", "{a: ", "- ", "? "), random)
    closing = {"[": "]", "{a: ": "}"}.get(bracket, "") * depth
    return f"{text}\nodd: {bracket * depth}1{closing if random.random() < 0.5 else ''}\n"


# -------------------- language models: changed numbers, words, lines and bytes, some with a recomputed digest

_ODD_FIELDS = (
    "nan", "inf", "-inf", "-99", "0", "1", "-1e999", "1e999", "-0", "0x1", "", "<s>", "</s>", "<unk>", "\\end\\",
    "\\data\\", "\\9-grams:", "ngram 1=99999999999", "ngram 2=0", "\ud800", "\0", "\u2581", "\u4f60" * 200,
)  # fmt: skip


def use_damaged_models(vocabulary, folder):
    """Return a function that reads a damaged model and searches random log-probabilities with it."""
    originals, file = _models(vocabulary, folder), folder / "damaged.lm"

    def use(random):
        file.write_bytes(damaged_model(one_of(originals, random), random))
        options = LanguageModelOptions(model=LanguageModel.open(file), weight=random.uniform(0, 3))
        log_probs = np.log(random.dirichlet(np.full(len(vocabulary), 0.1), 12) + 1e-9).astype(np.float32)
        found = ctc_prefix_beam_search(log_probs, 4, fusion=Fusion(options, vocabulary))
        if not all(np.isfinite(hypothesis.score) for hypothesis in found):
            raise ArithmeticError("a score is not finite")
        return "accepted"

    return use


def damaged_model(original, random):
    """Return a file with damage to its bytes, or to its content with a recomputed digest."""
    if random.random() < 0.3:
        return damaged(original, random)
    if original.startswith(MAGIC):
        content = damaged(original[len(MAGIC) + DIGEST_SIZE :], random)
        return MAGIC + hashlib.sha256(content).digest() + content
    is_compressed = original.startswith(b"\x1f\x8b")
    lines = (gzip.decompress(original) if is_compressed else original).decode().split("\n")
    for _ in range(random.integers(1, 4)):
        place, other = random.integers(len(lines), size=2)
        fields, action = lines[place].split("\t"), random.integers(4)
        if action == 0:
            fields[random.integers(len(fields))] = one_of(_ODD_FIELDS, random)
            lines[place] = "\t".join(fields)
        elif action == 1:
            del lines[place]
        elif action == 2:
            lines.insert(place, lines[other])
        else:
            lines[place], lines[other] = lines[other], lines[place]
    changed = "\n".join(lines).encode(errors="surrogatepass")
    return gzip.compress(changed, mtime=0) if is_compressed else changed


def _models(vocabulary, folder):
    """Return a small model in every format."""
    random = np.random.default_rng(0)
    drawn = [random.integers(3, len(vocabulary), random.integers(1, 4)).tolist() for _ in range(30)]
    words = [vocabulary.text(tokens).replace(" ", "") or "A" for tokens in drawn]
    text = [[one_of(words, random) for _ in range(8)] for _ in range(60)]
    ngrams, files = train(count_ngrams(text, 3), TrainingOptions(order=3)), []
    for suffix in ("arpa", "arpa.gz"):
        files.append(folder / f"original.{suffix}")
        write_arpa(ngrams, files[-1])
    for bits in BITS:
        files.append(folder / f"original{bits}.lm")
        write_compact(read_arpa(files[0]), files[-1], bits=bits)
    return [file.read_bytes() for file in files]
