"""Which phone is heard when: a forced alignment of recordings with their transcripts by PocketSphinx."""

import numpy as np

from u2moe.runtime.features import Samples

SAMPLE_RATE = 16000
FRAMES_PER_S = 100
SILENCE = "SIL"
CLASSES = {
    "vowels": "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW",
    "glides": "L R W Y",
    "nasals": "M N NG",
    "fricatives": "DH F HH S SH TH V Z ZH",
    "stops": "B CH D G JH K P T",
    "silence": SILENCE,
}
"""Phones of the CMU dictionary (its affricates are with the stops), and pauses."""
PHONES = tuple(phone for names in CLASSES.values() for phone in names.split())


class Aligner:
    """PocketSphinx with its own English model and dictionary."""

    def __init__(self) -> None:
        import pocketsphinx  # noqa: PLC0415 - the tables of phones are needed without it

        self.decoder = pocketsphinx.Decoder(lm=None, loglevel="FATAL", bestpath=False)

    def __call__(self, samples: Samples, transcript: str) -> list[str] | None:
        """The phone in each frame of 10 ms; None if the dictionary lacks a word, or nothing fits the transcript."""
        pcm = (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()
        try:
            self.decoder.set_align_text(transcript.lower())
            self._hear(pcm)
            self.decoder.set_alignment()  # of the words that were just aligned: their phones
            self._hear(pcm)
        except RuntimeError:
            return None
        found = [SILENCE] * (len(samples) * FRAMES_PER_S // SAMPLE_RATE)
        for word in self.decoder.get_alignment():
            for phone in word:
                name = phone.name if phone.name in PHONES else SILENCE  # breaths and noises
                for frame in range(phone.start, min(phone.start + phone.duration, len(found))):
                    found[frame] = name
        return found

    def _hear(self, pcm: bytes) -> None:
        self.decoder.start_utt()
        self.decoder.process_raw(pcm, full_utt=True)
        self.decoder.end_utt()
