"""A toy model that recognises tones as words, in place of a bundle and its graphs."""

import numpy as np

from u2moe.runtime import ProviderError, Recognizer
from u2moe.runtime.bundle.contract import Cache
from u2moe.runtime.bundle.manifest import DecodingConfig, FeatureConfig, Manifest, ModelConfig
from u2moe.runtime.model.encoder import Encoder
from u2moe.runtime.text.vocabulary import TextConfig, Vocabulary

RATE = 16_000
TONES = {"A": 500, "B": 1000, "C": 2000, "D": 4000}
SYMBOLS = ["<blank>", *(f"\u2581{word}" for word in TONES), "<sos/eos>"]
CONFIG = ModelConfig(
    streaming=True, decoder="none", feature_size=80, output_size=80, num_blocks=1,
    caches=(Cache(name="att_cache", num_blocks=1, shape=(1, 0, 2)),), vocab_size=len(SYMBOLS),
    subsampling_rate=4, right_context=6, static_chunk_size=0, blank=0, sos=5, eos=5,
)  # fmt: skip
MANIFEST = Manifest(
    model=CONFIG, features=FeatureConfig(), text=TextConfig(tokenizer="bpe"), decoding=DecodingConfig(),
    producer="test", files={},
)  # fmt: skip


class ToySession:
    """A substitute for the encoder: an encoder frame is the mean of its seven frames, regardless of the caches."""

    def __init__(self):
        self.batches, self.durations = [], []
        self.fails = False

    def run(self, feeds):
        if self.fails:
            raise ProviderError("the device is gone")
        chunk, lengths = feeds["chunk"], feeds["chunk_lens"]
        self.batches.append(len(chunk))
        self.durations.append(chunk.shape[1] / 100)
        time = (chunk.shape[1] - 7) // 4 + 1
        output = np.stack([chunk[:, 4 * i : 4 * i + 7].mean(axis=1) for i in range(time)], axis=1)
        cache, num = feeds["att_cache"], feeds["required_cache_size"]
        # Cached values are ones, so that padding shows: it must be exactly at negative positions.
        following = np.concatenate([cache, np.ones((1, len(chunk), 1, time, 2), np.float32)], axis=3)
        following = following[:, :, :, max(following.shape[3] - num, 0) if num >= 0 else 0 :]
        for row, offset in enumerate(feeds["offset"].tolist()):
            positions = offset + np.arange(-cache.shape[3], 0)
            cached = cache[0, row, 0, :, 0]
            assert cached[positions >= 0].all()
            # In a batch, old values of a restarted row may remain: the graphs mask negative positions.
            assert len(chunk) > 1 or not cached[positions < 0].any()
        times = (lengths - 7) // 4 + 1
        after = feeds["offset"] + times
        return {"output": output, "output_lens": times, "next_offset": after, "r_att_cache": following}


class ToyModel:
    """Tones of at least 200 ms are words, the loudest of several; everything else is blank."""

    def __init__(self, threshold=19.0):
        self.threshold = threshold
        self.manifest, self.config, self.has_decoder, self.search_library = MANIFEST, CONFIG, False, None
        self.session = ToySession()
        self.encoder = Encoder(self.session, CONFIG)
        self.bins = [round(1127 * np.log1p(f / 700) / (1127 * np.log1p(8000 / 700) / 81)) - 1 for f in TONES.values()]

    def ctc(self, encoder_out):
        scores = np.full((len(encoder_out), CONFIG.vocab_size), -8.0)
        scores[:, 0] = 0.0
        bands = np.stack([encoder_out[:, band - 1 : band + 2].max(axis=1) for band in self.bins], axis=1)
        heard = (bands > self.threshold) & (bands == bands.max(axis=1, keepdims=True))
        scores[:, 1 : len(self.bins) + 1] = np.where(heard, 4.0, -8.0)
        return (scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))).astype(np.float32)


class ToyBundle:
    manifest = MANIFEST
    vocabulary = Vocabulary(SYMBOLS, MANIFEST.text)


def say(words, pauses, tone_s=0.3):
    """Return tones with pauses before each, and the times at which they begin."""
    parts, starts, time = [], [], 0.0
    for word, pause in zip(words, pauses, strict=True):
        starts.append(time + pause)
        parts += [
            np.zeros(round(pause * RATE)),
            0.3 * np.sin(np.arange(round(tone_s * RATE)) * 2 * np.pi * TONES[word] / RATE),
        ]
        time += pause + tone_s
    return np.concatenate([*parts, np.zeros(RATE // 2)]).astype(np.float32), starts


def toy_recognizer(threshold=19.0):
    """Return a recogniser of tones louder than `threshold`."""
    return Recognizer(ToyBundle(), ToyModel(threshold))
