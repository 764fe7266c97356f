"""A site behind its owner's policy: every message is decided on before the site hears of it.

    describe    admit: may this run ask at all?     sizes: only of a run that was just admitted
    train       decided on, counted as begun, trained under the limits, counted, sent
    evaluate    decided on, counted, evaluated under the limits, counted, sent
    secure      decided on, with the roster of an invitation; answered, counted, sent

Policy, approvals and usage are read from the site's folder for every message: what the owner
changes counts for the next one. While a site works it calls `watch` at every step, which ends
the work when its time, its memory or the hours of the site are over. Whatever cannot be read,
counted or logged is refused (journal.py says what is logged).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from anabranch.client.data.records import fingerprint
from anabranch.client.flower import NO_LIMITS, SiteLike, SummingSite, peer_key_of
from anabranch.client.policy.approvals import Approvals
from anabranch.client.policy.by_rule import rule_for
from anabranch.client.policy.here import Here
from anabranch.client.policy.here import here_of as here_of
from anabranch.client.policy.journal import Audit, Journal, digest_of, privacy_of
from anabranch.client.policy.peers import limits_for, require_roster
from anabranch.client.policy.policy_file import Policy, policy_digest, read_policy
from anabranch.client.policy.resources import MIB, hold_to_cores, resident_bytes
from anabranch.client.policy.rules import (
    Asked,
    Code,
    NotAllowed,
    as_entry,
    decide,
    over_bytes,
    seconds_left,
)
from anabranch.client.policy.usage import Usage, UsageBook, Used
from anabranch.client.policy.watched import SaysZeros, Watched, WithRecords, both, bytes_of
from anabranch.client.policy.watched import Watch as Watch
from anabranch.client.question import key_of
from anabranch.client.refusals import Tells, tells
from anabranch.protocols import messages
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PolicyError, ProtocolError
from anabranch.protocols.identity.proposal import Signed
from anabranch.protocols.messages import Assignment, Evaluated, Trained
from anabranch.protocols.secagg.member import Answer, Limits
from anabranch.protocols.secagg.messages import Invite, Request
from anabranch.protocols.secagg.terms import Roster

CHECKPOINT_S = 5.0  # between two writings of the seconds used, while a site works

log = logging.getLogger(__name__)


class Stopped(NotAllowed):
    """Work that must end. `sentence` leaves instead, of a run that hides updates: see refusals.py.

    At which step, or by how much memory, may depend on the records.
    """

    def __init__(self, code: Code, message: str, sentence: str) -> None:
        super().__init__(code, message)
        self.sentence = sentence


@dataclass(eq=False)
class Work:
    """One message in work: what it may still take, and what of it is written down."""

    policy: Policy
    usage: Usage
    number: int
    deadline: float  # of the stopwatch
    written: float  # of the stopwatch: seconds until then are in `usage`


@dataclass(eq=False)
class GuardedSite:
    """The site in `folder`, as its owner allows it to be asked; a SiteLike.

    A site with a `watch` gets this one after its own. Raises NotAllowed, which is a PolicyError,
    for whatever the policy does not allow; ConfigError if the folder is not that of a joined site.
    """

    folder: Path
    site: SiteLike
    audit: Audit | None = None
    clock: Callable[[], float] = time.time  # seconds since 1970, UTC
    here: Here | None = None  # None: as the folder's identity/ says
    stopwatch: Callable[[], float] = time.monotonic  # seconds
    memory: Callable[[], int] = resident_bytes
    _roster: Roster | None = field(default=None, init=False)  # shown, for the next question
    _admitted: str = field(default="", init=False)  # configuration whose records may be counted
    _work: Work | None = field(default=None, init=False)
    _zeros: bool = field(default=False, init=False)  # whether the update in work counts as zeros
    _known: tuple[object, str] = field(default=(None, ""), init=False)  # records, fingerprint

    def __post_init__(self) -> None:
        self.approvals, self.book = Approvals(self.folder), UsageBook(self.folder)
        self.journal = Journal(self.site.name, self.audit, self.clock)
        self._here = here_of(self.folder) if self.here is None else self.here
        if isinstance(self.site, Watched):
            self.site.watch = both(self.site.watch, self.watch)
        if isinstance(self.site, SaysZeros):
            self.site.on_zeros = self._note_zeros

    @property
    def name(self) -> str:
        """Return the site's name."""
        return self.site.name

    @property
    def max_rank(self) -> int | None:
        """Return the highest LoRA rank the site trains; None: any."""
        return self.site.max_rank

    def peer_key(self, run: str, config: RunConfig) -> str | None:
        """Return the site's public key in secure sums; None: it takes part in none."""
        return peer_key_of(self.site, run, config)

    def show_roster(self, roster: Roster) -> None:
        """Keep a roster for the owner, who is asked to approve the run that comes with it."""
        self._roster = roster

    def admit(self, run: str, config: RunConfig, signed: Signed | None) -> None:
        """Raise NotAllowed unless this run may ask."""
        self._admitted = ""
        roster, self._roster = self._roster, None
        with self._refusals(run, signed):
            self._decide(run, config, signed, roster=roster)
            if roster is not None:  # before a round is trained that could not be summed
                require_roster(self.folder, signed, roster, audit=self.audit, clock=self.clock)
        self.site.admit(run, config, signed)
        self._admitted = config.digest()

    def sizes(self, config: RunConfig) -> tuple[Sized, Sized]:
        """Return the records to be counted, of the configuration that was admitted last."""
        if self._admitted != config.digest():
            raise NotAllowed("run", "records are counted only for a run that was just admitted")
        return self.site.sizes(config)

    def train(self, assignment: Assignment, adapter: Adapter) -> tuple[Trained, bytes]:
        """Return what the site learned, if and as far as its owner allows the round."""
        question, down = key_of(assignment, adapter), bytes_of(adapter)
        with self._working(assignment, question=question, down=down) as work:
            config, data = assignment.config, self._data(assignment.config)
            self._zeros = False
            report, frame = self.site.train(assignment, adapter)
            refusal = over_bytes(work.policy, work.usage, work.number, down=0, up=len(frame))
            if refusal is not None:
                raise refusal
            self._count(work, Used(up=len(frame)))
            if self._zeros:  # for the owner alone, and without the reason
                self.journal.write("update-of-zeros", run=assignment.run, round=assignment.round)
            self.journal.write(
                "round-trained",
                run=assignment.run,
                proposal=digest_of(assignment.signed),
                round=assignment.round,
                data=data,
                examples=self._examples(config, report),
                privacy=privacy_of(config),
                epsilon=report.epsilon,
                delta=report.delta,
                up=len(frame),
            )
            return report, frame

    def evaluate(self, assignment: Assignment, adapter: Adapter) -> Evaluated:
        """Return metrics on held-out records, if the owner allows it."""
        with self._working(assignment, down=bytes_of(adapter)):
            return self.site.evaluate(assignment, adapter)

    def secure(
        self, assignment: Assignment, request: Request, limits: Limits = NO_LIMITS
    ) -> Answer:
        """Answer one stage of a secure sum, above the floors of the owner's policy.

        `limits` are those of whoever asks; the owner's count where they ask for more.
        """
        with self._working(assignment, down=len(messages.encode(request))) as work:
            if not isinstance(self.site, SummingSite):
                raise ProtocolError(f"{self.name} takes part in no secure sums")
            if isinstance(request, Invite):
                require_roster(
                    self.folder,
                    assignment.signed,
                    request.roster,
                    audit=self.audit,
                    clock=self.clock,
                )
            own = limits_for(work.policy)
            floors = Limits(
                minimum=max(own.minimum, limits.minimum),
                threshold=max(own.threshold, limits.threshold),
                colluding=max(own.colluding, limits.colluding),
            )
            answer = self.site.secure(assignment, request, floors)
            up = len(answer.data) + len(messages.encode(answer.reply))
            refusal = over_bytes(work.policy, work.usage, work.number, down=0, up=up)
            if refusal is not None:
                raise refusal
            self._count(work, Used(up=up))
            if answer.data:
                self.journal.write(
                    "update-masked",
                    run=assignment.run,
                    proposal=digest_of(assignment.signed),
                    round=assignment.round,
                    up=up,
                )
            return answer

    def watch(self, activity: str, step: int, steps: int) -> None:
        """Raise NotAllowed if the message in work may not go on; called at every step of it."""
        work = self._work
        if work is None:
            return
        now, round = self.stopwatch(), f"round {work.number}: stopped"
        at = f"{round} at step {step} of {steps}"
        if now - work.written >= CHECKPOINT_S:
            self._count(work, Used())
        if now > work.deadline:
            over = "its time at this site is over"
            raise Stopped("minutes", f"{at}, {over}", f"{round}, {over}")
        if not work.policy.opening.open_at(self.clock()):
            over = "the hours of this site are over"
            raise Stopped("hours", f"{at}, {over}", f"{round}, {over}")
        self._require_memory(work.policy)

    def _note_zeros(self) -> None:
        self._zeros = True

    def _decide(
        self,
        run: str,
        config: RunConfig,
        signed: Signed | None,
        *,
        round: int = 0,
        question: str = "",
        down: int = 0,
        roster: Roster | None = None,
    ) -> tuple[Policy, Usage]:
        """Return the policy, and what the run has used, if a message is allowed; or PolicyError."""
        policy, entries = read_policy(self.folder), self.approvals.entries()
        self.journal.policy(policy_digest(self.folder))
        asked = Asked(
            run=run,
            config=config,
            signed=signed,
            here=self._here,
            now=self.clock(),
            usage=self.book.read(run),
            round=round,
            trains=bool(question),
            question=question,
            down=down,
            entries=entries,
        )
        refusal = decide(policy, asked)
        if refusal is not None:
            if refusal.code == "pending" and signed is not None:
                self.approvals.note(signed.proposal, signed.key, config, asked.now, roster=roster)
            raise refusal
        assert signed is not None  # `decide` refuses what is unsigned
        rule = self._noted(policy, asked, signed)
        if signed.proposal.digest in asked.usage.admitted:
            return policy, asked.usage
        return policy, self._first(asked, signed, rule)

    def _noted(self, policy: Policy, asked: Asked, signed: Signed) -> str:
        """Write down which rule lets a proposal in, if one does; return its name, else ""."""
        rule = rule_for(policy, asked.entries, as_entry(asked, signed))
        if rule is None:
            return ""
        known = asked.entries.get(signed.proposal.digest)
        if known is None or known.by != rule.name:  # it is counted (Rule.max_runs)
            self.approvals.note(signed.proposal, signed.key, asked.config, asked.now, rule.name)
        return rule.name

    def _first(self, asked: Asked, signed: Signed, rule: str) -> Usage:
        """Write down that a proposal is allowed, the first time it is."""
        proposal = signed.proposal
        self.journal.write(
            "run-allowed",
            run=asked.run,
            proposal=proposal.digest,
            author=proposal.author,
            code=proposal.code,
            config=proposal.config,
            base=proposal.base,
            contract=proposal.contract,
            privacy=privacy_of(asked.config),
            rule=rule,
        )
        usage = asked.usage.admitting(proposal.digest)
        self.book.write(usage)
        return usage

    @contextmanager
    def _working(self, assignment: Assignment, *, down: int, question: str = "") -> Iterator[Work]:
        """Decide on a message, and count what is done inside the block.

        `down` are its bytes; `question` is what it asks to be trained, if it does.
        """
        run, number = assignment.run, assignment.round
        with self._refusals(run, assignment.signed, tells(assignment.config)):
            policy, usage = self._decide(
                run,
                assignment.config,
                assignment.signed,
                round=number,
                question=question,
                down=down,
            )
            self._require_memory(policy)
            hold_to_cores(policy.limits.cores)
            began = self.stopwatch()
            work = Work(policy, usage, number, began + seconds_left(policy, usage, number), began)
            self._count(work, Used(questions=(question,) if question else (), down=down))
            self._work = work
            try:
                yield work
            finally:
                self._work = None
                self._count(work, Used())

    @contextmanager
    def _refusals(self, run: str, signed: Signed | None, told: Tells = "all") -> Iterator[None]:
        """Write every refusal of the block to the audit log; a broken policy is one, too."""
        try:
            yield
        except PolicyError as error:
            refusal = error if isinstance(error, NotAllowed) else NotAllowed("policy", str(error))
            self.journal.refusal(run, signed, refusal)
            if isinstance(refusal, Stopped) and told != "all":
                refusal = NotAllowed(refusal.code, refusal.sentence)
            raise refusal from None

    def _count(self, work: Work, more: Used) -> None:
        """Add to what the run has used, with the seconds since it was last written."""
        now = self.stopwatch()
        usage = work.usage.plus(work.number, more.plus(seconds=now - work.written))
        try:
            self.book.write(usage)
        except OSError as error:
            log.error("%s: usage cannot be written: %s", self.name, error)
            raise NotAllowed(
                "policy", "what this run uses cannot be written down, so nothing more is allowed"
            ) from None
        work.usage, work.written = usage, now

    def _require_memory(self, policy: Policy) -> None:
        most, now = policy.limits.memory_mb, self.memory()
        if most is not None and now > most * MIB:
            raise Stopped(
                "memory",
                f"the site holds {now // MIB} MiB of memory, and its policy allows {most}",
                "the site holds more memory than its policy allows",
            )

    def _examples(self, config: RunConfig, report: Trained) -> int:
        """Return the records trained on, for the owner's own log: a secure round says none."""
        if config.secure_aggregation is None:
            return report.num_examples
        return len(self.site.sizes(config)[0])

    def _data(self, config: RunConfig) -> str:
        """Return the fingerprint of the training records; "" of a site that has none to show."""
        if not isinstance(self.site, WithRecords):
            return ""
        train, _ = self.site.records(config)
        if self._known[0] is not train:  # the same object: read once, hashed once
            self._known = (train, fingerprint(train))
        return self._known[1]
