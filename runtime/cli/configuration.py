"""Options used every day, from a TOML file, as defaults of the command line; and `u2moe config`, which shows them."""

from __future__ import annotations

import argparse
import contextlib
import os
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from u2moe.runtime.cli.language_model import DEMO
from u2moe.runtime.cli.options import Subparsers
from u2moe.runtime.cli.terminal import print_result

_NOT_KEPT = ("help", "config", "version")
_NAMES_OF_FILES = ("manifest", "lm")
"""Options, by their destinations, that name a file, or what is none: an address, or the demo's language model."""


class _Replaceable(list[Any]):
    """Values of an option that may be repeated, of which nothing is left where the command line has some.

    argparse appends those to a copy of the default.
    """

    def __copy__(self) -> list[Any]:
        return []


def add_config(subparsers: Subparsers) -> None:
    """`u2moe config`."""
    parser = subparsers.add_parser(
        "config",
        help="show the options of the configuration file",
        description="Check the configuration file, and show its options. It is TOML: options by their names, in a "
        "table for each command, or before the tables for all commands that have them.",
    )
    parser.set_defaults(run=run_config)


def run_config(args: argparse.Namespace) -> int:
    """Check the file for all commands, and show what it sets."""
    file = args.config or default_file()
    if file is None or not (args.config or file.exists()):
        print_result(f"no options are set: {file or 'the configuration file'} does not exist\n")
        return 0
    content = _read(file)
    lines = [f"# {file}\n"]
    lines += [f"{name} = {_shown(value)}\n" for name, value in content.items() if not isinstance(value, dict)]
    for command, parser in _all_parsers().items():
        defaults = _defaults(file, content, command, parser)
        section = content.get(command, {})
        if section:
            lines.append(f"\n[{command}]\n")
            lines += [f"{name} = {_shown(defaults[_action(parser, name).dest])}\n" for name in section]
    print_result("".join(lines))
    return 0


def default_file() -> Path | None:
    """~/.config/u2moe/config.toml, or in $XDG_CONFIG_HOME; None: there is no home folder."""
    folder = os.environ.get("XDG_CONFIG_HOME")
    with contextlib.suppress(RuntimeError):
        return (Path(folder) if folder else Path.home() / ".config") / "u2moe" / "config.toml"
    return None


def apply_configuration(arguments: list[str], command: str, parser: argparse.ArgumentParser) -> None:
    """Take the options of a command from the file in its arguments, or else from the default file, if there is one.

    Raises:
        ValueError: the file cannot be read, has a table for no command or an option that none knows, or an impossible
            value; names them.
    """
    chosen = argparse.ArgumentParser(add_help=False)  # which may abbreviate, as the command may
    chosen.add_argument("--config", type=Path)
    explicit = chosen.parse_known_args(arguments)[0].config
    file = explicit or default_file()
    if file is None or not (explicit or file.exists()):
        return
    parser.set_defaults(**_defaults(file, _read(file), command, parser))


def options_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options of a command by their long names, without dashes."""
    actions = parser._option_string_actions.items()  # noqa: SLF001 - argparse has no public list of its options
    return {
        name[2:]: action
        for name, action in actions
        if name.startswith("--") and name[2:] not in _NOT_KEPT and action.help != argparse.SUPPRESS
    }


def add_opposites(parser: argparse.ArgumentParser) -> None:
    """`--no-NAME` for each flag, which a configuration may have set; help would be half as long again with them."""
    for name, action in options_of(parser).items():
        if isinstance(action, argparse._StoreTrueAction) and not name.startswith("no-"):  # noqa: SLF001 - has no public name
            parser.add_argument(
                f"--no-{name}",
                dest=action.dest,
                action="store_false",
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )


def _read(file: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read as TOML: {getattr(error, 'strerror', None) or error}") from error
    from u2moe.runtime.cli import OTHER_COMMANDS, OWN_COMMANDS  # noqa: PLC0415 - which imports this module

    commands = (*OWN_COMMANDS, *OTHER_COMMANDS)
    for name, value in content.items():
        if isinstance(value, dict) and name not in commands:
            raise ValueError(f"{file}: [{name}]: there is no such command, expected one of {', '.join(commands)}")
    return content


def _all_parsers() -> dict[str, argparse.ArgumentParser]:
    from u2moe.runtime.cli import command_parsers  # noqa: PLC0415 - which imports this module

    return command_parsers()


def _defaults(file: Path, content: Mapping[str, Any], command: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The values that a file sets for a command, by destination."""
    options = options_of(parser)
    found: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            continue
        if name in options:
            found[options[name].dest] = _value(file, name, value, options[name])
        else:  # perhaps an option of a command whose package takes long to import
            known = {option for other in _all_parsers().values() for option in options_of(other)}
            _check_known(file, name, name, known)
    section = content.get(command, {})
    if not isinstance(section, dict):
        raise ValueError(f"{file}: {command} must be a table of options, got {section!r}")  # noqa: TRY004
    for name, value in section.items():
        _check_known(file, f"[{command}] {name}", name, options.keys())
        found[options[name].dest] = _value(file, f"[{command}] {name}", value, options[name])
    return found


def _check_known(file: Path, where: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(f"{file}: {where}: there is no such option, expected one of {', '.join(sorted(known))}")


def _action(parser: argparse.ArgumentParser, name: str) -> argparse.Action:
    return options_of(parser)[name]


def _value(file: Path, where: str, value: Any, action: argparse.Action) -> Any:
    """A value as the command line would give it."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{file}: {where} must be true or false, got {value!r}")
        return action.const if value else action.default
    if isinstance(action, argparse._AppendAction) or action.nargs in ("*", "+"):  # noqa: SLF001 - has no public name
        values = value if isinstance(value, list) else [value]
        return _Replaceable(_single(file, where, each, action) for each in values)
    return _single(file, where, value, action)


def _single(file: Path, where: str, value: Any, action: argparse.Action) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{file}: {where} must be text or a number, got {value!r}")  # noqa: TRY004
    try:
        converted = action.type(str(value)) if callable(action.type) else str(value)
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{file}: {where}: {value!r} is not possible: {error}") from error
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"{file}: {where} must be one of {', '.join(map(str, action.choices))}, got {value!r}")
    if isinstance(converted, Path):  # relative to the file, wherever the command is called
        return file.absolute().parent / converted.expanduser()
    if action.dest in _NAMES_OF_FILES and "://" not in str(value) and value != DEMO:
        return str(file.absolute().parent / Path(str(value)).expanduser())
    return converted


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, int | float):
        return repr(value)
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
