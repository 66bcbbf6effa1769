"""Aligns recordings with their transcripts with PocketSphinx, to find the word and the phone of each frame."""

from dataclasses import dataclass

import numpy as np

from u2moe.runtime.audio.arrays import Samples

SAMPLE_RATE = 16000
FRAMES_PER_S = 100
SILENCE = "SIL"
FILLERS = "<[+"
"""Characters with which the names of pauses and noises begin."""
CLASSES = {
    "vowels": "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW",
    "glides": "L R W Y",
    "nasals": "M N NG",
    "fricatives": "DH F HH S SH TH V Z ZH",
    "stops": "B CH D G JH K P T",
    "silence": SILENCE,
}
"""Phones of the CMU dictionary, and pauses. Affricates are listed with the stops."""
PHONES = tuple(phone for names in CLASSES.values() for phone in names.split())


@dataclass(frozen=True)
class Stretch:
    """Frames of 10 ms from `first` to `end` (exclusive), and the word in them. None: a pause or a noise."""

    word: str | None
    first: int
    end: int


class Aligner:
    """PocketSphinx with its own English model and dictionary."""

    def __init__(self) -> None:
        import pocketsphinx  # noqa: PLC0415 - the tables of phones do not need it

        self.decoder = pocketsphinx.Decoder(lm=None, loglevel="FATAL", bestpath=False)

    def words(self, samples: Samples, transcript: str) -> list[Stretch] | None:
        """Return the times of each word. None: the dictionary lacks a word, or the transcript does not match."""
        try:
            self.decoder.set_align_text(transcript.lower())
            self._hear(samples)
        except RuntimeError:
            return None
        words = transcript.split()
        found = [(None if part.word[0] in FILLERS else words.pop(0), part) for part in self.decoder.seg() or ()]
        return [Stretch(word, part.start_frame, part.end_frame + 1) for word, part in found] or None

    def phones(self, samples: Samples, transcript: str) -> list[str] | None:
        """Return the phone in each frame of 10 ms. None: as for `words`."""
        if self.words(samples, transcript) is None:
            return None
        try:
            self.decoder.set_alignment()  # aligns the phones of the words that `words` has aligned
            self._hear(samples)
        except RuntimeError:
            return None
        found = [SILENCE] * (len(samples) * FRAMES_PER_S // SAMPLE_RATE)
        for word in self.decoder.get_alignment():
            for phone in word:
                name = phone.name if phone.name in PHONES else SILENCE  # breaths and noises
                for frame in range(phone.start, min(phone.start + phone.duration, len(found))):
                    found[frame] = name
        return found

    def _hear(self, samples: Samples) -> None:
        pcm = (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()
        self.decoder.start_utt()
        self.decoder.process_raw(pcm, full_utt=True)
        self.decoder.end_utt()
