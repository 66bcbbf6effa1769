"""Speech recognition with U2++ bundles on onnxruntime. Does not need PyTorch or onnx."""

try:
    import onnxruntime  # noqa: F401
except ModuleNotFoundError as error:
    from u2moe.runtime.installation import install_command

    # onnxruntime is an extra, because its CPU and GPU wheels overwrite each other. The message names both extras.
    raise ModuleNotFoundError(
        f"u2moe needs onnxruntime: {install_command('cpu')}, or [gpu] instead of [cpu]", name=error.name
    ) from None

from u2moe.runtime.audio.microphone import Microphone
from u2moe.runtime.audio.raw import RawAudio
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_writer import BundleWriter
from u2moe.runtime.decoding.context import ContextGraph, parse_hotwords
from u2moe.runtime.decoding.ctc import Hypothesis, PrefixBeamSearch, ctc_greedy_search, ctc_prefix_beam_search
from u2moe.runtime.decoding.fusion import Fusion
from u2moe.runtime.decoding.rescoring import Rescored, attention_beam_search, attention_rescoring
from u2moe.runtime.decoding.vad import VadOptions, VoiceActivityDetector

from u2moe.runtime.errors import (  # isort: skip
    AlignmentError, AudioError, AudioOverflowError, AudioWarning, BundleError, BundleWarning, CheckpointError,
    CorpusError, GrammarError, IntegrityError, KernelsError, LanguageModelError, MicrophoneError, ParityError,
    ProviderError, QuantizationError, SignatureError, StreamError, TruncatedAudioError, U2moeError, UnsupportedError,
)  # fmt: skip
from u2moe.runtime.language.model import LanguageModel, LanguageModelOptions
from u2moe.runtime.model.model import Model
from u2moe.runtime.model.native import Kernels
from u2moe.runtime.model.settings import SessionSettings
from u2moe.runtime.model.static_encoder import Runner
from u2moe.runtime.options import DecodingOptions, EndpointConfig, EndpointRule, RescoringWeights
from u2moe.runtime.recognizer import Recognizer
from u2moe.runtime.result import Alignment, Alternative, PhraseResult, Result, Transcript, WordResult
from u2moe.runtime.stream import Stream
from u2moe.runtime.text.formats import SubtitleOptions, format_transcript
from u2moe.runtime.text.grammar import Grammar
from u2moe.runtime.text.written.formatter import TextFormat, TextFormatter
from u2moe.runtime.transcriber import Transcriber

__all__ = [
    "Alignment", "AlignmentError", "Alternative", "AudioError", "AudioOverflowError", "AudioWarning", "Bundle",
    "BundleError", "BundleWarning", "BundleWriter", "CheckpointError", "ContextGraph", "CorpusError", "DecodingOptions",
    "EndpointConfig", "EndpointRule", "Fusion", "Grammar", "GrammarError", "Hypothesis", "IntegrityError", "Kernels",
    "KernelsError", "LanguageModel", "LanguageModelError", "LanguageModelOptions", "Microphone", "MicrophoneError",
    "Model", "ParityError", "PhraseResult", "PrefixBeamSearch", "ProviderError", "QuantizationError", "RawAudio",
    "Recognizer", "Rescored", "RescoringWeights", "Result", "Runner", "SessionSettings", "SignatureError", "Stream",
    "StreamError", "SubtitleOptions", "TextFormat", "TextFormatter", "Transcriber", "Transcript", "TruncatedAudioError",
    "U2moeError", "UnsupportedError", "VadOptions", "VoiceActivityDetector", "WordResult", "attention_beam_search",
    "attention_rescoring", "ctc_greedy_search", "ctc_prefix_beam_search", "format_transcript", "parse_hotwords",
]  # fmt: skip
