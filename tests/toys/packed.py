"""Golden files that xz compresses: texts, and named arrays (`.npy.xz`, one structured array for all of them)."""

import io
import lzma

import numpy as np

FOUR_BYTES = {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 2**22, "lc": 0, "lp": 2, "pb": 2}
"""Filter for xz that separates the four bytes of float32 numbers. xz then saves a sixth instead of a tenth."""


def read_text(path):
    return lzma.decompress(path.read_bytes()).decode()


def write_text(path, text):
    path.write_bytes(lzma.compress(text.encode(), preset=9))


def read_arrays(path):
    """Return the arrays of a file by name."""
    whole = np.load(io.BytesIO(lzma.decompress(path.read_bytes())))
    return {name: whole[name] for name in whole.dtype.names}


def write_arrays(path, arrays):
    whole, file = np.zeros((), [(name, array.dtype, array.shape) for name, array in arrays.items()]), io.BytesIO()
    for name, array in arrays.items():
        whole[name] = array
    np.save(file, whole)
    path.write_bytes(lzma.compress(file.getvalue(), filters=[FOUR_BYTES]))
