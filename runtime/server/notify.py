"""Tells systemd when the server is ready and when it stops (sd_notify), if systemd has started it."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(state: str) -> None:
    """Send a state such as "READY=1", if a socket for it is named in the environment."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
            channel.sendall(state.encode())
