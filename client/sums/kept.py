"""A kept delta (terms.py) that outlives the process: which of the site's answers it is.

    answers/<key>/frame    the delta, as every round's (client/answers.py)
    secure/kept/<run>      Waits: which answer, of which question, trained from which model;
                            of a gateway, which keeps no answers, Whole: the delta itself

The record is written before the site says that it has trained, and goes when the delta was given
to a sum or the next round was trained. So a site that is started anew between its training and
a sum is a member of the next attempt as if nothing had been; its secrets are fresh.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import msgspec

from anabranch.client.answers import Answers
from anabranch.client.question import key_of, writing
from anabranch.client.sums.terms import Kept
from anabranch.protocols import messages, wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import MalformedMessage, RunError
from anabranch.protocols.messages import Assignment
from anabranch.protocols.spec import AdapterSpec
from anabranch.storage.files import write_atomic

log = logging.getLogger(__name__)


class Waits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is written down of a kept delta."""

    key: str  # of its question: its answer has the delta
    model: str  # SHA-256 of the frame that it was trained from
    assignment: Assignment  # without `signed`
    spec: AdapterSpec


class Whole(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A kept delta, written down whole."""

    model: str  # SHA-256 of the frame that it was trained from
    assignment: Assignment  # without `signed`
    spec: AdapterSpec
    frame: bytes


@dataclass(frozen=True)
class InFrame:
    """Of a gateway (participant.Saved), which keeps no answers: the delta itself, at `path`."""

    path: Path

    def write(self, kept: Kept, adapter: Adapter) -> None:
        """Write it down; durable when this returns. Raises RunError if it cannot be written."""
        whole = Whole(
            model=kept.model,
            assignment=kept.assignment,
            spec=adapter.spec,
            frame=wire.encode(kept.delta),
        )
        with writing():
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(self.path, messages.encode(whole), 0o600)

    def read(self) -> Kept | None:
        """Return what waits; None: nothing does. Raises RunError if it cannot be read."""
        try:
            whole = msgspec.json.decode(self.path.read_bytes(), type=Whole)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _unreadable(self.path, error) from None
        delta = wire.decode_delta(whole.frame, whole.spec, whole.assignment.part)
        return Kept(assignment=whole.assignment, model=whole.model, delta=delta)

    def clear(self) -> None:
        """Forget it. What cannot be removed is logged, and does no harm: see secure.Given."""
        _remove(self.path)


@dataclass(frozen=True)
class InAnswers:
    """Of a real site (participant.Saved): `path` says which of `answers` waits for its sum."""

    path: Path
    answers: Answers

    def write(self, kept: Kept, adapter: Adapter) -> None:
        """Write it down; durable when this returns. Raises RunError if it cannot be written."""
        waits = Waits(
            key=key_of(kept.assignment, adapter),
            model=kept.model,
            assignment=kept.assignment,
            spec=adapter.spec,
        )
        with writing():
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(self.path, messages.encode(waits), 0o600)

    def read(self) -> Kept | None:
        """Return what waits; None: nothing does, or its answer is not kept any more.

        Raises RunError if the record or the answer cannot be read, ProtocolError if the answer is
        no delta of what the record says.
        """
        try:
            waits = messages.decode(self.path.read_bytes(), Waits)
        except FileNotFoundError:
            return None
        except (OSError, MalformedMessage) as error:
            raise _unreadable(self.path, error) from None
        held = self.answers.held(waits.key)
        if held is None:
            return None
        delta = wire.decode_delta(held[1], waits.spec, waits.assignment.part)
        return Kept(assignment=waits.assignment, model=waits.model, delta=delta)

    def clear(self) -> None:
        """Forget it. What cannot be removed is logged, and does no harm: see secure.Given."""
        _remove(self.path)


def _unreadable(path: Path, error: Exception) -> RunError:
    why = error.strerror if isinstance(error, OSError) else error  # without the folder
    return RunError(
        f"secure/kept/{path.name} in the site's folder says which update waits for its sum, and "
        f"cannot be read ({why}). Remove it: this round goes on without the site, the next one "
        "with it"
    )


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be removed: %s", path, error.strerror)
