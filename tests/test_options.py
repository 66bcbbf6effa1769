"""Options are checked for types and ranges when they are constructed, not in the middle of a stream."""

import dataclasses
import json
import math

import numpy as np
import pytest

from u2moe.runtime import DecodingOptions, EndpointConfig, EndpointRule, SubtitleOptions, VadOptions

KINDS = (DecodingOptions, EndpointConfig, EndpointRule, SubtitleOptions, VadOptions)
NO_NUMBERS = [math.nan, math.inf, -math.inf, True, np.True_, "3", 10**400, [1], 1j]
NO_INTEGERS = [*NO_NUMBERS, 2.5, 2.0, -2, 10**9, np.float32(2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": "viterbi"}, "search must be one of attention_rescoring, .*, got 'viterbi'"),
        ({"beam_size": 0}, "beam_size must be at least 1, got 0"),
        ({"beam_size": 2.5}, "beam_size must be an integer, got 2.5"),
        ({"beam_size": 1001}, "beam_size must be at most 1000, got 1001"),
        ({"ctc_weight": -0.1}, "ctc_weight must be a number between 0 and 1e[+]09, got -0.1"),
        ({"ctc_weight": float("nan")}, "ctc_weight must be a number .*, got nan"),
        ({"reverse_weight": 1.1}, "reverse_weight must be a number between 0 and 1, got 1.1"),
        ({"length_penalty": float("inf")}, "length_penalty must be a number between -10 and 10, got inf"),
        ({"length_penalty": 700}, "length_penalty must be a number between -10 and 10, got 700"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"num_left_chunks": -2}, "num_left_chunks must be at least -1, got -2"),
        ({"endpoint": True}, "endpoint must be EndpointConfig or None, got True"),
    ],
)
def test_messages_name_the_option_what_was_found_and_what_was_expected(options, message):
    with pytest.raises(ValueError, match=message):
        DecodingOptions(**options)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, field.name)
        for kind in KINDS
        for field in dataclasses.fields(kind)
        if field.type in ("int", "int | None", "float", "float | None", "bool")
    ],
)
def test_what_is_of_another_type_is_refused_by_name(kind, name):
    declared = next(field.type for field in dataclasses.fields(kind) if field.name == name)
    wrong = NO_INTEGERS if declared.startswith("int") else [0, 1.0, None, "yes"]
    wrong = NO_NUMBERS if declared.startswith("float") else wrong
    wrong = wrong if "None" in declared or None in wrong else [*wrong, None]
    for value in wrong:
        with pytest.raises(ValueError, match=f"{name} must be"):
            kind(**{name: value})


@pytest.mark.parametrize("rule", ["rule1", "rule2", "rule3"])
def test_rules_are_rules(rule):
    with pytest.raises(ValueError, match=f"{rule} must be EndpointRule or None, got 1.2"):
        EndpointConfig(**{rule: 1.2})


def test_numbers_of_numpy_become_those_of_python():
    options = DecodingOptions(
        beam_size=np.int64(4), chunk_size=np.uint8(16), num_left_chunks=np.int32(-1), ctc_weight=np.float32(0.5)
    )
    assert options == DecodingOptions(beam_size=4, chunk_size=16, ctc_weight=0.5)
    assert json.loads(json.dumps(dataclasses.asdict(options)))["beam_size"] == 4
    assert EndpointRule(min_trailing_silence=np.float64(1.0)) == EndpointRule(min_trailing_silence=1)
