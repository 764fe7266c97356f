"""A site in the secure sums of a run: the delta that it keeps, and its part in the five stages.

    train ─► kept ─► advertise ─► share ─► mask ─► agree ─► reveal
              ▲                    │        └─ written down as given, and dropped
              └────────────────────┘ another attempt of the same round, with fresh keys

A delta is given to one sum. Once a masked vector has left, others may open the sum that it is in
without asking this site again; the same update in a second sum, among others, would show a
difference. So a round is written down as given (given.py) before the masked vector leaves, and
every other sum of that round is refused, for ever. Before that it may be in several attempts, one
at a time. A real site finds its delta again when it is started anew (kept.py). The secrets of a
sum are in memory alone: a site that is started anew in the middle of one is a dropout, and the
others go on without it.
(Where each message has a process of its own, they are in memory that outlives it: between.py.)

Participants are kept per process and not per site object: the clients of a simulation are made
anew for every message (simulations/clients.py).
"""

from __future__ import annotations

import functools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from anabranch.client.sums.between import Between, Left, OneProcess, longest
from anabranch.client.sums.given import Given, InMemory
from anabranch.client.sums.terms import Kept, digest_of, require_going_on, require_terms
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.errors import ProtocolError, RunError
from anabranch.protocols.messages import Assignment
from anabranch.protocols.secagg.member import Answer, Limits, Member
from anabranch.protocols.secagg.messages import Adverts, Delivery, Invite, Request
from anabranch.protocols.secagg.terms import Terms

MOST_RUNS = 8  # whose participants are kept in one process
MOST_ATTEMPTS = 64  # of one round, whose requests are known to be over

Vector = Callable[[Delta, Assignment, Terms, int], NDArray[Any]]  # see vector_of


class Saved(Protocol):
    """Where a process that is started anew finds the delta that was kept."""

    def write(self, kept: Kept, adapter: Adapter) -> None:
        """Keep it, trained from `adapter`; durable when this returns. Raises RunError."""

    def read(self) -> Kept | None:
        """Return it; None: there is none. Raises RunError or ProtocolError if it is damaged."""

    def clear(self) -> None:
        """Forget it."""


class Unsaved:
    """Of a simulated site: what it keeps is gone with its process."""

    def write(self, kept: Kept, adapter: Adapter) -> None:
        """Do nothing."""

    def read(self) -> Kept | None:
        """Return None."""
        return None

    def clear(self) -> None:
        """Do nothing."""


class Participant:
    """One site in one run. Its methods may be called from many threads."""

    def __init__(
        self,
        name: str,
        key: Ed25519PrivateKey,
        given: Given,
        masked: Given | None = None,
        saved: Saved | None = None,
        between: Between | None = None,
        clock: Callable[[], float] = time.monotonic,  # one for all processes of a machine
    ) -> None:
        self.name, self._key, self._given = name, key, given
        self.masked: Given = masked or InMemory()  # attempts that were charged (noised.py)
        self._saved: Saved = saved or Unsaved()
        self._between: Between = between or OneProcess()
        self._lock, self._clock = threading.Lock(), clock
        self._until = 0.0  # of the clock: its sum is over then, whatever became of it
        self._kept: Kept | None = None
        self._member: Member | None = None
        self._about: Assignment | None = None  # what its sum is of, without `signed`
        self._rank = 0  # of the adapter that it is a delta of
        self._advertised = 0  # members of its sum whose keys arrived
        self._over: OrderedDict[str, None] = OrderedDict()  # attempts that another one replaced

    @property
    def public_key(self) -> str:
        """Return its Ed25519 public key, hex."""
        return self._key.public_key().public_bytes_raw().hex()

    @property
    def kept(self) -> Kept | None:
        """Return the delta in memory that waits for its sum; None: there is none."""
        return self._kept

    def keep(self, assignment: Assignment, adapter: Adapter, delta: Delta) -> None:
        """Keep what was trained from `adapter` for the sums of its round; not once it was given.

        The same delta again changes nothing, so that a sum that is under way goes on. Raises
        RunError if it cannot be written down; then it is not kept.
        """
        plain = msgspec.structs.replace(assignment, signed=None)
        with self._lock, self._between.alone():
            if assignment.round in self._given.read():
                return
            kept = Kept(assignment=plain, model=digest_of(adapter), delta=delta)
            self._saved.write(kept, adapter)
            self._kept = kept
            if not self._goes_on_with(kept):
                self._end()
                self._between.write(None)

    def drop(self) -> None:
        """Forget the delta, and the sum that it was in."""
        with self._lock, self._between.alone():
            self._let_go()
            self._end()
            self._between.write(None)

    def expire(self) -> None:
        """Forget the secrets of a sum that has taken longer than any may; the delta stays.

        For a long-lived process: what lies between two of them goes with between.sweep. While
        another thread is answering, nothing is done: it is tried again soon.
        """
        if self._lock.acquire(blocking=False):
            try:
                self._end_late()
            finally:
                self._lock.release()

    def answer(
        self, assignment: Assignment, request: Request, limits: Limits, vector: Vector
    ) -> Answer:
        """Answer one stage. Raises as SummingSite.secure (client/site_like.py) says."""
        with self._lock, self._between.alone():
            self._take_up()
            given = self._given.read()
            if isinstance(request, Invite):
                self._invited(assignment, request, limits, given)
            member = self._member
            if member is None or member.terms.round != assignment.round:
                raise ProtocolError(
                    f"round {assignment.round}: {self.name} is in no secure sum of it: none was "
                    "begun, or its process was started anew since"
                )
            about = self._about
            if about is None or msgspec.structs.replace(assignment, signed=None) != about:
                raise ProtocolError(
                    f"round {assignment.round}: the sum that {self.name} is in was begun with "
                    "another run, part or configuration than it is asked to go on with"
                )
            member.hold_to(limits)  # its owner may have changed them since the invitation
            instance = member.terms.instance
            self._require_not_given(assignment.round, given, instance)
            if member.stage == "mask" and assignment.round in given:
                raise ProtocolError(
                    f"round {assignment.round}: {self.name} has masked its update in another "
                    "process, which ended before it could say so"
                )
            if not isinstance(request, Adverts):
                require_going_on(member, self._rank, request)
            contribute = functools.partial(self._vector, vector, assignment, member.terms)
            answer = member.answer(request, contribute)
            if isinstance(request, Adverts):  # its group is known by now
                require_going_on(member, self._rank, request)
                self._advertised = len(request.adverts)
            if isinstance(request, Delivery):
                self._given.write(given | {assignment.round: instance})
                self._let_go()
            self._put_down()
            return answer

    def _goes_on_with(self, kept: Kept) -> bool:
        """Return whether the sum under way is of this delta, or of one trained like it."""
        try:
            self._take_up()
        except (ProtocolError, RunError):  # damaged: no sum goes on with it
            return False
        member = self._member
        return (
            member is not None
            and self._about == kept.assignment
            and member.terms.model == kept.model
        )

    def _take_up(self) -> None:
        """Go on where another process has stopped, but not with a sum that is over by now."""
        if not self._between.many:
            self._end_late()
            return
        left, self._member = self._between.read(), None
        if left is not None:
            self._member = Member.resumed(self._key, left.member)
            self._about, self._rank = left.about, left.rank
            self._advertised, self._over = left.advertised, OrderedDict.fromkeys(left.over)
            self._until = left.until
            if self._end_late():
                self._between.write(None)

    def _put_down(self) -> None:
        """Let another process go on from here."""
        if not self._between.many:
            return
        paused = None if self._member is None else self._member.paused()
        if paused is None or self._about is None:
            self._between.write(None)
            return
        self._between.write(
            Left(
                member=paused,
                about=self._about,
                rank=self._rank,
                advertised=self._advertised,
                over=tuple(self._over),
                until=self._until,
            )
        )

    def _vector(self, vector: Vector, assignment: Assignment, terms: Terms) -> NDArray[Any]:
        # Once more: another process may have trained anew.
        kept = require_terms(terms, assignment, self._kept or self._saved.read(), self.name)
        return vector(kept.delta, assignment, terms, self._advertised)

    def _invited(
        self, assignment: Assignment, invite: Invite, limits: Limits, given: dict[int, str]
    ) -> None:
        """Begin an attempt, unless this one is under way. Raises as `answer`."""
        terms, member = invite.terms, self._member
        if member is not None and member.terms.instance == terms.instance:
            return  # asked again, or something else under its name: the member decides
        self._require_not_given(assignment.round, given)
        if terms.instance in self._over:
            raise ProtocolError(
                f"round {assignment.round}: sum {terms.instance[:12]}… was given up for a newer one"
            )
        kept = require_terms(terms, assignment, self._kept or self._saved.read(), self.name)
        member = Member(self.name, self._key, invite, limits=limits)
        self._end()
        self._kept, self._member = kept, member
        self._about, self._rank = kept.assignment, kept.delta.spec.rank
        self._until = self._clock() + longest(kept.assignment.config)

    def _require_not_given(self, number: int, given: dict[int, str], instance: str = "") -> None:
        """Refuse a round that was given, but by the sum that is under way."""
        by = given.get(number)
        if by is not None and by != instance:
            raise ProtocolError(
                f"round {number}: {self.name} has given its update to a sum already, and gives "
                "it to no second one: the difference would show updates"
            )

    def _end_late(self) -> bool:
        """End a sum that has taken longer than any may; return whether there was one."""
        late = self._member is not None and self._clock() > self._until
        if late:
            self._end()
        return late

    def _let_go(self) -> None:
        self._kept = None
        self._saved.clear()

    def _end(self) -> None:
        if self._member is not None:
            self._over[self._member.terms.instance] = None
            if len(self._over) > MOST_ATTEMPTS:
                self._over.popitem(last=False)
        self._member = None


class Participants:
    """The participants of this process, by run and site; those of the newest MOST_RUNS runs."""

    def __init__(self, most_runs: int = MOST_RUNS) -> None:
        self._most = most_runs
        self._lock = threading.Lock()
        self._runs: OrderedDict[str, dict[str, Participant]] = OrderedDict()
        self._keeping: dict[str, dict[str, int]] = {}  # run -> site -> round whose delta is kept

    def of(self, run: str, site: str, make: Callable[[], Participant]) -> Participant:
        """Return a site's participant, made the first time; `site`: unique in this process."""
        with self._lock:
            sites = self._runs.setdefault(run, {})
            self._runs.move_to_end(run)
            while len(self._runs) > self._most:
                gone, _ = self._runs.popitem(last=False)
                self._keeping.pop(gone, None)
            if site not in sites:
                sites[site] = make()
            return sites[site]

    def keep(
        self, site: str, of: Participant, assignment: Assignment, adapter: Adapter, delta: Delta
    ) -> None:
        """Let a participant keep a delta, and drop those that others kept of earlier rounds."""
        of.keep(assignment, adapter, delta)
        run, number = assignment.run, assignment.round
        with self._lock:
            keeping, sites = self._keeping.setdefault(run, {}), self._runs.get(run, {})
            old = [name for name, kept in keeping.items() if kept < number]
            late = [sites[name] for name in old if name != site and name in sites]
            self._keeping[run] = {n: r for n, r in keeping.items() if n not in old}
            self._keeping[run][site] = number
        for one in late:
            one.drop()

    def expire(self) -> None:
        """Let every participant drop the secrets of a sum that is over by now."""
        with self._lock:
            found = [one for sites in self._runs.values() for one in sites.values()]
        for one in found:
            one.expire()

    def forget(self, run: str) -> None:
        """Drop all participants of a run, and what they keep."""
        with self._lock:
            self._runs.pop(run, None)
            self._keeping.pop(run, None)


PARTICIPANTS = Participants()
