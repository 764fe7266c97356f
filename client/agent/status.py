"""state.json: what the agent does now, for `anabranch site status`; and what else a site knows.

The agent writes it every few seconds and at every change. Whoever reads it learns nothing of
records: it holds what the coordinator is told (protocols/identity/join.py, Report), and whether
the coordinator is reached.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import msgspec

from anabranch.protocols.errors import ConfigError
from anabranch.protocols.identity.join import Report, Text
from anabranch.storage.files import write_atomic

FILE = "state.json"
STALE_S = 60.0  # without a new state.json the agent does not run, whatever its pid


class AgentState(Report, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """state.json: a Report, and what only the site needs."""

    connected: bool
    at: float  # seconds since 1970, UTC: when this was written
    pid: Annotated[int, msgspec.Meta(ge=1)]
    link: Text = ""  # why the coordinator is not reached: a safe sentence


def agent_state(
    report: Report, *, connected: bool, at: float, link: str = "", pid: int | None = None
) -> AgentState:
    """Return the state of this process (or of `pid`) around a report."""
    return AgentState(
        **msgspec.structs.asdict(report),
        connected=connected,
        at=at,
        pid=os.getpid() if pid is None else pid,
        link=plain(link),
    )


def plain(text: str) -> str:
    """Return text as `Text` allows it: 500 characters, none of them for controlling terminals."""
    return "".join(c if c.isprintable() else " " for c in text[:500])


def write_state(folder: Path, state: AgentState) -> None:
    """Replace state.json."""
    write_atomic(folder / FILE, msgspec.json.encode(state), 0o600)


def read_state(folder: Path) -> AgentState | None:
    """Return the last state; None if there is none. Raises ConfigError for a broken file."""
    path = folder / FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=AgentState)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}; delete it, the agent writes it anew") from None


def running(state: AgentState | None, now: float) -> bool:
    """Whether the agent that wrote `state` runs: its state is fresh and its process is there."""
    return state is not None and now - state.at < STALE_S and alive(state.pid)


def alive(pid: int) -> bool:
    """Whether there is a process of this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is there, and somebody else's
        return True
    return True
