"""A member of a secure sum: five requests, five answers, no clock and no channel.

    stage      request     what is checked before it is answered
    advertise  Invite      on the roster, terms above the member's own floors
    share      Adverts     every signature, enough members, its own advert among them
    mask       Delivery    every box opens (BadBoxes says whose do not), enough holders are there
    agree      Survivors   itself among them, none whose shares it does not hold, enough of them
    reveal     Agreement   so many signed the same set that no other one can be agreed on

A request is answered once; the same request again gets the same answer, byte for byte, unless the
member was paused and resumed since: then it is refused. So is everything else, with a ProtocolError
(below the member's floors: PolicyError), and nothing is changed.

Of every peer a member reveals one share of one secret, by its own reckoning: the seed of who is in
the survivor set that it signed, the masking key of who is not. There are no two lists that could
overlap. After that all secrets are dropped. (Python cannot overwrite them in memory: they are
gone with the process at the latest.)
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from anabranch.protocols.errors import BadBoxes, ConfigError, PolicyError, ProtocolError
from anabranch.protocols.secagg import keys
from anabranch.protocols.secagg.floors import NO_LIMITS, require_floors, require_invited
from anabranch.protocols.secagg.floors import Limits as Limits
from anabranch.protocols.secagg.masks import Expander
from anabranch.protocols.secagg.messages import (
    REQUESTS,
    STAGES,
    Adverts,
    Agreed,
    Agreement,
    Delivery,
    Invite,
    Masked,
    Reply,
    Request,
    Reveal,
    Shares,
    Stage,
    Survivors,
)
from anabranch.protocols.secagg.plan import Group, Plan, length
from anabranch.protocols.secagg.shamir import split
from anabranch.protocols.secagg.terms import (
    Advert,
    advertise,
    require_agreed,
    require_signed,
    survivor_bytes,
)
from anabranch.protocols.spec import shown

Random = Callable[[int], bytes]
Contribute = Callable[[], NDArray[Any]]

# stage -> (what is answered there, the stage after it)
AFTER: dict[Stage, Stage | None] = dict(zip(STAGES, (*STAGES[1:], None), strict=True))


@dataclass(frozen=True)
class Answer:
    """What goes back; `data` is the masked vector, of the stage "mask" alone."""

    reply: Reply
    data: bytes = field(default=b"", repr=False)


@dataclass
class _Secrets:
    """What nobody else may know; never printed."""

    sealing: bytes = field(repr=False)
    masking: bytes = field(repr=False)
    seed: bytes = field(default=b"", repr=False)
    held: dict[str, tuple[bytes, bytes]] = field(default_factory=dict, repr=False)


class Paused(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A member between two stages, its secrets included: what another process goes on with."""

    name: str
    limits: Limits
    invite: Invite
    sealing: bytes
    masking: bytes
    seed: bytes
    held: dict[str, tuple[bytes, bytes]]
    adverts: tuple[Advert, ...]
    survivors: tuple[str, ...]
    next: Stage

    def __repr__(self) -> str:
        return f"Paused({self.name!r}, next={self.next!r})"


class Member:
    """One member of one sum. Raises as the module's docstring says."""

    def __init__(
        self,
        name: str,
        key: Ed25519PrivateKey,
        invite: Invite,
        *,
        limits: Limits = NO_LIMITS,
        random: Random = secrets.token_bytes,
    ) -> None:
        terms = invite.terms
        require_invited(name, key, invite)
        require_floors(limits, invite)
        self.name, self.terms = name, terms
        self._invite, self._key, self._limits, self._random = invite, key, limits, random
        self._identities = invite.roster.keys
        self._secrets: _Secrets | None = _Secrets(random(keys.KEY_BYTES), random(keys.KEY_BYTES))
        sealing, masking = map(keys.public_of, (self._secrets.sealing, self._secrets.masking))
        self._digest = terms.digest
        self.advert = advertise(name, sealing, masking, self._digest, key)
        self._plan: Plan | None = None
        self._survivors: tuple[str, ...] = ()
        self._next: Stage | None = "share"
        self._last: tuple[Request, Answer] | None = (invite, Answer(self.advert))

    @classmethod
    def resumed(cls, key: Ed25519PrivateKey, paused: Paused) -> Self:
        """Return the member that was paused. Raises as the module's docstring says."""
        tape = iter((paused.sealing, paused.masking))
        member = cls(
            paused.name, key, paused.invite, limits=paused.limits, random=lambda _: next(tape)
        )
        member._random, member._next = secrets.token_bytes, paused.next
        member._own.seed, member._own.held = paused.seed, dict(paused.held)
        if paused.next != "share":
            member._plan = Plan(member.terms, paused.adverts)
            member._last = None
        member._survivors = paused.survivors
        return member

    def paused(self) -> Paused | None:
        """Return what `resumed` goes on with; None: the sum is done. It holds the secrets.

        Asked a second time for what it answered before that, the resumed member refuses.
        """
        if self._next is None:
            return None
        own, plan = self._own, self._plan
        return Paused(
            name=self.name,
            limits=self._limits,
            invite=self._invite,
            sealing=own.sealing,
            masking=own.masking,
            seed=own.seed,
            held=own.held,
            adverts=() if plan is None else tuple(plan.adverts.values()),
            survivors=self._survivors,
            next=self._next,
        )

    @property
    def stage(self) -> Stage | str:
        """Return the stage whose request is answered next, or "done"."""
        return self._next or "done"

    def hold_to(self, limits: Limits) -> None:
        """Keep to these floors from now on. Raises PolicyError if the terms are below them."""
        require_floors(limits, self._invite)
        self._limits = limits

    @property
    def group(self) -> Group:
        """Return who is in one sum with it; ProtocolError before it was shown all adverts."""
        return self._planned.group_of(self.name)

    def answer(self, request: Request, contribute: Contribute | None = None) -> Answer:
        """Return the answer to a request; `contribute` gives the ring vector for the mask stage.

        Raises ProtocolError or PolicyError, and then nothing has changed; and whatever
        `contribute` raises.
        """
        if self._last is not None:
            asked, answered = self._last
            if type(request) is type(asked) and request == asked:
                return answered
        if self._next is None or type(request) is not REQUESTS[self._next]:
            raise ProtocolError(
                f"secure sum of round {self.terms.round}: {type(request).__name__} out of turn: "
                f"this member is at stage {self.stage!r}, and answers one request per stage"
            )
        match request:
            case Invite():  # pragma: no cover - never a next stage
                raise ProtocolError("a member is invited once")
            case Adverts():
                answer = self._share(request)
            case Delivery():
                answer = self._mask(request, contribute)
            case Survivors():
                answer = self._agree(request)
            case Agreement():
                answer = self._reveal(request)
        self._last = request, answer
        self._next = AFTER[self._next]
        if self._next is None:
            self._secrets = None
        return answer

    def _share(self, request: Adverts) -> Answer:
        self._require_instance(request.instance)
        terms, own = self.terms, self._own
        adverts = {advert.name: advert for advert in request.adverts}
        if adverts.get(self.name) != self.advert:
            raise ProtocolError(f"adverts: that of {self.name} is not the one it sent")
        strangers = sorted(set(adverts) - set(terms.members))
        if strangers:
            raise ProtocolError(f"adverts: {shown(strangers[0])} is not in the terms")
        public = {key for advert in request.adverts for key in (advert.sealing, advert.masking)}
        if len(public) != 2 * len(adverts):
            raise ProtocolError("adverts: two members have one key")
        for advert in request.adverts:
            require_signed(advert, self._digest, self._identities)
        try:
            plan = Plan(terms, request.adverts)
        except ConfigError as error:
            raise ProtocolError(f"adverts: {error}") from None
        group = plan.group_of(self.name)
        self._require_enough(len(group.names), group, "advertised")
        seed = self._random(keys.KEY_BYTES)
        holders = group.holders(self.name)
        threshold = group.shape.threshold
        seeds = split(seed, len(holders), threshold, self._random)
        privates = split(own.masking, len(holders), threshold, self._random)
        sealed, mine, sealing = {}, (b"", b""), keys.loaded(own.sealing)
        for holder, pair in zip(holders, zip(seeds, privates, strict=True), strict=True):
            if holder == self.name:
                mine = pair
                continue
            public_key = bytes.fromhex(adverts[holder].sealing)
            sealed[holder] = keys.seal(
                sealing, public_key, plan.context, self.name, holder, b"".join(pair)
            )
        own.seed, own.held, self._plan = seed, {self.name: mine}, plan
        reply = Shares(instance=terms.instance, commitment=keys.commitment(seed), sealed=sealed)
        return Answer(reply)

    def _mask(self, request: Delivery, contribute: Contribute | None) -> Answer:
        self._require_instance(request.instance)
        if contribute is None:
            raise ValueError("the mask stage needs `contribute`")
        own, plan, group = self._own, self._planned, self.group
        strangers = sorted(set(request.sealed) - set(group.peers[self.name]))
        if strangers:
            raise ProtocolError(f"delivery: {shown(strangers[0])} is no neighbour of {self.name}")
        here, threshold = len(request.sealed) + 1, group.shape.threshold
        if here < threshold:
            raise ProtocolError(
                f"delivery: {here} of {group.shape.holders} members around {self.name} have "
                f"shared, and {threshold} are needed"
            )
        held = self._opened(request)
        vector = self._masked(contribute, request.sealed)
        own.held |= held
        return Answer(Masked(instance=self.terms.instance), plan.ring.pack(vector))

    def _opened(self, request: Delivery) -> dict[str, tuple[bytes, bytes]]:
        """Return what the boxes hold. Raises BadBoxes, naming all that do not open."""
        plan, held, sealing = self._planned, {}, keys.loaded(self._own.sealing)
        for sender, box in request.sealed.items():
            public = bytes.fromhex(plan.adverts[sender].sealing)
            with suppress(ProtocolError):
                held[sender] = keys.unseal(sealing, public, plan.context, sender, self.name, box)
        bad = tuple(sorted(request.sealed.keys() - held.keys()))
        if bad:
            names = f"{', '.join(bad[:3])}{f' and {len(bad) - 3} more' if len(bad) > 3 else ''}"
            raise BadBoxes(
                f"delivery: share of {names}: not sealed by it for this member and this sum, so "
                "the update is not masked",
                bad,
            )
        return held

    def _masked(self, contribute: Contribute, peers: dict[str, bytes]) -> NDArray[Any]:
        """Return x_u + PRG(b_u) + Σ ± PRG(k_uv), v the peers that have shared."""
        own, plan, count = self._own, self._planned, length(self.terms)
        masking = keys.loaded(own.masking)
        pairs = {
            peer: keys.mask_key(
                masking,
                bytes.fromhex(plan.adverts[peer].masking),
                plan.context,
                self.name,
                peer,
            )
            for peer in peers
        }
        vector = contribute()
        if vector.shape != (count,) or vector.dtype != plan.ring.dtype:
            raise ValueError(
                f"expected {count} values of {plan.ring.dtype}, got {vector.dtype} {vector.shape}"
            )
        expander = Expander(self.terms.keystream, plan.ring, count)
        expander.add(keys.self_key(own.seed, plan.context, self.name), vector)
        for peer, key in pairs.items():
            (expander.add if self.name < peer else expander.subtract)(key, vector)
        return vector

    def _agree(self, request: Survivors) -> Answer:
        self._require_instance(request.instance)
        own, group, names = self._own, self.group, set(request.names)
        if self.name not in names:
            raise ProtocolError(f"survivors: {self.name} is not among them, and its update is")
        strangers = sorted(names - set(group.names))
        if strangers:
            raise ProtocolError(f"survivors: {shown(strangers[0])} is not in this sum")
        around = names & set(group.peers[self.name])
        unheld = sorted(around - own.held.keys())
        if unheld:
            raise ProtocolError(
                f"survivors: {unheld[0]} was said to have dropped out before: {self.name} has no "
                "mask in common with it"
            )
        if len(around) + 1 < group.shape.threshold:
            raise ProtocolError(
                f"survivors: {len(around) + 1} of {group.shape.holders} members around "
                f"{self.name} are left, and {group.shape.threshold} are needed"
            )
        self._require_enough(len(names), group, "are left")
        signed = survivor_bytes(self._planned.context, request.names)
        self._survivors = request.names
        signature = self._key.sign(signed).hex()
        return Answer(Agreed(instance=self.terms.instance, signature=signature))

    def _reveal(self, request: Agreement) -> Answer:
        self._require_instance(request.instance)
        own, group, survivors = self._own, self.group, set(self._survivors)
        signed = survivor_bytes(self._planned.context, self._survivors)
        signers = survivors & request.signatures.keys()
        if len(signers) < group.needed:
            raise ProtocolError(
                f"agreement: {len(signers)} of {len(group.names)} members signed the survivor "
                f"set, and {group.needed} are needed"
            )
        for name in sorted(signers)[: group.needed]:  # more prove no more
            require_agreed(name, request.signatures[name], signed, self._identities)
        seeds = {name: pair[0] for name, pair in own.held.items() if name in survivors}
        private = {name: pair[1] for name, pair in own.held.items() if name not in survivors}
        return Answer(Reveal(instance=self.terms.instance, seeds=seeds, keys=private))

    def _require_instance(self, instance: str) -> None:
        if instance != self.terms.instance:
            raise ProtocolError(
                f"the message is of sum {instance[:12]}…, this member is in sum "
                f"{self.terms.instance[:12]}… of round {self.terms.round}"
            )

    def _require_enough(self, count: int, group: Group, what: str) -> None:
        """Refuse a sum of too few."""
        if count < self._limits.minimum:
            raise PolicyError(
                f"{count} members {what}, and this member takes part in sums of "
                f"{self._limits.minimum} or more"
            )
        if count < group.needed:
            raise ProtocolError(
                f"{count} of {len(group.names)} members {what}, and {group.needed} are needed"
            )

    @property
    def _own(self) -> _Secrets:
        if self._secrets is None:
            raise ProtocolError(f"the sum of round {self.terms.round} was opened: no secrets left")
        return self._secrets

    @property
    def _planned(self) -> Plan:
        if self._plan is None:
            raise ProtocolError("no adverts yet")
        return self._plan
