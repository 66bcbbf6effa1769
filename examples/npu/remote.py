"""A runner in a separate environment, for NPU compilers that need other package versions than u2moe.

python remote.py ADDRESS EXAMPLE.py FOLDER [OPTION ...]     # RemoteRunner starts this in the other environment
"""

import io
import json
import runpy
import subprocess
import sys
import tempfile
from multiprocessing.connection import Client, Listener
from pathlib import Path

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


class RemoteRunner:
    """Runner in another environment. It calls `simulated(folder, *options)` of an example there, and uses that runner.

    Attributes:
        on_cpu: operators that the toolchain leaves to the CPU.
    """

    def __init__(self, python: str, example: Path, folder: Path, *options: str) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - open until `close`
        with Listener() as listener:
            command = [python, __file__, listener.address, example, folder, *options]
            # the working directory is the folder, because some compilers leave files there
            self.process = subprocess.Popen(command, cwd=folder, stdout=self.log, stderr=self.log)
            self.connection = listener.accept()
        self.on_cpu: list[str] = json.loads(self._received())

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run the graph on inputs by name, and return outputs by name."""
        self.connection.send_bytes(packed(inputs))
        return unpacked(self._received())

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.wait()
        self.log.close()

    def _received(self) -> bytes:
        try:
            return self.connection.recv_bytes()
        except EOFError:
            self.process.wait()
            self.log.seek(0)
            last = self.log.read().decode(errors="replace").strip().splitlines()[-1:]
            self.close()
            raise OSError(f"the runner exited with status {self.process.returncode}: {''.join(last)[-300:]}") from None


def packed(arrays: dict[str, Array]) -> bytes:
    """Return arrays as bytes that any version of numpy can read."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def unpacked(content: bytes) -> dict[str, Array]:
    """Return the arrays in bytes from `packed`."""
    with np.load(io.BytesIO(content)) as arrays:
        return dict(arrays)


def main(address: str, example: str, folder: str, *options: str) -> None:
    """Serve the runner of an example to `RemoteRunner`."""
    connection = Client(address)
    runner = runpy.run_path(example)["simulated"](folder, *options)
    connection.send_bytes(json.dumps(getattr(runner, "on_cpu", [])).encode())
    while True:
        try:
            inputs = unpacked(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(packed(runner.run(inputs)))


if __name__ == "__main__":
    main(*sys.argv[1:])
