"""Federations to look at: one that really ran, and one in which much is going on at once.

    python -m tests.page_cases PICTURE.png [WIDTH HEIGHT [dark]]

writes a picture of the second one's page, with headless Chromium.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import Any

import uvicorn
from cryptography.hazmat.primitives import serialization

from anabranch.protocols.config import parse
from anabranch.protocols.identity.authority import key_digest, new_key
from anabranch.protocols.identity.join import Report
from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.page.server import config_of
from anabranch.server.coordinator.state import Asked, RunEntry, SiteEntry, Wait
from anabranch.server.store import RunFolder
from tests.browser import Browser
from tests.runs import PRIVATE, table_text
from tests.simulations.federation import Federation as ToyFederation

NOW = 1_790_000_000.0
DAY = 86400.0


def make(folder: Path) -> Federation:
    """Make an empty federation with a page on a free port."""
    federation = Federation.create(folder, "heart", ["127.0.0.1", "localhost"], 8443)
    file = federation.folder / "coordinator.toml"
    text = file.read_text().replace('page = "127.0.0.1:8444"', 'page = "127.0.0.1:0"')
    assert "127.0.0.1:0" in text
    file.write_text(text)
    return Federation(folder)


def add_site(federation: Federation, name: str, **changes: Any) -> SiteEntry:
    """Put a site with a new key into the roster."""
    public = new_key().public_key()
    pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    facts: dict[str, Any] = {
        "name": name,
        "key": key_digest(public),
        "public_key": pem.decode(),
        "joined": NOW - 10 * DAY,
        "expires": NOW + 80 * DAY,
        "serial": "1",
        "version": "0.1.0",
    }
    entry = SiteEntry(**(facts | changes))
    federation.state.add_site(entry)
    return entry


def report(federation: Federation, site: str, at: float = NOW - 1, **fields: Any) -> None:
    """Let a site say what it does."""
    facts: dict[str, Any] = {"boot": "0" * 64, "activity": "idle", "since": at - 60, "ready": True}
    federation.state.report(site, Report(**(facts | fields)), at)


def add_run(federation: Federation, run: str, toml: str, **changes: Any) -> RunEntry:
    """Put a run into the state."""
    facts: dict[str, Any] = {
        "run": run,
        "name": parse(toml, source=run).name,
        "toml": toml,
        "signed": "{}",
    }
    entry = RunEntry(**(facts | {"created": NOW - 3600.0} | changes))
    federation.state.propose(entry)
    return entry


def ran(
    federation: Federation, run: str, *, rounds: int = 3, extra: str = "", **engine: Any
) -> RunFolder:
    """Let the round engine carry a run of toy sites out into the run's folder.

    A second passes between two events.
    """
    toml = table_text(("rounds = 2", f"rounds = {rounds}"), extra=extra)
    add_run(federation, run, toml, state="finished")
    seconds = iter(range(10**6))
    folder = RunFolder.create(
        federation.run_folder(run),
        toml.encode(),
        now=lambda: datetime.fromtimestamp(NOW - 3600 + next(seconds), UTC),
    )
    folder.event("run_started", run=run)
    toy = ToyFederation(run=parse(toml, source=run), **engine)
    toy.engine._event = toy.engine._exchange.event = folder.event  # what a run's process passes in
    toy.run()
    return folder


@contextmanager
def serving(federation: Federation, *, port: int = 0, **options: Any) -> Iterator[str]:
    """Serve the page on this port, or a free one; yield its address."""
    config = config_of(federation, **options)
    config.port = port
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    thread = Thread(target=lambda: server.run([socket]), daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            thread.join(0.01)
        yield f"{'https' if config.ssl else 'http'}://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        socket.close()


# -- much at once ----------------------------------------------------------------------------------


def example(folder: Path, now: float) -> Federation:
    """Make a federation of four sites with a private run under way and two that are over."""
    federation = make(folder)
    for name in ("aarhus", "bergen", "cork", "delft"):
        add_site(federation, name, joined=now - 10 * DAY, expires=now + 80 * DAY)
    run = "heart-disease-3f9c21d07a44"
    toml = table_text(
        ('name = "tiny"', 'name = "heart-disease"'),
        ("local_epochs = 2", "local_epochs = 2\nlocal_steps = 40"),
        ("rounds = 2", "rounds = 20\nquorum = 3\ndeadline_s = 1800"),
        extra=PRIVATE,
    )
    _past(federation, now)
    add_run(federation, run, toml, created=now - 4000, state="running", restarts=2)
    _write(federation, run, toml, now - 3900, 12, private=True)
    state = federation.state
    began = now - 130
    state.wait(
        run,
        Wait(
            why="their deltas of round 13; 3 are needed",
            who=("bergen", "delft"),
            since=began,
            until=began + 1800,
            then="the round goes on with the deltas that are there, if there are 3",
        ),
    )
    for site, what in (("aarhus", "answered"), ("cork", "answered")):
        state.asked(run, site, _asked(began, state=what))
    for site in ("bergen", "delft"):
        state.asked(run, site, _asked(began))
    write_reports(federation, run, now)
    state.invite("esbjerg", "0" * 64, now + 3000, now)
    return federation


def _asked(since: float, **fields: Any) -> Asked:
    return Asked(kind="train", round=13, since=since, until=since + 1800, **fields)


def write_reports(federation: Federation, run: str, now: float) -> None:
    """Let every site of the busy federation say anew what it does."""
    at = now - 1
    facts: dict[str, Any] = {"version": "0.1.0", "seconds_per_round": 44.0}
    report(federation, "aarhus", at, since=now - 60, **facts)
    report(federation, "cork", at, since=now - 75, **facts)
    training: dict[str, Any] = {
        "activity": "training",
        "step": 40,
        "steps": 200,
        "run": run,
        "round": 13,
    }
    report(federation, "bergen", at, since=now - 100, **training, **facts)
    report(federation, "delft", now - 95, since=now - 128, **training | {"step": 2}, **facts)


def _past(federation: Federation, now: float) -> None:
    toml = table_text(("rounds = 2", "rounds = 8"))
    add_run(federation, "tiny-5cc0de11aa02", toml, created=now - 2 * DAY, state="finished")
    _write(federation, "tiny-5cc0de11aa02", toml, now - 2 * DAY + 60, 8, over=True)
    add_run(
        federation,
        "tiny-77aa00b1c2d3",
        toml,
        created=now - 0.5 * DAY,
        state="failed",
        detail="round 1: 2 of 4 sites sent a delta that counts (aarhus, cork), 3 are needed",
    )


def _write(
    federation: Federation,
    run: str,
    toml: str,
    start: float,
    rounds: int,
    *,
    private: bool = False,
    over: bool = False,
) -> None:
    """Write the events of a run whose metrics look as such runs do."""
    clock = [start]
    folder = RunFolder.create(
        federation.run_folder(run),
        toml.encode(),
        now=lambda: datetime.fromtimestamp(clock[0], UTC),
    )
    folder.event("run_started", run=run)
    names = ["aarhus", "bergen", "cork", "delft"]
    for name, records in zip(names, (303, 294, 123, 200), strict=True):
        folder.event("site_joined", site=name, num_examples=records, held_out=30)
    last = rounds if over else rounds + 1
    for number in range(1, last + 1):
        folder.event("round_started", round=number, sites=names)
        clock[0] += 300 if not over else 40
        answered = [n for n in names if not (n == "delft" and number == 4)]
        answered = answered if number <= rounds else ["aarhus", "cork"]
        for name in answered:
            _trained(folder, name, number, private)
        if number > rounds:
            break
        if number == 4:
            folder.event(
                "site_failed", site="delft", round=4, asked="train", reason="deadline",
                message="no answer within 1800 s",
            )  # fmt: skip
        folder.event(
            "round_aggregated", round=number, method="fedavg", sites=answered, num_examples=920,
            update_norm=1 / number, bytes_up=410_000, bytes_down=395_000, seconds=300.0,
        )  # fmt: skip
        rise = 1 - math.exp(-number / 5)
        folder.event(
            "round_evaluated",
            round=number,
            client={} if private else {"accuracy": 0.5 + 0.31 * rise},
            coordinator={"accuracy": 0.5 + 0.33 * rise, "loss": 0.69 - 0.3 * rise},
        )
    if over:
        folder.event("run_finished", rounds=rounds, best_round=rounds)


def _trained(folder: RunFolder, name: str, number: int, private: bool) -> None:
    facts: dict[str, Any] = {"loss": 0.7 / math.sqrt(number)}
    if private:
        size = {"aarhus": 1.0, "bergen": 1.02, "cork": 1.25, "delft": 1.1}[name]
        facts = {"loss": None, "epsilon": 1.35 * math.sqrt(number) * size, "delta": 1e-4}
    folder.event(
        "site_trained", site=name, round=number, num_examples=230, steps=40, seconds=31.0, **facts
    )


def picture(file: Path, width: int = 1280, height: int = 900, *, dark: bool = False) -> None:
    """Write a picture of the example's page."""
    with tempfile.TemporaryDirectory() as folder:
        federation = example(Path(folder) / "heart", time.time())
        with serving(federation) as address, Browser(Path(folder) / "profile") as browser:
            page = browser.page(width, height, dark=dark)
            page.open(f"{address}/?token={federation.page_token()}")
            page.until("document.body.dataset.ready === 'yes'")
            file.write_bytes(page.picture())


if __name__ == "__main__":
    size = [int(one) for one in sys.argv[2:4]]
    picture(Path(sys.argv[1]), *size, dark="dark" in sys.argv)
