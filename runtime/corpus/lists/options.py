"""How to interpret the entries of a list."""

from __future__ import annotations

from dataclasses import dataclass

from u2moe.runtime.corpus.entry import AudioFile, AudioSource, Command
from u2moe.runtime.corpus.storage import parent, resolve
from u2moe.runtime.declarations import check_options, option
from u2moe.runtime.errors import CorpusError
from u2moe.runtime.validation import checked_text


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """How to interpret the entries of a list.

    Attributes:
        root: folder to which paths are relative. None: the folder of the list.
        allow_pipes: whether entries that are shell commands (ending in "|") may be run.
        channel: use only this channel, 0 for the left one, whatever the list says. None: as it says, or the average.
    """

    root: str | None = option("text", flag="--root", metavar="DIR")
    allow_pipes: bool = option("flag", default=False, flag="--allow-pipes")
    channel: int | None = option("integer", least=0, flag="--channel", metavar="N")

    def __post_init__(self) -> None:
        check_options(self)

    def path(self, path: str, list_path: str) -> str:
        """The path of an entry of a list."""
        return resolve(path, self.root if self.root is not None else parent(list_path))

    def source(self, entry: str, list_path: str) -> AudioSource:
        """The audio of an entry: a path, or a command that ends in "|".

        Raises:
            CorpusError: a command, and those are not allowed.
            ValueError: the entry is empty.
        """
        if checked_text("path", entry).endswith("|"):
            return self.command(entry[:-1].strip(), list_path)
        return AudioFile(path=self.path(entry, list_path))

    def command(self, command: str, list_path: str) -> Command:
        """A command, if those are allowed; raises CorpusError otherwise."""
        if not self.allow_pipes:
            raise CorpusError(f"{list_path}: found the command {command!r:.80}: --allow-pipes runs what a list says")
        return Command(command=command)
