"""What makes a site one that takes part in secure sums (participant.py).

Its key is the one it has joined with, or that is made in its folder when Flower starts a process
for each message (client/app.py); another site, as of a simulation, has a fresh one per process and
run. For a simulated site no time passes in a sum. What must outlive the process is in its folder,
for a simulated site in memory:

    secure/given/<run>    to which sum the update of each round was given
    secure/masked/<run>   which attempts were charged (noised.py)
    secure/kept/<run>     which answer waits for its sum (kept.py)
"""

from __future__ import annotations

from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from anabranch.client.accounted import Accounted
from anabranch.client.agent.identity import joined, peer_key
from anabranch.client.answers import Answers
from anabranch.client.personal import checked_run
from anabranch.client.site_like import NO_LIMITS
from anabranch.client.sums.between import InMemoryFile
from anabranch.client.sums.given import FOLDER, InFile, InMemory
from anabranch.client.sums.kept import InAnswers
from anabranch.client.sums.participant import PARTICIPANTS, Participant
from anabranch.client.sums.terms import hidden, vector_of
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.messages import Assignment, Trained
from anabranch.protocols.secagg.member import Answer, Limits
from anabranch.protocols.secagg.messages import Request
from anabranch.protocols.secagg.terms import Terms

Sent = TypeVar("Sent", bytes, Delta | bytes)


class InSums(Accounted):
    """A site as a member of secure sums."""

    _answers: Answers | None  # of a real site, which has files of its own
    process_per_message: bool

    def peer_key(self, run: str, config: RunConfig) -> str | None:
        """Return its public key in the secure sums of a run, hex; None: the run has none."""
        return None if config.secure_aggregation is None else self._participant(run).public_key

    def secure(
        self, assignment: Assignment, request: Request, limits: Limits = NO_LIMITS
    ) -> Answer:
        """Answer one stage of a sum; raises as SummingSite (client/site_like.py) says."""
        participant = self._participant(assignment.run)

        def vector(
            delta: Delta, assignment: Assignment, terms: Terms, advertised: int
        ) -> NDArray[Any]:
            found = vector_of(delta, assignment, terms, advertised)
            noised = self._noised(assignment, delta.spec, participant.masked)
            if noised is not None:
                noised.charge(assignment, terms.instance)  # before the vector can leave
            return found

        try:
            return participant.answer(assignment, request, limits, vector)
        except PrivacyError as error:
            raise self._outward(error) from error

    def _kept_for_sums(
        self, assignment: Assignment, adapter: Adapter, trained: Trained, sent: Sent
    ) -> tuple[Trained, Sent | bytes]:
        """Keep a delta (or its frame) for the secure sums of its round; return what is sent.

        That is b"", and the report without numbers of the records; without secure sums it is what
        was given.
        """
        if assignment.config.secure_aggregation is None:
            return trained, sent
        delta = (
            sent
            if isinstance(sent, Delta)
            else wire.decode_delta(sent, adapter.spec, assignment.part)
        )
        participant = self._participant(assignment.run)
        PARTICIPANTS.keep(self._place_of_sums, participant, assignment, adapter, delta)
        return hidden(trained, assignment.config), b""

    @property
    def _place_of_sums(self) -> str:
        return f"{self.folder}/{self.name}"

    def _participant(self, run: str) -> Participant:
        """Return this site's part in the secure sums of a run."""

        def make() -> Participant:
            own = joined(self.folder) or self.process_per_message
            key = peer_key(self.folder) if own else Ed25519PrivateKey.generate()
            if self._answers is None:
                return Participant(self.name, key, InMemory(), clock=lambda: 0.0)
            folder, file = self.folder / FOLDER, checked_run(run)
            return Participant(
                self.name,
                key,
                InFile(folder / "given" / file),
                InFile(folder / "masked" / file),
                InAnswers(folder / "kept" / file, self._answers),
                InMemoryFile.of(f"{folder.resolve()}/{file}") if self.process_per_message else None,
            )

        return PARTICIPANTS.of(run, self._place_of_sums, make)
