"""Routes warnings of ours to a callback."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from u2moe.runtime.errors import AudioWarning, BundleWarning


@contextlib.contextmanager
def handing_warnings_to(take: Callable[[str], object]) -> Iterator[None]:
    """Call `take` with the text of every AudioWarning and BundleWarning; other warnings are shown as usual."""
    with warnings.catch_warnings():
        for kind in (AudioWarning, BundleWarning):
            warnings.simplefilter("always", kind)
        show = warnings.showwarning

        def show_or_take(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, AudioWarning | BundleWarning):
                take(str(message))
            else:
                show(message, category, *where, **more)

        warnings.showwarning = show_or_take
        yield
