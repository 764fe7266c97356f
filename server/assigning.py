"""What every site of a round is sent: its part of the adapter to train, and a frame.

Most sites get one and the same frame, which is encoded once. Under a rule that cuts adapters
down (`Rule.truncates`), a site of a low rank gets the rank indices of its part and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from flwr.app import RecordDict

from anabranch.client.flower import pack_assignment
from anabranch.protocols import wire
from anabranch.protocols.adapter import WHOLE, Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import AnabranchError, RunError
from anabranch.protocols.identity.proposal import Signed
from anabranch.protocols.messages import Assignment, Trained
from anabranch.protocols.part import Part
from anabranch.protocols.secagg.graph import smallest_company
from anabranch.protocols.spec import AdapterSpec
from anabranch.server.aggregation.rule import Rule
from anabranch.server.flower import Peer, Question, read_kept, read_trained


@dataclass(frozen=True, kw_only=True)
class Assigner:
    """Makes the assignments of one run."""

    rule: Rule[Any]
    config: RunConfig
    run: str
    signed: Signed | None = None  # the proposal that sites approve

    def question(self, number: int, spec: AdapterSpec) -> Question[Trained]:
        """Return the question "train your part", put to nobody yet."""
        parts: dict[str, Part] = {}
        read: Callable[..., Any] = partial(
            read_trained,
            spec=spec,
            parts=parts,
            uplink=self.config.uplink,
            counts_steps=self.config.federation.normalize_steps,
        )
        if self.config.secure_aggregation is not None:
            read = partial(read_kept, private=self.config.privacy is not None)
        return Question("train", number, {}, read, parts=parts)

    def put(
        self, question: Question[Trained], adapter: Adapter, peers: Mapping[str, Peer]
    ) -> dict[str, RecordDict]:
        """Put the question to these sites, too, and return what to send them.

        Sites of one part share one message; parts that are cut the same way share one frame.
        Raises RunError, naming the site, if the rule has no part for a site's rank.
        """
        number, spec = question.round, adapter.spec
        most = self._most_ranks(spec, peers)
        parts = {name: self._part(number, spec, peer, most) for name, peer in peers.items()}
        frames = {
            cut: wire.encode_part(adapter, cut) for cut in set(map(self._cut, parts.values()))
        }
        contents = {
            part: pack_assignment(self.assignment(number, part), frames[self._cut(part)])
            for part in set(parts.values())
        }
        question.peers.update(peers)
        question.parts.update(parts)
        return {name: contents[part] for name, part in parts.items()}

    def evaluation(self, number: int, adapter: Adapter) -> RecordDict:
        """Return the message that asks for metrics of the whole adapter."""
        return pack_assignment(self.assignment(number, WHOLE), wire.encode(adapter))

    def _most_ranks(self, spec: AdapterSpec, peers: Mapping[str, Peer]) -> int:
        """Return how many ranks a site may train, so that enough others train each of them.

        In a secure sum what few sites train would be seen: `minimum` who do not collude must train
        each rank, whoever drops out (client/sums/terms.py, require_company). Without a sum, all.
        """
        secure = self.config.secure_aggregation
        limits = sorted(
            (spec.rank if peer.max_rank is None else peer.max_rank for peer in peers.values()),
            reverse=True,
        )
        if secure is None or not self.config.federation.mixed_ranks or not limits:
            return spec.rank
        summed = min(len(limits), self.config.federation.cohort or len(limits))
        if summed < secure.minimum:  # some may come back
            return limits[-1]
        lower = max(smallest_company(summed, secure).honest - secure.minimum, 0)
        return limits[len(limits) - 1 - lower]

    def _part(self, number: int, spec: AdapterSpec, peer: Peer, most: int) -> Part:
        secure = self.config.secure_aggregation is not None
        limit, kept = spec.rank if peer.max_rank is None else peer.max_rank, self.config.kept
        if limit < spec.rank and kept is not None and kept.factors != "none":
            raise RunError(
                f"round {number}: no part for site {peer.name}: it trains ranks up to {limit}, and "
                f"keeps a factor of all {spec.rank} ranks: lower lora.rank to {limit}, or take "
                'federation.method = "altqr"'
            )
        name = "" if secure else peer.name  # in a sum all train the first of one order of ranks
        try:
            return self.rule.part(spec, number, name, min(limit, most))
        except (AnabranchError, ValueError) as error:
            raise RunError(f"round {number}: no part for site {peer.name}: {error}") from None

    def _cut(self, part: Part) -> Part:
        """Return what of the adapter a site of this part is sent."""
        return Part(ranks=part.ranks) if self.rule.truncates else WHOLE

    def assignment(self, number: int, part: Part) -> Assignment:
        """Return the assignment of a part in one round."""
        return Assignment(
            run=self.run, round=number, config=self.config, part=part, signed=self.signed
        )
