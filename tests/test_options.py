"""Options are checked for types and ranges at construction, not in the middle of a stream."""

import dataclasses
import json
import math

import numpy as np
import pytest

from u2moe.export import SherpaOptions
from u2moe.quantize import Goal
from u2moe.runtime import DecodingOptions, EndpointConfig, EndpointRule, RescoringWeights, TextFormat, VadOptions
from u2moe.runtime.bundle.manifest import Calibration, FeatureConfig
from u2moe.runtime.corpus.lists import ListOptions
from u2moe.runtime.corpus.runner import CorpusOptions
from u2moe.runtime.declarations import options_of
from u2moe.runtime.language.kneser_ney import TrainingOptions
from u2moe.runtime.language.model import FusionWeights
from u2moe.runtime.text.formats import SubtitleOptions

KINDS = (
    DecodingOptions, RescoringWeights, EndpointConfig, EndpointRule, FusionWeights, SubtitleOptions, VadOptions,
    TrainingOptions, ListOptions, CorpusOptions, FeatureConfig, Calibration, TextFormat, SherpaOptions, Goal,
)  # fmt: skip
NO_NUMBERS = [math.nan, math.inf, -math.inf, True, np.True_, "3", 10**400, [1], 1j]
NO_INTEGERS = [*NO_NUMBERS, 2.5, 2.0, -2, 10**9, np.float32(2)]


@pytest.mark.parametrize(("options", "message"), [
    ({"search": "viterbi"}, "search must be one of attention_rescoring, .*, got 'viterbi'"),
    ({"endpoint": True}, "endpoint must be EndpointConfig or None, got True"),
])  # fmt: skip
def test_messages_name_the_option_what_was_found_and_what_was_expected(options, message):
    with pytest.raises(ValueError, match=message):
        DecodingOptions(**options)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in options_of(kind)])
def test_what_is_of_another_type_beyond_a_limit_or_no_choice_is_refused_by_name(kind, name):
    declared = options_of(kind)[name]
    wrong = {"integer": NO_INTEGERS, "number": NO_NUMBERS, "flag": [0, 1.0, "yes"]}.get(declared.kind, [3.5])
    below, above = (lambda limit: limit - 1, lambda limit: limit + 1)
    if declared.kind == "number":
        below, above = (lambda limit: math.nextafter(limit, -math.inf), lambda limit: math.nextafter(limit, math.inf))
    limits = [(declared.above, float), (declared.least, below), (declared.most, above)]
    beyond = [step(limit) for limit, step in limits if limit is not None]
    others = [*([] if declared.may_be_none else [None]), *(["none of them"] if declared.choices else beyond)]
    for value in (*wrong, *others):
        with pytest.raises(ValueError, match=f"{name} must be"):
            kind(**{name: value})


def test_numbers_of_numpy_become_those_of_python():
    options = DecodingOptions(beam_size=np.int64(4), chunk_size=np.uint8(16), ctc_weight=np.float32(0.5))
    assert options == DecodingOptions(beam_size=4, chunk_size=16, ctc_weight=0.5)
    assert json.loads(json.dumps(dataclasses.asdict(options)))["beam_size"] == 4
    assert EndpointRule(min_trailing_silence=np.float64(1.0)) == EndpointRule(min_trailing_silence=1)
