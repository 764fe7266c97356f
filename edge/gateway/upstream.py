"""The gateway as one Flower client: a round above becomes a round below.

`train` writes the round into the gateway's state and waits until the gRPC process has ended it;
the two processes share that file and nothing else. Asked again, it returns the same frame: what
devices sent is counted once, above and below. What leaves is the sum over at least min_cohort
devices, or noised; no device's name, count or loss.

In a run with [secure_aggregation] the mean itself is kept here, and the gateway is one member of
the coordinator's sums, as a site is (client/sums/participant.py): its delta is its devices' mean,
and what it needs between two stages is in client/sums/between.py, for Flower starts a process for
each. That hides the gateway from the coordinator; [secure_aggregation] of gateway.toml hides
devices from it.

With [privacy] it states one mechanism for all devices, and as epsilon what a record has spent on
a device that was in every private round of this gateway, over all its runs: an upper bound for
each of them, as far as this gateway asked.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sized
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.client.sums.between import InMemoryFile
from anabranch.client.sums.given import FOLDER as SECURE
from anabranch.client.sums.given import InFile
from anabranch.client.sums.kept import InFrame
from anabranch.client.sums.participant import PARTICIPANTS, Participant
from anabranch.client.sums.terms import hidden, vector_of
from anabranch.edge.gateway.aggregate import require_linear
from anabranch.edge.gateway.asking import Opener
from anabranch.edge.gateway.config import GatewayFolder
from anabranch.edge.gateway.published import Shelf
from anabranch.edge.gateway.results import forget_results
from anabranch.edge.gateway.store import Row, Store
from anabranch.edge.gateway.tasks import mechanism_of
from anabranch.edge.runtime.trust import load_private, new_key
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import BundleError, ConfigError, DataError, RunError
from anabranch.protocols.identity.proposal import Signed
from anabranch.protocols.messages import Assignment, Evaluated, Trained
from anabranch.protocols.secagg.floors import NO_LIMITS
from anabranch.protocols.secagg.member import Answer, Limits
from anabranch.protocols.secagg.messages import Request

POLL_S = 0.1
GRACE = 0.8  # share of the margin before the coordinator's deadline in which ending is waited for


def own_key(folder: GatewayFolder) -> Ed25519PrivateKey:
    """Return the key that the gateway signs with in secure sums; made when it is first needed."""
    file = folder.authority / "peer.key"
    try:
        if not file.exists():
            new_key(file)
        return load_private(file)
    except BundleError as error:
        raise ConfigError(str(error)) from None


class GatewaySite:
    """A SiteLike (client/site_like.py) whose records are on the gateway's devices."""

    def __init__(
        self,
        folder: Path,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._folder = GatewayFolder(folder)
        self._file = self._folder.read()
        self._store = Store(self._folder.state)
        keys = [bytes.fromhex(key) for key in self._file.bundle_keys]
        shelf = Shelf(self._folder.bundles(self._file), keys, self._folder.files)
        self._opener = Opener(self._folder, self._file, self._store, shelf)
        self._clock, self._sleep = clock, sleep

    @property
    def name(self) -> str:
        """The name in gateway.toml."""
        return self._file.name

    @property
    def max_rank(self) -> int | None:
        """Devices train whatever part is asked for."""
        return None

    def admit(self, run: str, config: RunConfig, signed: Signed | None) -> None:
        """Admit every run: a gateway's operator decides with the tasks that are published."""

    def sizes(self, config: RunConfig) -> tuple[Sized, Sized]:
        """Return as many records as the devices have declared, and none held out.

        Raises ConfigError for a run that no gateway can serve, DataError if too few devices
        have called.
        """
        require_linear(config)
        return range(self._opener.described()), ()

    def train(self, assignment: Assignment, adapter: Adapter) -> tuple[Trained, bytes]:
        """Return the devices' mean delta as one frame, in the run's codec.

        Raises what Opener.open raises, RunError if the round was not ended in time (the gRPC
        process is not running) or is not kept any more, DataError if it ended with nothing to send.
        """
        row = self._opener.open(assignment, adapter)
        forget_results(self._store, self._folder)
        row = self._ended(row, assignment.config.federation.deadline_s)
        if row["state"] != "closed":
            raise DataError(f"gateway {self.name}: {row['reason']}")
        if row["result"] is None:
            raise RunError(
                f"gateway {self.name}: the delta of round {row['number']} is not kept any more: "
                "the run went on, or the round ended long ago"
            )
        try:
            frame = (self._folder.results / row["result"]).read_bytes()
        except OSError as error:
            raise RunError(
                f"gateway {self.name}: the delta of round {row['number']} cannot be read "
                f"({error.strerror}); restore {self._folder.results.name}/"
            ) from None
        if assignment.config.secure_aggregation is None:
            return self._report(row), frame
        delta = wire.decode_delta(frame, adapter.spec, assignment.part)
        member = self._participant(assignment.run)
        PARTICIPANTS.keep(self._place, member, assignment, adapter, delta)
        return hidden(self._report(row), assignment.config), b""

    def peer_key(self, run: str, config: RunConfig) -> str | None:
        """Return its Ed25519 public key in the coordinator's sums, hex; None: the run has none."""
        return None if config.secure_aggregation is None else self._participant(run).public_key

    def secure(
        self, assignment: Assignment, request: Request, limits: Limits = NO_LIMITS
    ) -> Answer:
        """Answer one stage of a sum of the coordinator; raises as SummingSite says."""
        return self._participant(assignment.run).answer(assignment, request, limits, vector_of)

    @property
    def _place(self) -> str:
        return str(self._folder.folder)

    def _participant(self, run: str) -> Participant:
        """Return this gateway's part in the secure sums of a run."""

        def make() -> Participant:
            name = hashlib.sha256(run.encode()).hexdigest()
            folder = self._folder.folder / SECURE
            return Participant(
                self.name,
                own_key(self._folder),
                InFile(folder / "given" / name),
                saved=InFrame(folder / "kept" / name),
                between=InMemoryFile.of(f"{folder.resolve()}/{name}"),
            )

        return PARTICIPANTS.of(run, self._place, make)

    def evaluate(self, assignment: Assignment, adapter: Adapter) -> Evaluated:
        """Refuse: devices send deltas, no metrics."""
        raise DataError(
            f"gateway {self.name}: devices send no metrics of their records; give the coordinator "
            "records of its own, or set federation.client_evaluation = false"
        )

    def _ended(self, row: Row, deadline_s: float) -> Row:
        margin = row["opened"] + deadline_s - row["deadline"]
        until = row["deadline"] + GRACE * margin
        while row["state"] in ("open", "closing"):
            if self._clock() > until:
                raise RunError(
                    f"gateway {self.name}: round {row['number']} was not ended in time; is "
                    "`anabranch edge gateway serve` running?"
                )
            self._sleep(POLL_S)
            row = self._store.row("SELECT * FROM rounds WHERE id = ?", row["id"]) or row
        return row

    def _report(self, row: Row) -> Trained:
        mechanism = mechanism_of(row)
        facts = {
            "site": self.name,
            "num_examples": row["examples"],
            "steps": row["steps"],
            "seconds": max(0.0, row["closed"] - row["opened"]),
        }
        if mechanism is None:
            return Trained(**facts)
        return Trained(
            **facts,
            epsilon=mechanism.epsilon,
            delta=mechanism.delta,
            noise_multiplier=mechanism.noise_multiplier,
            sample_rate=mechanism.sample_rate,
        )
