"""Commands that install missing packages. Only this module contains the names of the packages."""

IS_PUBLISHED = False  # Whether u2moe and those in `_FOLDERS` are on PyPI. If not, the commands install from a clone
_FOLDERS = {"kernels": "runtime/kernels", "demo": "runtime/demo"}  # Distributions u2moe-NAME: folders in a clone


def install_command(part: str) -> str:
    """Return the command that installs a part of u2moe: "kernels", "demo", or extras such as "cpu,server"."""
    if part in _FOLDERS:
        return f"pip install u2moe-{part}" if IS_PUBLISHED else f"pip install ./{_FOLDERS[part]} (in a clone of u2moe)"
    return f"pip install 'u2moe[{part}]'" if IS_PUBLISHED else f"pip install '.[{part}]' (in a clone of u2moe)"
