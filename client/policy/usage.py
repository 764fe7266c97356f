"""usage/: what each run has had of this machine so far; exact over restarts.

One file a run, replaced as a whole. A question to train counts once, however often it is asked;
another one counts, also in a round that was trained before: with other adapters, answers of one
round could be compared without end. Seconds and bytes count as often as they were spent. A process
that is killed while it trains has written down all but its last seconds (guard.py, CHECKPOINT_S).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from anabranch.client.policy.policy_file import PRIVATE, read_private
from anabranch.protocols.errors import PolicyError
from anabranch.protocols.tables import NotNegative
from anabranch.storage.files import write_atomic

FOLDER = "usage"
MAX_BYTES = 16 << 20
Bytes = Annotated[int, msgspec.Meta(ge=0)]


class Used(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one round has had."""

    questions: tuple[str, ...] = ()  # that it began to train: an evaluation alone is no round
    seconds: NotNegative = 0.0
    down: Bytes = 0
    up: Bytes = 0

    def plus(self, *, question: str = "", seconds: float = 0.0, down: int = 0, up: int = 0) -> Used:
        """Return the sum of both; `question`: one that is trained, "" if none is."""
        known = not question or question in self.questions
        return Used(
            questions=self.questions if known else (*self.questions, question),
            seconds=self.seconds + max(seconds, 0.0),
            down=self.down + down,
            up=self.up + up,
        )


class Usage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one run has had."""

    run: str
    rounds: dict[int, Used] = {}
    admitted: tuple[str, ...] = ()  # proposals of the run that the audit log names as allowed

    def round(self, number: int) -> Used:
        """Return what one round has had."""
        return self.rounds.get(number, Used())

    @property
    def trained(self) -> int:
        """Return how many questions have begun to train: one a round, but of who compares."""
        return sum(len(used.questions) for used in self.rounds.values())

    @property
    def total(self) -> Used:
        """Return what all rounds have had together."""
        return total(self.rounds)

    def admitting(self, proposal: str) -> Usage:
        """Return the usage with one more proposal that was allowed."""
        return msgspec.structs.replace(self, admitted=(*self.admitted, proposal))

    def plus(self, number: int, more: Used) -> Usage:
        """Return the usage with more in one round."""
        (question,) = more.questions or ("",)
        used = self.round(number).plus(
            question=question, seconds=more.seconds, down=more.down, up=more.up
        )
        return msgspec.structs.replace(self, rounds={**self.rounds, number: used})


def total(rounds: Mapping[int, Used]) -> Used:
    """Return the sum over rounds."""
    return Used(
        questions=tuple(one for used in rounds.values() for one in used.questions),
        seconds=sum(used.seconds for used in rounds.values()),
        down=sum(used.down for used in rounds.values()),
        up=sum(used.up for used in rounds.values()),
    )


@dataclass(frozen=True)
class UsageBook:
    """The usage files of the site in `folder`."""

    folder: Path

    def read(self, run: str) -> Usage:
        """Return what a run has had. Raises PolicyError for a file that cannot be trusted."""
        path = self._path(run)
        if not path.exists():
            return Usage(run=run)
        try:
            usage = msgspec.json.decode(read_private(path, MAX_BYTES), type=Usage)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise PolicyError(
                f"{FOLDER}/{path.name}: {error}; what run {run[:60]} has used is not known, so "
                "nothing more is allowed"
            ) from None
        if usage.run != run:
            raise PolicyError(f"{FOLDER}/{path.name}: is of another run; nothing is allowed")
        return usage

    def write(self, usage: Usage) -> None:
        """Replace what is written of a run."""
        path = self._path(usage.run)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_atomic(path, msgspec.json.encode(usage), PRIVATE)

    def _path(self, run: str) -> Path:
        return self.folder / FOLDER / f"{hashlib.sha256(run.encode()).hexdigest()[:32]}.json"
