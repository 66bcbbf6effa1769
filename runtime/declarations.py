"""Option declarations. A dataclass field declares its type, its limits and who may set it.

    class Options:
        beam_size: int | None = option("integer", 10, least=1, most=1000, in_bundle=True, flag="--beam-size")

`options_of(Options)` returns `{"beam_size": Option(...)}`. The command line, the server, the bundle format, the
documentation pages and the tables of the other runtimes all use these declarations.
"""

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
"""Key in the JSON of a record. Its value maps each field that older programs may ignore to the feature that they then
lack."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """Declaration of an option: its type, its limits and who may set it."""

    kind: Kind  # a "record" is an instance of the class `record`, or one of `choices`
    default: Any = None  # MISSING: required. None: it depends on the model or the call; see `otherwise`
    least: float | None = None  # limits; None: unlimited
    above: float | None = None  # exclusive lower limit, instead of `least`
    most: float | None = None
    unit: str = ""  # of a number, such as "seconds"
    choices: tuple[str, ...] = ()
    record: type | None = None
    in_bundle: bool = False  # whether a bundle may set the default; if so, None means the bundle's default
    can_be_off: bool = False  # whether None is allowed as a value
    # Fields of this declaration that differ for clients of the server, and "name" if theirs differs. None: not theirs
    client: Mapping[str, Any] | None = None
    flag: str | None = None  # command-line option; None: there is none
    metavar: str | None = None  # of the value in the command-line help; by default N for an integer and X for a number
    help: str = ""  # first sentence about the option in the docstring of its class
    otherwise: str = ""  # meaning of None, from the same docstring
    lost: str = ""  # what an older program that ignores this option of a bundle lacks; empty: it must refuse the bundle

    @property
    def may_be_none(self) -> bool:
        """Whether None is allowed, either as a value or to select a default."""
        return self.in_bundle or self.can_be_off or self.default is None

    @property
    def about(self) -> str:
        """Help text, with the lower and the upper limit of the value if both exist."""
        is_limited = self.least is not None and self.most is not None and self.most <= MOST_INTEGER
        return f"{self.help}; {self.least:g} to {self.most:g}" if is_limited else self.help

    def checked(self, name: str, value: Any) -> Any:
        """Check a value, and return it as a plain Python type. Raises FieldError with `name` if it is invalid."""
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
    """Return a dataclass field with its declaration; see `Option`. With `in_bundle`, the field's default is None."""
    metavar = {"integer": "N", "number": "X"}.get(kind)
    found = Option(kind=kind, default=default, **{"metavar": metavar, **declared})
    return dataclasses.field(default=None if found.in_bundle else default, metadata={_DECLARED: found})


@functools.cache
def options_of(kind: Any) -> dict[str, Option]:
    """Return all options of a dataclass by name, including inherited ones. Help texts come from its docstring."""
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
    """Return the options that clients of the server may set: by the client's name, the field and its declaration."""
    found = {}
    for field, declared in options_of(kind).items():
        if declared.client is not None:
            own = dict(declared.client)
            name = own.pop("name", field)
            found[name] = (field, dataclasses.replace(declared, **own))
    return found


class Checked:
    """Base of dataclasses of options. A new instance has plain values, all valid; else FieldError names the option."""

    def __post_init__(self: Any) -> None:  # mypy: a class is hashable only as Any
        for name, declared in options_of(self.__class__).items():
            value = getattr(self, name)
            if value is not None or not declared.may_be_none:
                object.__setattr__(self, name, declared.checked(name, value))


class Definite(Checked):
    """`Checked` in which each `in_bundle` option that is None gets the library's default."""

    def __post_init__(self: Any) -> None:
        for name, declared in options_of(self.__class__).items():
            if declared.in_bundle and getattr(self, name) is None:
                object.__setattr__(self, name, declared.default)
        super().__post_init__()


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the library's default of a field; `dataclasses.MISSING` if the field is required."""
    if _DECLARED in field.metadata:
        return field.metadata[_DECLARED].default
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def plain(value: Any) -> Any:
    """Return a value as plain data for JSON. Dataclass fields that have their default value are omitted."""
    if dataclasses.is_dataclass(value):
        stated = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)
                  if getattr(value, each.name) != default_of(each)}  # fmt: skip
        options = options_of(value.__class__)
        lost = {name: options[name].lost for name in stated if name in options and options[name].lost}
        return plain(stated) | ({HARMLESS: lost} if lost else {})
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, tuple | list) else value
