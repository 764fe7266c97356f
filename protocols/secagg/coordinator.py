"""The coordinator of a secure sum: who is asked what, who has answered, and the sum at the end.

    stage      asked                     a member is lost if            the sum is lost if
    advertise  all in the terms          it does not answer             fewer than `minimum` answer
    share      those who advertised      same                           fewer than needed (plan.py)
    mask       those who shared          same; its masks are restored   same
    agree      those in the sum          it cannot reveal; stays in     same
    reveal     those who agreed          same                           too few shares of a secret

Every answer is checked on arrival; one that is refused (ProtocolError) changes nothing. `close`
ends a stage with those who have answered. Masked vectors are added as they come, and not kept.
With groups each has a sum of its own, and one that is lost leaves the others as they are. After
`share` and `mask` a sum is lost, too, if `few` says why those who are left would refuse it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from anabranch.protocols.errors import ConfigError, ProtocolError
from anabranch.protocols.secagg import keys
from anabranch.protocols.secagg.masks import Expander
from anabranch.protocols.secagg.messages import (
    REPLIES,
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
from anabranch.protocols.secagg.recovery import recover
from anabranch.protocols.secagg.terms import (
    Advert,
    Roster,
    Terms,
    require_agreed,
    require_signed,
    survivor_bytes,
)
from anabranch.protocols.spec import shown


@dataclass(frozen=True, eq=False)
class GroupSum:
    """The sum of some members' vectors, and nothing else of them."""

    members: tuple[str, ...]  # whose vectors are in it, ascending
    total: NDArray[Any]  # (length,) of the ring's dtype


@dataclass(eq=False)
class _Collected:
    """What is known of one group."""

    group: Group
    total: NDArray[Any]
    shared: tuple[str, ...] = ()  # who shared, ascending
    survivors: tuple[str, ...] = ()  # whose masked vectors are in `total`
    lost: str = ""  # why there will be no sum


@dataclass(eq=False)
class Aggregation:
    """One secure sum. See the module's docstring."""

    terms: Terms
    roster: Roster
    few: Callable[[tuple[str, ...], Group], str] = lambda names, group: ""  # why no sum is theirs
    stage: Stage | str = field(default="advertise", init=False)  # or "done", "aborted"
    reason: str = field(default="", init=False)  # why it was aborted
    dropped: dict[str, Stage] = field(default_factory=dict, init=False)  # who was lost, and where
    accused: dict[str, set[str]] = field(default_factory=dict, init=False)  # of bad boxes, by whom
    sums: tuple[GroupSum, ...] = field(default=(), init=False)
    _digest: str = field(default="", init=False)
    _identities: dict[str, str] = field(default_factory=dict, init=False)
    _asked: tuple[str, ...] = field(default=(), init=False)
    _plan: Plan | None = field(default=None, init=False)
    _parts: list[_Collected] = field(default_factory=list, init=False)
    _adverts: dict[str, Advert] = field(default_factory=dict, init=False)
    _shares: dict[str, Shares] = field(default_factory=dict, init=False)
    _masked: set[str] = field(default_factory=set, init=False)
    _signed: dict[str, str] = field(default_factory=dict, init=False)
    _revealed: dict[str, Reveal] = field(default_factory=dict, init=False)
    _wrong: Counter[str] = field(default_factory=Counter, init=False)  # whose shares did not fit

    def __post_init__(self) -> None:
        if self.terms.roster != self.roster.digest:
            raise ProtocolError("the terms name another roster")
        self._digest, self._identities = self.terms.digest, self.roster.keys
        self._asked = self.terms.members

    def requests(self) -> dict[str, Request]:
        """Return what every member is asked in this stage; {} when it is over."""
        match self.stage:
            case "advertise":
                return dict.fromkeys(self._asked, Invite(terms=self.terms, roster=self.roster))
            case "share":
                adverts = tuple(self._planned.adverts.values())
                one = Adverts(instance=self.terms.instance, adverts=adverts)
                return dict.fromkeys(self._asked, one)
            case "mask":
                return {name: self._delivery(name) for name in self._asked}
            case "agree":
                instance = self.terms.instance
                sets = {
                    id(part): Survivors(instance=instance, names=part.survivors)
                    for part in self._parts
                }
                return {name: sets[id(self._part(name))] for name in self._asked}
            case "reveal":
                agreements = {id(part): self._agreement(part) for part in self._parts}
                return {name: agreements[id(self._part(name))] for name in self._asked}
        return {}

    def waiting(self) -> set[str]:
        """Return who was asked in this stage and has not answered."""
        return set(self._asked) - self._answered().keys() if self.stage in STAGES else set()

    def take(self, name: str, reply: Reply, data: bytes = b"") -> None:
        """Take a member's answer to the present stage.

        Raises ProtocolError, and then nothing has changed, for an answer that is out of turn,
        comes a second time, or breaks a rule of its stage.
        """
        if self.stage not in STAGES or type(reply) is not REPLIES[self.stage]:
            raise ProtocolError(
                f"{type(reply).__name__} of {shown(name)}: the sum is at stage {self.stage!r}"
            )
        if name not in self._asked:
            raise ProtocolError(f"{shown(name)} was not asked at stage {self.stage!r}")
        if name in self._answered():
            raise ProtocolError(f"{shown(name)} has answered stage {self.stage!r} already")
        if not isinstance(reply, Advert) and reply.instance != self.terms.instance:
            raise ProtocolError(f"the answer of {shown(name)} is of another sum")
        if data and not isinstance(reply, Masked):
            raise ProtocolError(f"{type(reply).__name__} of {shown(name)}: it comes without data")
        match reply:
            case Advert():
                self._take_advert(name, reply)
            case Shares():
                self._take_shares(name, reply)
            case Masked():
                part = self._part(name)
                part.total += self._planned.ring.unpack(data, length(self.terms))
                self._masked.add(name)
            case Agreed():
                signed = survivor_bytes(self._planned.context, self._part(name).survivors)
                require_agreed(name, reply.signature, signed, self._identities)
                self._signed[name] = reply.signature
            case Reveal():
                self._take_reveal(name, reply)

    def accuse(self, name: str, senders: Sequence[str]) -> tuple[str, ...]:
        """Note whose boxes a member says it cannot open; return who of them sent it a box.

        It is told and nothing follows from it: who accuses may lie.
        """
        if not senders or self.stage != "mask" or name not in self.waiting():
            return ()
        bad = tuple(sorted(self._delivery(name).sealed.keys() & set(senders)))
        for sender in bad:
            self.accused.setdefault(sender, set()).add(name)
        return bad

    def close(self) -> None:
        """End the present stage with those who have answered."""
        if self.stage not in STAGES:
            raise ProtocolError(f"the sum is over: {self.stage}")
        answered = self._answered()
        stage: Stage = self.stage
        for name in self._asked:
            if name not in answered:
                self.dropped.setdefault(name, stage)
        CLOSE[stage](self, tuple(name for name in self._asked if name in answered))

    # How a stage ends

    def _close_advertise(self, here: tuple[str, ...]) -> None:
        minimum = self.terms.minimum
        if len(here) < minimum:
            return self._abort(f"{len(here)} members advertised keys, {minimum} are needed")
        try:
            self._plan = Plan(self.terms, [self._adverts[name] for name in here])
        except ConfigError as error:  # too few came for what the terms promise
            return self._abort(str(error))
        ring, count = self._plan.ring, length(self.terms)
        self._parts = [_Collected(group, ring.zeros(count)) for group in self._plan.groups]
        return self._go("share", here)

    def _close_share(self, here: tuple[str, ...]) -> None:
        for part in self._parts:
            part.shared = tuple(name for name in here if name in part.group.peers)
            self._require(part, len(part.shared), "shared their secrets")
            part.lost = part.lost or self.few(part.shared, part.group)
        self._go("mask", here)

    def _close_mask(self, here: tuple[str, ...]) -> None:
        for part in self._parts:
            part.survivors = tuple(name for name in here if name in part.group.peers)
            self._require(part, len(part.survivors), "sent masked updates")
            part.lost = part.lost or self.few(part.survivors, part.group)
        self._go("agree", here)

    def _close_agree(self, here: tuple[str, ...]) -> None:
        for part in self._parts:
            agreed = sum(name in part.group.peers for name in here)
            self._require(part, agreed, "signed who is in the sum")
        self._go("reveal", here)

    def _close_reveal(self, here: tuple[str, ...]) -> None:
        self._abort("taking the masks off was cut short")  # half of them off is no sum
        sums = []
        for part in self._parts:
            if part.lost:
                continue
            try:
                self._unmask(part)
            except ProtocolError as error:
                part.lost = str(error)
                continue
            sums.append(GroupSum(part.survivors, part.total))
        self.sums = tuple(sums)
        if sums:
            self.stage, self.reason = "done", ""
        else:
            self._abort(self._parts[0].lost)

    def _go(self, stage: Stage, names: tuple[str, ...]) -> None:
        """Begin a stage with these members, those of lost groups left out."""
        kept = {name for part in self._parts if not part.lost for name in part.group.names}
        if not kept:
            return self._abort("; ".join(sorted({part.lost for part in self._parts})))
        self.stage, self._asked = stage, tuple(name for name in names if name in kept)
        return None

    def _require(self, part: _Collected, count: int, what: str) -> None:
        if not part.lost and count < part.group.needed:
            part.lost = (
                f"{count} of {len(part.group.names)} members {what}, {part.group.needed} are needed"
            )

    def _abort(self, reason: str) -> None:
        self.stage, self.reason, self._asked = "aborted", reason, ()

    # What is checked of an answer

    def _take_advert(self, name: str, advert: Advert) -> None:
        if advert.name != name:
            raise ProtocolError(f"{shown(name)} sent the advert of {shown(advert.name)}")
        require_signed(advert, self._digest, self._identities)
        known = {key for one in self._adverts.values() for key in (one.sealing, one.masking)}
        if {advert.sealing, advert.masking} & known or advert.sealing == advert.masking:
            raise ProtocolError(f"advert of {shown(name)}: a key that is in use already")
        for public in (advert.sealing, advert.masking):
            keys.require_point(bytes.fromhex(public), name)
        self._adverts[name] = advert

    def _take_shares(self, name: str, shares: Shares) -> None:
        peers = self._part(name).group.peers[name]
        if shares.sealed.keys() != set(peers):
            raise ProtocolError(
                f"shares of {shown(name)}: expected boxes for its {len(peers)} neighbours, got "
                f"{len(shares.sealed)} boxes"
            )
        self._shares[name] = shares

    def _take_reveal(self, name: str, reveal: Reveal) -> None:
        part = self._part(name)
        around = {name, *part.group.peers[name]} & set(part.shared)
        seeds = around & set(part.survivors)
        if reveal.seeds.keys() != seeds or reveal.keys.keys() != around - seeds:
            raise ProtocolError(
                f"reveal of {shown(name)}: expected shares of {len(seeds)} seeds and "
                f"{len(around - seeds)} keys of its neighbours, got others"
            )
        self._revealed[name] = reveal

    # What is asked

    def _delivery(self, name: str) -> Delivery:
        part = self._part(name)
        around = set(part.group.peers[name]) & set(part.shared)
        return Delivery(
            instance=self.terms.instance,
            sealed={peer: self._shares[peer].sealed[name] for peer in sorted(around)},
        )

    def _agreement(self, part: _Collected) -> Agreement:
        signatures = {name: self._signed[name] for name in part.survivors if name in self._signed}
        return Agreement(instance=self.terms.instance, signatures=signatures)

    # Taking the masks off

    def _unmask(self, part: _Collected) -> None:
        """Take the survivors' own masks, and what the lost left behind, off the total."""
        plan, group = self._planned, part.group
        expander = Expander(self.terms.keystream, plan.ring, len(part.total))
        survivors = set(part.survivors)
        for name in part.survivors:
            seed = self._combined(
                group, name, "seeds", keys.commitment, self._shares[name].commitment
            )
            expander.subtract(keys.self_key(seed, plan.context, name), part.total)
        for name in part.shared:
            if name in survivors:
                continue
            around = [peer for peer in group.peers[name] if peer in survivors]
            if not around:
                continue
            secret = self._combined(group, name, "keys", _public_hex, plan.adverts[name].masking)
            private = keys.loaded(secret)
            for peer in around:
                key = keys.mask_key(
                    private,
                    bytes.fromhex(plan.adverts[peer].masking),
                    plan.context,
                    name,
                    peer,
                )
                # The peer added its mask if its name is lower; take that off.
                (expander.subtract if peer < name else expander.add)(key, part.total)

    def _combined(
        self, group: Group, name: str, kind: str, image: Callable[[bytes], str], expected: str
    ) -> bytes:
        """Return the member's secret whose `image` is the expected one, from revealed shares.

        Shares of those who revealed wrong ones before are tried last, the oftener the later.
        """
        shares: dict[int, bytes] = {}
        holders = group.holders(name)
        for index, holder in enumerate(holders):
            revealed: Mapping[str, bytes] = (
                getattr(self._revealed[holder], kind) if holder in self._revealed else {}
            )
            if name in revealed:
                shares[index] = revealed[name]
        threshold = group.shape.threshold
        if len(shares) < threshold:
            raise ProtocolError(
                f"{len(shares)} shares of {name}'s secret were revealed, {threshold} are needed"
            )
        order = sorted(shares, key=lambda index: (self._wrong[holders[index]], index))
        found = recover(shares, order, threshold, lambda secret: image(secret) == expected)
        if found is None:
            raise ProtocolError(f"the shares of {name}'s secret do not fit together")
        secret, wrong = found
        self._wrong.update(holders[index] for index in wrong)
        return secret

    def _answered(self) -> Mapping[str, object]:
        """Return who has answered the present stage."""
        answered: dict[str, Mapping[str, object]] = {
            "advertise": self._adverts,
            "share": self._shares,
            "mask": dict.fromkeys(self._masked),
            "agree": self._signed,
            "reveal": self._revealed,
        }
        return answered[self.stage]

    def _part(self, name: str) -> _Collected:
        return next(part for part in self._parts if name in part.group.peers)

    @property
    def _planned(self) -> Plan:
        if self._plan is None:
            raise ProtocolError("nobody has advertised yet")
        return self._plan


def _public_hex(private: bytes) -> str:
    return keys.public_of(private).hex()


CLOSE: dict[Stage, Callable[[Aggregation, tuple[str, ...]], None]] = {
    "advertise": Aggregation._close_advertise,
    "share": Aggregation._close_share,
    "mask": Aggregation._close_mask,
    "agree": Aggregation._close_agree,
    "reveal": Aggregation._close_reveal,
}
