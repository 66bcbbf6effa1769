"""Language models with changed numbers, words and lines, and changed bytes, some with a recomputed digest."""

import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from damage import damaged, one_of

from u2moe.runtime import Fusion, LanguageModel, LanguageModelOptions, ctc_prefix_beam_search
from u2moe.runtime.language.files import BITS, DIGEST_SIZE, MAGIC, read_arpa, write_arpa, write_compact
from u2moe.runtime.language.kneser_ney import TrainingOptions, count_ngrams, train
from u2moe.runtime.text.vocabulary import Vocabulary

_ODD_FIELDS = (
    "nan", "inf", "-inf", "-99", "0", "1", "-1e999", "1e999", "-0", "0x1", "", "<s>", "</s>", "<unk>", "\\end\\",
    "\\data\\",
    "\\9-grams:", "ngram 1=99999999999", "ngram 2=0", "\ud800", "\0", "\u2581", "\u4f60" * 200,
)  # fmt: skip
_NUM_FRAMES = 12
_WORDS = 30


def use_damaged_models(vocabulary: Vocabulary, folder: Path) -> Callable[[np.random.Generator], str]:
    """Return a function that reads a damaged model and searches random log-probabilities with it."""
    originals = _originals(vocabulary, folder)
    file = folder / "damaged.lm"

    def use(random: np.random.Generator) -> str:
        file.write_bytes(damaged_model(one_of(originals, random), random))
        options = LanguageModelOptions(model=LanguageModel.open(file), weight=float(random.uniform(0, 3)))
        log_probs = np.log(random.dirichlet(np.full(len(vocabulary), 0.1), _NUM_FRAMES) + 1e-9).astype(np.float32)
        found = ctc_prefix_beam_search(log_probs, 4, fusion=Fusion(options, vocabulary))
        if not all(np.isfinite(hypothesis.score) for hypothesis in found):
            raise ArithmeticError("a score is not finite")
        return "accepted"

    return use


def damaged_model(original: bytes, random: np.random.Generator) -> bytes:
    """Return a file with damage to its bytes, or to its content with a recomputed digest."""
    if random.random() < 0.3:
        return damaged(original, random)
    if original.startswith(MAGIC):
        content = damaged(original[len(MAGIC) + DIGEST_SIZE :], random)
        return MAGIC + hashlib.sha256(content).digest() + content
    is_compressed = original.startswith(b"\x1f\x8b")
    lines = (gzip.decompress(original) if is_compressed else original).decode().split("\n")
    for _ in range(int(random.integers(1, 4))):
        place = int(random.integers(len(lines)))
        fields = lines[place].split("\t")
        action = int(random.integers(4))
        if action == 0:
            fields[int(random.integers(len(fields)))] = one_of(_ODD_FIELDS, random)
            lines[place] = "\t".join(fields)
        elif action == 1:
            del lines[place]
        elif action == 2:
            lines.insert(place, one_of(lines, random))
        else:
            other = int(random.integers(len(lines)))
            lines[place], lines[other] = lines[other], lines[place]
    changed = "\n".join(lines).encode(errors="surrogatepass")
    return gzip.compress(changed, mtime=0) if is_compressed else changed


def _originals(vocabulary: Vocabulary, folder: Path) -> list[bytes]:
    """Return a small model in every format."""
    random = np.random.default_rng(0)
    drawn = [random.integers(3, len(vocabulary), random.integers(1, 4)).tolist() for _ in range(_WORDS)]
    words = [vocabulary.text(tokens).replace(" ", "") or "A" for tokens in drawn]
    text = [[one_of(words, random) for _ in range(8)] for _ in range(60)]
    ngrams = train(count_ngrams(text, 3), TrainingOptions(order=3))
    files = [folder / "original.arpa", folder / "original.arpa.gz"]
    for file in files:
        write_arpa(ngrams, file)
    ngrams = read_arpa(files[0])
    for bits in BITS:
        files.append(folder / f"original{bits}.lm")
        write_compact(ngrams, files[-1], bits=bits)
    return [file.read_bytes() for file in files]
