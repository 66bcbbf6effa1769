"""What the server uses of uvicorn that is not public: an update that changes it shows here what to look at."""

import inspect
from importlib.metadata import version

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from u2moe.runtime.server import handlers, server

TESTED = "0.54"
USED = {
    uvicorn.Server: {
        "methods": {"serve", "startup", "shutdown", "capture_signals", "on_tick"},
        "attributes": {"config", "server_state", "lifespan", "should_exit", "force_exit"},
    },
    H11Protocol: {
        "methods": {
            "connection_made", "connection_lost", "data_received", "handle_websocket_upgrade", "on_response_complete",
            "resume_writing", "send_400_response",
        },
        "attributes": {"loop", "transport", "cycle", "flow", "app_state"},
    },
    WebSocketsSansIOProtocol: {
        "methods": {
            "connection_lost", "data_received", "handle_connect", "handle_cont", "handle_parser_exception",
            "handle_ping", "handle_text", "receive", "run_asgi", "send", "send_receive_event_to_app",
        },
        "attributes": {
            "app_state", "close_sent", "conn", "curr_msg_data_type", "frames", "loop", "queue",
            "read_paused", "transport",
        },
    },
}  # fmt: skip
"""Methods that ours override or call, and attributes that they read or set, by class."""


def test_the_version_of_uvicorn_is_one_that_was_tested():
    assert version("uvicorn").startswith(f"{TESTED}."), (
        f"compare {', '.join(each.__name__ for each in USED)} with those of uvicorn {TESTED}, run tests/server, "
        "then change TESTED here and the versions in pyproject.toml"
    )


def test_the_names_that_are_used_exist():
    for base, names in USED.items():
        source = inspect.getsource(base)
        missing = {name for name in names["methods"] if not hasattr(base, name)}
        missing |= {name for name in names["attributes"] if f"self.{name}" not in source}
        assert not missing, base


def test_no_other_names_of_these_classes_are_used():
    for ours, base in (
        (server.Server, uvicorn.Server),
        (handlers.HttpHandler, H11Protocol),
        (handlers.WebSocketHandler, WebSocketsSansIOProtocol),
    ):
        overridden = {name for name in vars(ours) if not name.startswith("_") and hasattr(base, name)}
        assert overridden <= USED[base]["methods"]
