"""Declarations of options: a field of a dataclass says what it may be and who may choose it; all else follows by loop.

    class Options:
        beam_size: int | None = option("integer", 10, least=1, most=1000, in_bundle=True, flag="--beam-size")

`options_of(Options)` is `{"beam_size": Option(...)}`: commands, server, bundles, pages and the other runtimes' tables
follow from it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from u2moe.runtime.validation import MOST_INTEGER, checked_flag, checked_integer, checked_number

_DECLARED = "option"

Kind = Literal["integer", "number", "flag", "choice", "record"]


@dataclass(frozen=True, kw_only=True)
class ClientOption:
    """An option as a client of the server may choose it; what is None is as in the option's declaration.

    Attributes:
        name: its name in messages and forms.
        kind: what the client sends.
        least: smallest value of a client.
        most: largest value of a client.
        help: what it means to a client.
    """

    name: str | None = None
    kind: Kind | None = None
    least: float | None = None
    most: float | None = None
    help: str = ""


@dataclass(frozen=True, kw_only=True)
class Option:
    """What a field may be, and who may choose it.

    Attributes:
        kind: "integer" and "number" have limits; a "choice" is one of `choices`; a "record" may be one of them, too.
        default: the library's; None: something that depends on the model or the call, which `otherwise` says.
        least: smallest value; None: any.
        above: alternatively, an exclusive lower limit.
        most: largest value; None: any.
        unit: of a number, such as "seconds".
        choices: the texts that it may be.
        record: the class of its values.
        in_bundle: whether a bundle may choose the default: None stands for it where the option is left open.
        can_be_off: whether None is a value, too.
        client: how a client of the server may choose it; None: not at all.
        flag: option of the command line that sets it; None: none.
        metavar: what its help calls the value.
        help: what it means, in a line.
        otherwise: what holds if it is not chosen, where that is no value.
    """

    kind: Kind
    default: Any = None
    least: float | None = None
    above: float | None = None
    most: float | None = None
    unit: str = ""
    choices: tuple[str, ...] = ()
    record: type | None = None
    in_bundle: bool = False
    can_be_off: bool = False
    client: ClientOption | None = None
    flag: str | None = None
    metavar: str | None = None
    help: str = ""
    otherwise: str = ""

    @property
    def may_be_none(self) -> bool:
        """Whether None is a value, or stands for a default that is found elsewhere."""
        return self.in_bundle or self.can_be_off or self.default is None

    def checked(self, name: str, value: object) -> Any:
        """A value as a plain one of Python; ValueError: it may not be this; names it."""
        if self.kind == "integer":
            most = MOST_INTEGER if self.most is None else int(self.most)
            return checked_integer(name, value, least=int(self.least or 0), most=most)
        if self.kind == "number":
            return checked_number(name, value, least=self.least, above=self.above, most=self.most, unit=self.unit)
        if self.kind == "flag":
            return checked_flag(name, value)
        if isinstance(value, str) and value in self.choices:
            return value
        if self.record is not None and isinstance(value, self.record):
            return value
        expected = f"one of {', '.join(self.choices)}"
        if self.record is not None:
            expected = ", ".join((self.record.__name__, *map(repr, self.choices))) + " or None" * self.may_be_none
        raise ValueError(f"{name} must be {expected}, got {value!r:.80}")


def option(kind: Kind, default: Any = None, **declared: Any) -> Any:
    """A field of a dataclass with its declaration, see `Option`; what a bundle may choose is None until then."""
    found = Option(kind=kind, default=default, **declared)
    return dataclasses.field(default=None if found.in_bundle else default, metadata={_DECLARED: found})


def options_of(kind: Any) -> dict[str, Option]:
    """The options that a dataclass declares and inherits, by name, in order."""
    fields = dataclasses.fields(kind)
    return {each.name: each.metadata[_DECLARED] for each in fields if _DECLARED in each.metadata}


def check_options(options: Any) -> None:
    """Check every option of a new dataclass, and store what was found; ValueError: one is wrong; names it."""
    for name, declared in options_of(type(options)).items():
        value = getattr(options, name)
        if value is not None or not declared.may_be_none:
            object.__setattr__(options, name, declared.checked(name, value))


def take_defaults(options: Any) -> None:
    """Give every option that a bundle may choose, and that is None, the library's default."""
    for name, declared in options_of(type(options)).items():
        if declared.in_bundle and getattr(options, name) is None:
            object.__setattr__(options, name, declared.default)
