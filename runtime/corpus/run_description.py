"""What a run is: model, options, list and blocks. Written first; who comes later must mean the same run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from u2moe.runtime.errors import CorpusError

_INFORMATION = ("u2moe", "list")
"""Fields that are written for people: the same run may go on with another version, and the list may move."""
_CALLED = {
    "list_format": "another format of list",
    "list_digest": "another list (or one that was changed)",
    "model": "another model",
    "providers": "other execution providers",
    "kernels": "other kernels (--kernels)",
    "options": "other options",
    "hotwords": "other hotwords",
    "channel": "another channel (--channel)",
    "block_size": "another block size",
    "output_format": "another output format",
}


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """Everything that the results of a run depend on.

    Attributes:
        u2moe: version that began it.
        list_path: the path that it was begun with.
        list_format: name of its format.
        list_digest: SHA-256 of what it lists.
        model: fingerprint of the bundle.
        providers: execution providers.
        kernels: "native" for those of u2moe-kernels, else "onnxruntime".
        options: decoding options, as JSON.
        hotwords: SHA-256 of the file of hotwords; None: there are none.
        block_size: utterances in a block.
        output_format: jsonl or parquet.
        channel: the only channel that is used of every recording; None: as the list says.
    """

    u2moe: str
    list_path: str
    list_format: str
    list_digest: str
    model: str
    providers: tuple[str, ...]
    kernels: str
    options: Mapping[str, Any]
    hotwords: str | None
    block_size: int
    output_format: str
    channel: int | None

    def to_json(self) -> bytes:
        """As the content of a file."""
        return json.dumps(dataclasses.asdict(self), indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, content: bytes, name: str) -> RunDescription:
        """From the content of a file.

        Raises:
            CorpusError: it is no description of a run; names the file.
        """
        try:
            record = json.loads(content)
            return cls(**record | {"providers": tuple(record["providers"])})
        except (ValueError, TypeError, KeyError) as error:
            raise CorpusError(f"{name}: is no description of a run of u2moe: {error}") from error

    def check(self, other: RunDescription, folder: str) -> None:
        """Raise CorpusError if `other` means another run than this one, which is that of `folder`."""
        ours, theirs = (json.loads(run.to_json()) for run in (self, other))
        for name, value in ours.items():
            if name not in _INFORMATION and value != theirs[name]:
                raise CorpusError(
                    f"{folder}: was begun with {_CALLED[name]}: its {name} is {_short(value)}, now it is "
                    f"{_short(theirs[name])}: choose another folder"
                )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 300 else f"{text[:300]}..."
