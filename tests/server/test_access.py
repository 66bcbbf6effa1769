"""API keys, origins, and paths that need no key."""

import httpx
import openai
import pytest
from websockets.exceptions import InvalidStatus

KEY = "a key of 20 letters."


@pytest.fixture(scope="module")
def guarded(running):
    with running(api_key=KEY.replace(" ", "-"), cors_origins=("https://app.example",)) as server:
        server.key = KEY.replace(" ", "-")
        yield server


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/audio/transcriptions"])
def test_what_needs_the_key(guarded, path):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": guarded.key}, {"Authorization": "Bearer"}):
        answer = guarded.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert guarded.get(path, headers={"Authorization": f"bearer {guarded.key}"}).status_code != 401
    assert guarded.get(path, params={"api_key": guarded.key}).status_code != 401


@pytest.mark.parametrize("path", ["/", "/page.js", "/healthz", "/readyz", "/openapi.json"])
def test_what_does_not(guarded, path):
    assert guarded.get(path).status_code == 200


def test_openai_sends_the_key_as_it_always_does(guarded):
    with openai.OpenAI(api_key=guarded.key, base_url=f"{guarded.url}/v1") as client:
        assert client.models.list().data
    with (
        openai.OpenAI(api_key="wrong", base_url=f"{guarded.url}/v1") as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


@pytest.mark.parametrize("path", ["/stream", "/v1/realtime", "/vosk"])
def test_a_websocket_needs_the_key(guarded, path):
    refusals = guarded.metric("refusals", "key")
    with pytest.raises(InvalidStatus) as caught, guarded.connect(path):
        pass
    assert caught.value.response.status_code == 401
    assert guarded.metric("refusals", "key") == refusals + 1
    for settings in (
        {"path": path, "additional_headers": {"Authorization": f"Bearer {guarded.key}"}},
        {"path": f"{path}?api_key={guarded.key}"},
        {"path": path, "subprotocols": ["u2moe", f"u2moe-api-key.{guarded.key}"]},
        {"path": path, "subprotocols": ["realtime", f"openai-insecure-api-key.{guarded.key}"]},
    ):
        with guarded.connect(**settings):
            pass


def test_keys_are_compared_in_constant_time(guarded, monkeypatch):
    compared = []

    def compare(given, key):
        compared.append((given, key))
        return given == key

    monkeypatch.setattr("hmac.compare_digest", compare)
    assert guarded.get("/metrics", params={"api_key": guarded.key[:-1]}).status_code == 401
    assert (guarded.key[:-1].encode(), guarded.key.encode()) in compared


def test_the_key_alone_is_chosen_as_subprotocol(guarded, server):
    """Browsers close the connection if none of their subprotocols is chosen."""
    for path in ("/stream", "/vosk", "/v1/realtime"):
        with guarded.connect(path, subprotocols=[f"u2moe-api-key.{guarded.key}"]) as client:
            assert client.websocket.subprotocol == f"u2moe-api-key.{guarded.key}"
    with server.connect("/v1/realtime", subprotocols=["realtime", "openai-beta.realtime-v1"]) as client:
        assert client.websocket.subprotocol == "realtime"


def test_pages_of_other_origins_post_nothing(server, guarded):
    url = f"{server.url}/v1/audio/transcriptions"
    answer = httpx.post(url, headers={"Origin": "https://evil.example"}, trust_env=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin")
    assert httpx.post(url, headers={"Origin": server.url}, trust_env=False).status_code == 400  # not a form
    # allowed pages can also read why they were refused
    answer = guarded.get("/v1/models", headers={"Origin": "https://app.example", "Authorization": "Bearer wrong"})
    assert answer.status_code == 401
    assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example"


def test_origins_of_websockets(server, guarded):
    own = server.url
    for url, origin in ((server.websocket_url, "https://evil.example"), (server.websocket_url, "null")):
        with pytest.raises(InvalidStatus) as caught, server.connect(origin=origin):
            pass
        assert caught.value.response.status_code == 403, url
    with server.connect(origin=own):
        pass
    with guarded.connect(f"/stream?api_key={guarded.key}", origin="https://app.example"):
        pass
    # WeNet's page comes from another origin, and the user can only set this port.
    with server.connect("/", port=server.ports["wenet"], origin="https://wenet.example"):
        pass


def test_cors_and_names_that_lead_here_but_are_none_of_ours(server, guarded):
    """DNS rebinding: page and Host header have the same name, which is not a local one."""
    headers = {"Origin": "http://evil.example:8000", "Host": "evil.example:8000"}
    for path in ("/", "/metrics", "/v1/audio/transcriptions"):
        answer = server.get(path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host")
    own_port = f"http://127.0.0.1:{server.ports['vosk']}/"
    assert httpx.get(own_port, headers=headers, trust_env=False).status_code == 403
    for name in ("localhost", "[::1]:8000", "127.0.0.1"):
        assert server.get("/", headers={"Host": name}).status_code == 200
    ask = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    preflight = httpx.options(f"{guarded.url}/v1/audio/transcriptions", headers=ask, trust_env=False)
    assert preflight.headers["Access-Control-Allow-Origin"] == "https://app.example"
    other = httpx.options(
        f"{guarded.url}/v1/models", headers={**ask, "Origin": "https://evil.example"}, trust_env=False
    )
    assert "Access-Control-Allow-Origin" not in other.headers
    assert (
        "Access-Control-Allow-Origin" not in server.get("/v1/models", headers={"Origin": "https://a.example"}).headers
    )
