"""A round's secure sum at the coordinator: those that trained are asked five quick questions.

    trained ─► advertise ─► share ─► mask ─► agree ─► reveal ─► means of groups
       ▲           └─────────┤        └───────┴─────────┴─► RunError, nothing merged
       └── another attempt ◄─┘ too few left

Each stage has the deadline secure_aggregation.deadline_s, and ends early when everybody has
answered or failed. A site that refuses or is silent is a dropout: the others go on without it
while the threshold holds. What is computed is in protocols/secagg; this file carries it, counts
bytes and seconds, and tells who was lost where.

A sum that falls below its threshold before anybody was asked for a masked vector is tried again
with fresh keys, ATTEMPTS in all, among those that trained: a site that was started anew, or cut
off for a minute, is there again. Left out is who refused for a reason that stays, and who was lost
twice.

A site gives its update of a round to one sum (client/sums/participant.py). So `masking` is called
before the first masked vector is asked for: a coordinator that dies then asks for no second sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import msgspec
from flwr.app import RecordDict

from anabranch.client.sums.stages import STAGE_TYPES, pack_request, unpack_reply
from anabranch.client.sums.terms import few_trained
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.errors import ProtocolError, RunError
from anabranch.protocols.messages import Refused, Trained
from anabranch.protocols.part import Part
from anabranch.protocols.secagg import contribution
from anabranch.protocols.secagg.coordinator import Aggregation
from anabranch.protocols.secagg.messages import STAGES, Stage
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import SecureAggregation
from anabranch.server.assigning import Assigner
from anabranch.server.desk import answers
from anabranch.server.exchange import Exchange
from anabranch.server.flower import Failure, Peer, Question, refusal
from anabranch.server.shortfall import lines
from anabranch.server.sums.terms import (
    FewTrained,
    part_of,
    require_possible,
    roster_of,
    terms_of,
)

ATTEMPTS = 3  # to sum one round
LASTING = frozenset({"config", "data", "model", "privacy", "policy", "roster"})  # reasons that stay
THEN = "the sum goes on with those that answered, if they are enough"


class Taken(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A stage's answer that went into the sum; what it said is not kept here."""

    site: str


@dataclass(frozen=True, kw_only=True)
class Summed:
    """What came of a round's secure sum."""

    deltas: tuple[Delta, ...]  # the weighted mean of each group, one without groups
    survivors: tuple[str, ...]  # whose updates are in it, ascending


@dataclass(eq=False)
class _Under:
    """A sum under way."""

    question: Question[Trained]  # "train", answered
    aggregation: Aggregation
    attempt: int  # from 1
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage
    lost: dict[str, tuple[Stage, Failure]] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0


class SecureSums:
    """Makes one secure sum per round; a run with [secure_aggregation]."""

    def __init__(self, exchange: Exchange, assigner: Assigner, secure: SecureAggregation) -> None:
        self._exchange, self._assigner, self._secure = exchange, assigner, secure

    @property
    def needed(self) -> int:
        """Return how many sites must have trained for a round to be summed."""
        return max(self._exchange.config.federation.quorum, self._secure.minimum)

    def require_possible(self, spec: AdapterSpec, sites: int) -> None:
        """Raise ConfigError, before anybody trains, if no sum of so many could be opened."""
        require_possible(self._exchange.config, self._secure, spec, sites)

    def sum(
        self, question: Question[Trained], adapter: Adapter, masking: Callable[[], None]
    ) -> Summed:
        """Return the means of what the sites of `question` have trained from `adapter`.

        Who was lost on the way is moved from its reports to those that failed. Raises RunError
        with the reason, and what each lost site said, if no sum can be opened: nothing was
        revealed then but by those that were asked to after everybody had agreed.
        """
        attempts: list[_Under] = []
        members = sorted(question.reports)
        while True:
            try:
                under = self._tried(question, adapter, members, len(attempts) + 1, masking)
            except FewTrained:
                if not attempts:
                    raise
                break  # the last attempt says the same, and who was lost
            attempts.append(under)
            if "mask" in under.seconds or len(attempts) == ATTEMPTS:
                break
            members = left(attempts)
            if len(members) < self.needed:
                break
        self._exchange.over()
        means, spoilt = self._means(under, adapter.spec)
        survivors = tuple(sorted(name for members in means for name in members))
        self._settle(attempts, survivors, spoilt)
        if under.aggregation.stage != "done":
            raise RunError(self._why(attempts))
        if not means:
            raise RunError(f"round {question.round}: {'; '.join(sorted(set(spoilt.values())))}")
        return Summed(deltas=tuple(means.values()), survivors=survivors)

    def _tried(
        self,
        question: Question[Trained],
        adapter: Adapter,
        members: Sequence[str],
        attempt: int,
        masking: Callable[[], None],
    ) -> _Under:
        """Return one attempt, carried to its end."""
        exchange = self._exchange
        roster = exchange.peers or roster_of({name: question.peers[name] for name in members})
        terms = terms_of(
            exchange.config, self._secure, question, adapter, members, roster, self._assigner.run
        )
        exchange.event(
            "secure_sum_started",
            round=question.round,
            attempt=attempt,
            sites=list(members),
            instance=terms.instance,
            ring=terms.ring,
            values=terms.values,
        )
        few = partial(few_trained, terms, adapter.spec.rank)  # as every member asks, and refuses
        under = _Under(question, Aggregation(terms, roster, few), attempt)
        while under.aggregation.stage in STAGES:
            stage = under.aggregation.stage
            if stage == "mask":
                masking()
            self._stage(under, stage)
        self._tell(under)
        return under

    def _stage(self, under: _Under, stage: Stage) -> None:
        """Ask one stage, and take the answers until all are there or its deadline."""
        exchange, aggregation, number = self._exchange, under.aggregation, under.question.round
        requests, started = aggregation.requests(), exchange.clock()

        def read(answer: RecordDict | Failure, peer: Peer) -> tuple[Taken, None] | Failure:
            return taken(answer, peer, aggregation, stage)

        asked: Question[Taken] = Question(
            STAGE_TYPES[stage],
            number,
            {name: under.question.peers[name] for name in requests},
            read,
            limit_s=self._secure.deadline_s,
            attempt=under.attempt,
        )
        contents: dict[tuple[int, Part], RecordDict] = {}
        for name, request in requests.items():
            key = id(request), under.question.parts[name]
            if key not in contents:  # many sites share one request
                contents[key] = pack_request(self._assigner.assignment(number, key[1]), request)
        exchange.ask(
            asked, {n: contents[id(r), under.question.parts[n]] for n, r in requests.items()}
        )
        exchange.until(
            lambda: all(map(asked.heard, asked.peers)),
            started + self._secure.deadline_s,
            answers(asked, started, THEN),
        )
        for name in asked.peers:
            exchange.miss(asked, name)
        exchange.close(asked)
        for name, failure in asked.failed.items():
            under.lost.setdefault(name, (stage, failure))
        under.bytes_up += asked.bytes_up
        under.bytes_down += asked.bytes_down
        aggregation.close()
        under.seconds[stage] = exchange.clock() - started

    def _tell(self, under: _Under) -> None:
        """Say how an attempt went."""
        aggregation, dropped = under.aggregation, dict[str, list[str]]()
        for name, stage in sorted(aggregation.dropped.items()):
            dropped.setdefault(stage, []).append(name)
        self._exchange.event(
            "secure_sum",
            round=under.question.round,
            attempt=under.attempt,
            opened=aggregation.stage == "done",
            reason=aggregation.reason,
            members=list(aggregation.terms.members),
            survivors=sorted(name for one in aggregation.sums for name in one.members),
            groups=[list(one.members) for one in aggregation.sums],
            dropped=dropped,
            accused={name: sorted(by) for name, by in sorted(aggregation.accused.items())},
            bytes_up=under.bytes_up,
            bytes_down=under.bytes_down,
            seconds=sum(under.seconds.values()),
            stage_seconds=under.seconds,
        )

    def _settle(
        self, attempts: Sequence[_Under], survivors: Sequence[str], spoilt: Mapping[str, str]
    ) -> None:
        """Count bytes, and move who is in no sum that counts to those that failed."""
        question = attempts[0].question
        question.bytes_up += sum(under.bytes_up for under in attempts)
        question.bytes_down += sum(under.bytes_down for under in attempts)
        last = {name: failure for under in attempts for name, (_, failure) in under.lost.items()}
        for name in sorted(question.reports.keys() - set(survivors)):
            text = spoilt.get(name, "the sum of its group was not opened")
            question.failed[name] = last.get(name, Failure("secure", text))
            trained = question.reports.pop(name)
            row = self._exchange.sites[name]  # what it has spent counts, its round does not
            spent = msgspec.structs.replace(row.after(trained), rounds=row.rounds)
            self._exchange.sites[name] = spent

    def _means(
        self, under: _Under, spec: AdapterSpec
    ) -> tuple[dict[tuple[str, ...], Delta], dict[str, str]]:
        """Return the mean of each group by its members, and why a member's group has none.

        One member can make its group's sum one that no updates add up to; the others count.
        """
        federation, terms = self._exchange.config.federation, under.aggregation.terms
        part = part_of(under.question)
        means: dict[tuple[str, ...], Delta] = {}
        spoilt: dict[str, str] = {}
        for one in under.aggregation.sums:
            try:
                means[one.members] = contribution.mean_of(
                    one.total,
                    terms,
                    spec,
                    part,
                    normalize_steps=federation.normalize_steps,
                    by_rank=federation.mixed_ranks,
                )
            except ProtocolError as error:
                spoilt |= dict.fromkeys(one.members, str(error))
        return means, spoilt

    def _why(self, attempts: Sequence[_Under]) -> str:
        """Return what to say of a round whose sum was not opened."""
        lost = [
            f"{name}: lost at {stage!r}: {failure.reason}: {failure.message}"
            for under in attempts
            for name, (stage, failure) in under.lost.items()
        ]
        times = f" in {len(attempts)} attempts" if len(attempts) > 1 else ""
        reasons = dict.fromkeys(under.aggregation.reason for under in attempts)
        return (
            f"round {attempts[0].question.round}: the secure sum of "
            f"{len(attempts[0].aggregation.terms.members)} sites was not opened{times}: "
            f"{'; '.join(reasons)}. Nothing was merged" + lines(list(dict.fromkeys(lost)))
        )


def left(attempts: Sequence[_Under]) -> list[str]:
    """Return who trained, has not refused for a reason that stays, and was not lost twice."""
    times = Counter(name for under in attempts for name in under.lost)
    stays = {
        name
        for under in attempts
        for name, (_, failure) in under.lost.items()
        if failure.reason in LASTING
    }
    return [n for n in sorted(attempts[0].question.reports) if n not in stays and times[n] < 2]


def taken(
    answer: RecordDict | Failure, peer: Peer, aggregation: Aggregation, stage: Stage
) -> tuple[Taken, None] | Failure:
    """Take an answer into the sum, or return why it is not in it. Nothing of it is kept here."""
    if isinstance(answer, Failure):
        return answer
    try:
        got = unpack_reply(answer, stage)
        if isinstance(got, Refused):
            return replace(refusal(got), accused=aggregation.accuse(peer.name, got.accused))
        aggregation.take(peer.name, got.reply, got.data)
    except ProtocolError as error:
        return Failure("rejected", str(error))
    return Taken(site=peer.name), None
