"""Declarations of options: a field of a dataclass says what it may be and who may choose it; all else follows by loop.

    class Options:
        beam_size: int | None = option("integer", 10, least=1, most=1000, in_bundle=True, flag="--beam-size")

`options_of(Options)` is `{"beam_size": Option(...)}`: commands, server, bundles, pages and the other runtimes' tables
follow from it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from u2moe.runtime.validation import (
    MOST_INTEGER,
    checked_choice,
    checked_flag,
    checked_integer,
    checked_number,
    checked_text,
    wrong,
)

Kind = Literal["integer", "number", "flag", "choice", "text", "texts", "path", "record"]

_DECLARED = "option"
_ATTRIBUTE = re.compile(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)
HARMLESS = "harmless"
"""Key beside the fields of a record in JSON: those without which older programs still work, and what they then lose."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """What a field may be, and who may choose it.

    Attributes:
        kind: "integer" and "number" have limits; a "choice" is one of `choices`; a "record" may be one of them, too.
        default: the library's; MISSING: it has to be given; None: what depends on the model or the call (`otherwise`).
        least: smallest value; None: any.
        above: alternatively, an exclusive lower limit.
        most: largest value; None: any.
        unit: of a number, such as "seconds".
        choices: the texts that it may be.
        record: the class of its values.
        in_bundle: whether a bundle may choose the default: None stands for it where the option is left open.
        can_be_off: whether None is a value, too.
        client: what differs where a client of the server chooses it, and perhaps its "name" there; None: none may.
        flag: option of the command line that sets it; None: none.
        metavar: what the help of the command line calls its value.
        help: the first sentence about it in the docstring of its class.
        otherwise: what holds if it is None, by the same docstring.
        lost: what a program loses that is older than the option and meets it in a bundle; empty: it must not go on.
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
    client: Mapping[str, Any] | None = None
    flag: str | None = None
    metavar: str | None = None
    help: str = ""
    otherwise: str = ""
    lost: str = ""

    @property
    def may_be_none(self) -> bool:
        """Whether None is a value, or stands for a default that is found elsewhere."""
        return self.in_bundle or self.can_be_off or self.default is None

    @property
    def about(self) -> str:
        """What it means, and between what limits, for people."""
        is_limited = self.least is not None and self.most is not None and self.most <= MOST_INTEGER
        return f"{self.help}; {self.least:g} to {self.most:g}" if is_limited else self.help

    def checked(self, name: str, value: Any) -> Any:
        """A value as a plain one of Python; FieldError: it may not be this; names it."""
        match self.kind:
            case "integer":
                most = MOST_INTEGER if self.most is None else int(self.most)
                return checked_integer(name, value, least=int(self.least or 0), most=most)
            case "number":
                return checked_number(name, value, least=self.least, above=self.above, most=self.most, unit=self.unit)
            case "flag":
                return checked_flag(name, value)
            case "choice":
                return checked_choice(name, value, self.choices)
            case "text":
                return checked_text(name, value)
            case "texts":
                return tuple(checked_text(name, each) for each in value)
            case "path":
                return Path(value)
        if isinstance(value, self.record or ()) or (isinstance(value, str) and value in self.choices):
            return value
        expected = ", ".join((self.record.__name__ if self.record else "", *map(repr, self.choices)))
        raise wrong(name, expected + " or None" * self.may_be_none, value)


def option(kind: Kind, default: Any = None, **declared: Any) -> Any:
    """A field of a dataclass with its declaration, see `Option`; what a bundle may choose is None until then."""
    found = Option(kind=kind, default=default, **declared)
    return dataclasses.field(default=None if found.in_bundle else default, metadata={_DECLARED: found})


@functools.cache
def options_of(kind: Any) -> dict[str, Option]:
    """The options that a dataclass declares and inherits, by name, in order, with what its docstring says of them."""
    told = dict(_ATTRIBUTE.findall(inspect.cleandoc(kind.__doc__ or "")))
    found = {}
    for each in dataclasses.fields(kind):
        if _DECLARED in each.metadata:
            about, _, otherwise = " ".join(told.get(each.name, "").replace("`", "").split()).partition(" None: ")
            first = {"help": about, "otherwise": otherwise}
            first = {name: text.partition(". ")[0].rstrip(".;") for name, text in first.items()}
            found[each.name] = dataclasses.replace(each.metadata[_DECLARED], **first)
    return found


@functools.cache
def client_options_of(kind: Any) -> dict[str, tuple[str, Option]]:
    """By the names that clients of the server use: the field, and what a client may choose for it."""
    found = {}
    for field, declared in options_of(kind).items():
        if declared.client is not None:
            own = dict(declared.client)
            name = own.pop("name", field)
            found[name] = (field, dataclasses.replace(declared, **own))
    return found


def check_options(options: Any) -> None:
    """Check every option of a new dataclass, and store what was found; FieldError: one is wrong; names it."""
    for name, declared in options_of(options.__class__).items():
        value = getattr(options, name)
        if value is not None or not declared.may_be_none:
            object.__setattr__(options, name, declared.checked(name, value))


def take_defaults(options: Any) -> None:
    """Give every option that a bundle may choose, and that is None, the library's default."""
    for name, declared in options_of(options.__class__).items():
        if declared.in_bundle and getattr(options, name) is None:
            object.__setattr__(options, name, declared.default)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The library's default of a field; `dataclasses.MISSING`: it has to be given."""
    if _DECLARED in field.metadata:
        return field.metadata[_DECLARED].default
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def plain(value: Any) -> Any:
    """Records as JSON, without fields that are at their default."""
    if dataclasses.is_dataclass(value):
        stated = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)
                  if getattr(value, each.name) != default_of(each)}  # fmt: skip
        options = options_of(value.__class__)
        lost = {name: options[name].lost for name in stated if name in options and options[name].lost}
        return plain(stated) | ({HARMLESS: lost} if lost else {})
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, tuple | list) else value
