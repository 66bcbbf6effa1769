/** Names of options. Written by runtime/cpp/declared.py: do not change it here. */

export const STREAM_OPTIONS = ["ctcWeight", "reverseWeight", "beamSize", "paddingS", "blankPenalty", "search", "lengthPenalty", "chunkSize", "numLeftChunks", "endpoint", "languageModel", "grammar", "written"];
export const LANGUAGE_MODEL_OPTIONS = ["weight", "wordBonus", "unknownScore", "rescoringWeight", "level"];
export const VAD_OPTIONS = ["threshold", "endThreshold", "minSilence", "padding"];
