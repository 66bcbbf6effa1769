"""`u2moe completion`: scripts that let shells complete commands, options and their values."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from u2moe.runtime.cli.configuration import options_of
from u2moe.runtime.cli.options import Subparsers
from u2moe.runtime.cli.terminal import print_result

Commands = Mapping[str, tuple[str, argparse.ArgumentParser]]
"""Help text and parser of each command."""


def add_completion(subparsers: Subparsers) -> None:
    """`u2moe completion SHELL`."""
    parser = subparsers.add_parser(
        "completion",
        help="print a script for completion in a shell",
        description='Print a script for completion: eval "$(u2moe completion bash)" in ~/.bashrc, the same with zsh in '
        "~/.zshrc, or u2moe completion fish > ~/.config/fish/completions/u2moe.fish.",
    )
    default = Path(os.environ.get("SHELL", "bash")).name
    parser.add_argument("shell", nargs="?", choices=tuple(SCRIPTS), default=default if default in SCRIPTS else "bash")
    parser.set_defaults(run=run_completion)


def run_completion(args: argparse.Namespace) -> int:
    """Print the script."""
    from u2moe.runtime.cli import OTHER_COMMANDS, command_parsers  # noqa: PLC0415 - which imports this module

    known = {"transcribe": "recognise audio files", "listen": "recognise speech from a microphone"}
    known |= {name: summary for name, (_, _, summary) in OTHER_COMMANDS.items()}
    commands = {name: (known.get(name, name), parser) for name, parser in command_parsers().items()}
    print_result(SCRIPTS[args.shell](commands))
    return 0


def _bash(commands: Commands) -> str:
    options, values = [], []
    for command, (_, parser) in commands.items():
        names = " ".join(f"--{name}" for name in sorted(options_of(parser)))
        options.append(f'        {command}) words="{names} --config --help" ;;')
        values += [
            f'        "{command} --{name}") words="{" ".join(map(str, action.choices))}"; is_value=1 ;;'
            for name, action in sorted(options_of(parser).items())
            if action.choices
        ]
    return "\n".join(
        (
            "_u2moe() {",
            '    local current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words="" is_value=""',
            '    if [ "$COMP_CWORD" -eq 1 ]; then',
            f'        COMPREPLY=($(compgen -W "{" ".join(commands)}" -- "$current"))',
            "        return",
            "    fi",
            '    case "${COMP_WORDS[1]} $before" in',
            *values,
            "    esac",
            '    if [ -z "$is_value" ] && [ "${current#-}" != "$current" ]; then',
            '        case "${COMP_WORDS[1]}" in',
            *(f"    {line}" for line in options),
            "        esac",
            "    fi",
            '    if [ -n "$words" ]; then',
            '        COMPREPLY=($(compgen -W "$words" -- "$current"))',
            "    else",
            "        COMPREPLY=()",  # the shell completes names of files, and quotes them
            "    fi",
            "}",
            "complete -o default -F _u2moe u2moe",
            "",
        )
    )


def _zsh(commands: Commands) -> str:
    known = "(( $+functions[compdef] )) || { autoload -U +X compinit && compinit; }\n"  # once: it reads many files
    return f"{known}autoload -U +X bashcompinit && bashcompinit\n{_bash(commands)}"


def _fish(commands: Commands) -> str:
    lines = []
    for command, (summary, parser) in commands.items():
        lines.append(f"complete -c u2moe -n __fish_use_subcommand -f -a {command} -d {_quoted(summary)}")
        for name, action in sorted(options_of(parser).items()):
            line = f"complete -c u2moe -n '__fish_seen_subcommand_from {command}' -l {name}"
            line += f" -d {_quoted(action.help or '')}"
            if action.choices:
                line += f" -x -a {_quoted(' '.join(map(str, action.choices)))}"
            elif action.nargs != 0:
                line += " -r"
            lines.append(line)
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SCRIPTS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
"""What makes the script of each shell."""
