from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from anabranch.protocols.errors import ConfigError, RunError
from anabranch.protocols.identity.authority import (
    Key,
    certificate_pem,
    key_digest,
    key_pem,
    new_authority,
    new_key,
)
from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.page import app
from anabranch.server.coordinator.page.access import (
    Viewer,
    by_token,
    cookie_name,
    cookie_value,
    is_loopback,
    page_address,
)
from anabranch.server.coordinator.page.app import Feed
from anabranch.server.coordinator.page.server import config_of, require_safe
from anabranch.server.coordinator.page.shown import View
from anabranch.server.coordinator.state import OpenInvitation
from tests.page_cases import DAY, NOW, add_site, example, make, report, serving

PATHS = ("/", "/api/view", "/metrics", "/events")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return example(tmp_path_factory.mktemp("page") / "heart", NOW)


@pytest.fixture(scope="module")
def address(federation: Federation) -> Iterator[str]:
    with serving(federation) as found:
        yield found


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60) as found:
        yield found


@pytest.fixture
def bearer(federation: Federation) -> dict[str, str]:
    return {"authorization": f"Bearer {federation.page_token()}"}


# -- who may look ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_without_a_token_there_is_nothing_to_see(client: httpx.Client, path: str) -> None:
    for headers in ({}, {"authorization": "Bearer"}, {"authorization": "Bearer wrong"}):
        got = client.get(path, headers=headers)
        assert got.status_code == 401
        assert "aarhus" not in got.text
        assert got.headers["www-authenticate"] == 'Bearer realm="anabranch"'


@settings(max_examples=50)
@given(given=st.text(alphabet=st.characters(max_codepoint=255)))
def test_no_other_token_or_cookie_opens_it(given: str) -> None:
    token = "r" * 43
    name = cookie_name(token)

    assert by_token(token, f"Bearer {given}", f"{name}={given}; x={given}") is None
    assert by_token("", "Bearer ", f"{cookie_name('')}=") is None  # no token opens nothing
    assert by_token(token, "", f"{name}={cookie_value(token)}") is not None
    assert by_token(token, f"bearer {token}", "") is not None


def test_a_token_in_the_address_is_taken_out_of_it(
    client: httpx.Client, federation: Federation
) -> None:
    token = federation.page_token()

    got = client.get("/", params={"token": token})

    assert (got.status_code, got.headers["location"]) == (303, "/")
    assert token not in str(got.headers)
    cookie = got.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert client.get("/").status_code == 200  # the client keeps the cookie
    assert client.get("/api/view").json()["federation"] == "heart"
    assert client.get("/", params={"token": "wrong"}).status_code == 401


def test_a_token_that_is_replaced_closes_the_page_at_once(tmp_path: Path) -> None:
    federation = make(tmp_path / "heart")
    file = federation.folder / "page.token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with serving(federation) as address, httpx.Client(base_url=address, timeout=60) as client:
        client.get("/", params={"token": federation.page_token()})
        assert client.get("/api/view").status_code == 200
        file.write_text("another\n")
        assert client.get("/api/view").status_code == 401


def test_whoever_has_no_token_is_told_how_to_get_in(client: httpx.Client) -> None:
    got = client.get("/", headers={"accept": "text/html"})

    assert got.status_code == 401
    assert "page.token" in got.text
    assert client.get("/page.css").status_code == 200


# -- what it answers -------------------------------------------------------------------------------


def test_the_view_as_json_is_the_view(
    client: httpx.Client, federation: Federation, bearer: dict[str, str]
) -> None:
    got = client.get("/api/view", headers=bearer)

    assert got.headers["content-type"] == "application/json"
    assert [site["name"] for site in got.json()["sites"]] == ["aarhus", "bergen", "cork", "delft"]
    metrics = client.get("/metrics", headers=bearer)
    assert metrics.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert 'anabranch_info{federation="heart"' in metrics.text
    health = client.get("/healthz")
    assert (health.status_code, health.text) == (200, "ok\n")


@pytest.mark.parametrize("path", [*PATHS, "/page.js", "/healthz", "/nowhere"])
def test_every_answer_keeps_browsers_from_anything_else(
    client: httpx.Client, bearer: dict[str, str], path: str
) -> None:
    with client.stream("GET", path, headers=bearer) as got:
        headers = got.headers
    policy = dict(
        one.strip().split(" ", 1) for one in headers["content-security-policy"].split(";")
    )

    assert policy["default-src"] == "'none'"
    assert set(policy.values()) == {"'none'", "'self'"}
    assert headers["x-frame-options"] == "DENY"
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_whatever_would_change_something_is_refused(
    client: httpx.Client, bearer: dict[str, str], method: str
) -> None:
    for path in (*PATHS, "/page.js", "/nowhere"):
        got = client.request(method, path, headers=bearer)
        assert (got.status_code, got.headers["allow"]) == (405, "GET, HEAD")


def test_head_says_what_get_would_without_a_body(
    client: httpx.Client, bearer: dict[str, str]
) -> None:
    for path in PATHS:
        got = client.head(path, headers=bearer)
        assert (got.status_code, got.content) == (200, b"")


def test_files_outside_the_page_are_not_served(
    client: httpx.Client, bearer: dict[str, str]
) -> None:
    for path in ("/page.html", "/..%2fserver.py", "/files/page.css", "/page.token", "/docs"):
        assert client.get(path, headers=bearer).status_code == 404


# -- events ----------------------------------------------------------------------------------------


def events(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """Read server-sent events."""
    kind = ""
    for line in lines:
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield kind, json.loads(line.removeprefix("data: "))


def test_the_whole_view_comes_at_once_and_again_when_it_has_changed(tmp_path: Path) -> None:
    federation = make(tmp_path / "heart")
    headers = {"authorization": f"Bearer {federation.page_token()}"}
    with (
        serving(federation) as address,
        httpx.stream("GET", f"{address}/events", headers=headers, timeout=30) as got,
    ):
        assert got.headers["content-type"].startswith("text/event-stream")
        heard = events(got.iter_lines())
        kind, first = next(heard)
        assert (kind, first["sites"]) == ("view", [])
        add_site(federation, "aarhus", expires=time.time() + 80 * DAY)
        kind, second = next(heard)
        assert (kind, [site["name"] for site in second["sites"]]) == ("view", ["aarhus"])
        report(federation, "aarhus", at=second["at"])
        assert next(heard)[1]["sites"][0]["state"] == "idle"


OPERATOR = Viewer()
VIEW = View(at=NOW, federation="heart", address="h:1", version="0")


def told(*answers: View | RunError) -> Feed:
    """Return a feed of these answers, the last one again and again."""
    left = list(answers)

    def look() -> View:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, RunError):
            raise answer
        return answer

    return Feed(look, every_s=0.0, now=lambda: NOW)


async def heard(feed: Feed, number: int, viewer: Viewer = OPERATOR) -> list[tuple[str, Any]]:
    stream = feed.events(viewer)
    lines = [(await anext(stream)).decode() for _ in range(number)]
    assert feed.streams == 1
    await stream.aclose()  # type: ignore[attr-defined]
    assert feed.streams == 0
    return list(events(iter("".join(lines).split("\n"))))


def test_what_has_not_changed_is_not_sent_again() -> None:
    later = replace(VIEW, at=NOW + 1)
    other = replace(later, older_runs=1)

    got = asyncio.run(heard(told(VIEW, later, VIEW, later, other), 2))

    assert [(kind, view["older_runs"]) for kind, view in got] == [("view", 0), ("view", 1)]


def test_a_state_that_cannot_be_read_is_said_once_and_recovered_from() -> None:
    busy = RunError("state.sqlite: cannot be used now")

    got = asyncio.run(heard(told(VIEW, busy, busy, VIEW), 3))

    assert [kind for kind, _ in got] == ["view", "trouble", "view"]
    assert got[1][1] == {"message": "state.sqlite: cannot be used now"}


def test_a_line_on_which_nothing_happens_says_that_it_is_up() -> None:
    feed = told(VIEW)
    seconds = iter(range(0, 10**6, 10))
    feed.clock = lambda: next(seconds)

    got = asyncio.run(heard(feed, 3))

    assert [kind for kind, _ in got] == ["view", "still", "still"]
    assert got[1][1] == {"at": NOW}


def test_a_site_is_sent_what_it_may_see() -> None:
    seen = replace(VIEW, invitations=(OpenInvitation(site="esbjerg", expires=NOW),))

    ((_, got),) = asyncio.run(heard(told(seen), 1, Viewer("cork")))

    assert (got["viewer"], got["invitations"]) == ("cork", [])


def test_many_who_ask_together_look_once() -> None:
    looks = list[int]()

    def look() -> View:
        looks.append(1)
        return VIEW

    async def many() -> None:
        feed = Feed(look, every_s=3600.0)
        await asyncio.gather(*(feed.latest() for _ in range(20)))

    asyncio.run(many())
    assert len(looks) == 1


def test_more_pages_than_are_allowed_are_refused(
    client: httpx.Client, bearer: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "STREAMS", 0)

    got = client.get("/events", headers=bearer)

    assert (got.status_code, got.headers["retry-after"]) == (503, "10")


def test_a_damaged_state_is_503_with_its_reason(tmp_path: Path) -> None:
    federation = make(tmp_path / "heart")
    headers = {"authorization": f"Bearer {federation.page_token()}"}
    with serving(federation) as address, httpx.Client(base_url=address, timeout=60) as client:
        federation.state.close()
        federation.state_file.write_bytes(b"not a database")
        del federation.state
        for path in ("/api/view", "/metrics", "/healthz"):
            got = client.get(path, headers=headers)
            assert got.status_code == 503
            assert "state.sqlite" in got.text


# -- over TLS --------------------------------------------------------------------------------------


def credentials(folder: Path, authority: Any, key: Key, name: str) -> tuple[str, str]:
    """Write a site's key and certificate; return their files."""
    certificate = authority.site(key.public_key(), name, datetime.now(UTC))
    (folder / f"{name}.key").write_bytes(key_pem(key))
    (folder / f"{name}.pem").write_bytes(certificate_pem(certificate))
    return str(folder / f"{name}.pem"), str(folder / f"{name}.key")


def tls(federation: Federation, *pair: str) -> httpx.Client:
    context = ssl.create_default_context(cafile=str(federation.folder / "authority" / "ca.pem"))
    if pair:
        context.load_cert_chain(*pair)
    return httpx.Client(verify=context, timeout=60)


def test_over_tls_a_site_sees_itself_and_strangers_nothing(tmp_path: Path) -> None:
    federation = make(tmp_path / "heart")
    key, stranger = new_key(), new_key()
    add_site(federation, "aarhus", key=key_digest(key.public_key()))
    add_site(federation, "bergen")
    known = credentials(tmp_path, federation.authority(), key, "aarhus")
    unknown = credentials(tmp_path, federation.authority(), stranger, "nobody")
    with serving(federation, tls=True) as address:
        assert address.startswith("https")
        with tls(federation, *known) as site:
            assert site.get(f"{address}/").status_code == 200
            got = site.get(f"{address}/api/view").json()
            assert (got["viewer"], [one["name"] for one in got["sites"]]) == ("aarhus", ["aarhus"])
            assert "bergen" not in site.get(f"{address}/metrics").text
            federation.state.set_site("aarhus", status="revoked")
            assert site.get(f"{address}/api/view").status_code == 401
        with tls(federation, *unknown) as other:
            assert other.get(f"{address}/api/view").status_code == 401
        with tls(federation) as browser:
            assert browser.get(f"{address}/api/view").status_code == 401
            entered = browser.get(f"{address}/", params={"token": federation.page_token()})
            assert "Secure" in entered.headers["set-cookie"]
            assert browser.get(f"{address}/api/view").status_code == 200


def test_a_certificate_of_another_authority_does_not_get_through_tls(tmp_path: Path) -> None:
    federation = make(tmp_path / "heart")
    key = new_key()
    add_site(federation, "aarhus", key=key_digest(key.public_key()))
    other = new_authority("heart", ["127.0.0.1"], datetime.now(UTC))
    pair = credentials(tmp_path, other, key, "aarhus")
    with (
        serving(federation, tls=True) as address,
        tls(federation, *pair) as site,
        pytest.raises(httpx.TransportError),
    ):
        site.get(f"{address}/api/view")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "coordinator.example.org", ""])
def test_an_address_that_others_reach_is_refused_without_tls(host: str) -> None:
    with pytest.raises(ConfigError, match=r"page: .* can be reached from other machines"):
        require_safe(host, tls=False)
    require_safe(host, tls=True)


def test_the_page_is_plain_on_this_machine_and_tls_elsewhere(tmp_path: Path) -> None:
    assert [is_loopback(one) for one in ("127.0.0.1", "127.8.8.8", "::1", "localhost")] == [
        True
    ] * 4
    federation = make(tmp_path / "heart")
    assert config_of(federation).ssl is None
    file = federation.folder / "coordinator.toml"
    file.write_text(file.read_text().replace('page = "127.0.0.1:0"', 'page = "0.0.0.0:0"'))
    federation = Federation(federation.folder)

    context = config_of(federation).ssl

    assert context is not None
    assert context.minimum_version == ssl.TLSVersion.TLSv1_3
    with pytest.raises(ConfigError, match="without TLS"):
        config_of(federation, tls=False)


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("127.0.0.1:8444", "http://127.0.0.1:8444"),
        ("localhost:8444", "http://localhost:8444"),
        ("[::1]:8444", "http://[::1]:8444"),
        ("0.0.0.0:8444", "https://127.0.0.1:8444"),
        ("fl.example.org:1", "https://fl.example.org:1"),
    ],
)
def test_the_address_of_the_page_is_one_that_a_browser_can_open(
    tmp_path: Path, page: str, said: str
) -> None:
    settings_ = make(tmp_path / "heart").settings

    assert page_address(replace(settings_, page=page)) == said


# -- the process -----------------------------------------------------------------------------------


def listening(port: int) -> bool:
    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port)).close()
        return True
    return False


def test_the_process_serves_and_ends_when_its_supervisor_is_gone(tmp_path: Path) -> None:
    federation = make(tmp_path / "heart")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    file = federation.folder / "coordinator.toml"
    file.write_text(file.read_text().replace('"127.0.0.1:0"', f'"127.0.0.1:{port}"'))
    module = "anabranch.server.coordinator.page.server"
    process = subprocess.Popen(
        [sys.executable, "-m", module, str(federation.folder)], stdin=subprocess.PIPE
    )
    try:
        while not listening(port):
            with contextlib.suppress(subprocess.TimeoutExpired):
                pytest.fail(f"it ended with {process.wait(timeout=0.05)}")
        assert httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=30).text == "ok\n"
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=30) == 1
    finally:
        process.kill()
        process.wait()
