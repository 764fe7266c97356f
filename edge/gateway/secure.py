"""What a secure round is, written down when it is opened: later changes of files change nothing.

opened                 collect until               row.deadline
├── devices train ─────┼── five stages of stage_s ─┤
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Literal

import msgspec

from anabranch.edge.gateway.authority import open_authority
from anabranch.edge.gateway.config import MESSAGE, GatewayFile, GatewayFolder, SecureSums
from anabranch.edge.gateway.roster import read_signed, roster_of
from anabranch.edge.gateway.store import Row, Store
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.identity import authority as identity
from anabranch.protocols.messages import Assignment
from anabranch.protocols.secagg.contribution import WEIGHT_UNIT, sizes
from anabranch.protocols.secagg.fixed_point import ring_for
from anabranch.protocols.secagg.masks import fastest
from anabranch.protocols.secagg.messages import STAGES
from anabranch.protocols.secagg.terms import Roster, Terms

if TYPE_CHECKING:
    from anabranch.edge.gateway.tasks import Asked

LEAST_SHARE = 0.5  # of the time of a round that is left for training
NAME = 32  # bytes of one device's name in a message


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`plan` in the table of sums."""

    table: SecureSums
    minimum: int  # updates in a sum: that of the table, or min_cohort
    weighting: Literal["examples", "uniform"]
    roster: Roster | None  # the signed one
    signature: str

    @property
    def sum_s(self) -> float:
        """Return how long a sum may take."""
        return len(STAGES) * self.table.stage_s


def plan_of(
    file: GatewayFile, folder: GatewayFolder, assignment: Assignment, collecting_s: float
) -> Plan | None:
    """Return how the round is summed; None: in the clear.

    Raises ConfigError for a part or a deadline that no secure sum fits, and for a roster.json
    that devices would refuse, or that no message holds.
    """
    table = file.secure_aggregation
    if table is None:
        return None
    if assignment.part.ranks is not None:
        raise ConfigError(
            f"gateway {file.name}: [secure_aggregation] does not go with single ranks; nothing is "
            "trained"
        )
    needed = len(STAGES) * table.stage_s
    if needed > LEAST_SHARE * collecting_s:
        raise ConfigError(
            f"gateway {file.name}: five stages of secure_aggregation.stage_s = {table.stage_s:g} "
            f"leave too little of the {collecting_s:g} s that a round collects; lower it, or raise "
            "federation.deadline_s"
        )
    authority = identity.fingerprint(open_authority(folder.authority).certificate)
    keys = [bytes.fromhex(key) for key in file.bundle_keys]
    signed = read_signed(folder.roster, authority, keys)
    if signed is not None:
        _require_sendable(file, folder, signed.roster)
    return Plan(
        table=table,
        minimum=max(table.minimum, file.min_cohort),
        weighting=assignment.config.federation.weighting,
        roster=None if signed is None else signed.roster,
        signature="" if signed is None else signed.signature,
    )


def read_plan(store: Store, row: Row) -> Plan | None:
    """Return the plan of a round; None: its deltas are added in the clear."""
    found = store.row("SELECT plan FROM sums WHERE round = ?", row["id"])
    return None if found is None else _plan(bytes(found["plan"]))


def may_join(plan: Plan, device: str, key: bytes | None) -> bool:
    """Return whether a device can be in a sum: a key, and on the roster if that is signed."""
    return key is not None and (plan.roster is None or plan.roster.keys.get(device) == key.hex())


def terms_of(
    plan: Plan, row: Row, asked: Asked, config: str, peers: dict[str, bytes], instance: str,
    heaviest: int,
) -> tuple[Terms, Roster]:  # fmt: skip
    """Return the terms of a sum among these devices, and the roster that comes with them.

    `heaviest` is the most records that one of them has said it has. Raises ConfigError if the
    ring does not hold so many.
    """
    table, names = plan.table, tuple(sorted(peers))
    values, counters = sizes(asked.spec, asked.assignment.part, by_rank=False)
    roster = plan.roster or roster_of(peers)
    terms = Terms(
        run=row["run"],
        round=row["number"],
        instance=instance,
        config=config,
        model=row["adapter"],
        roster=roster.digest,
        members=names,
        minimum=plan.minimum,
        threshold=table.threshold,
        colluding=table.colluding,
        ring=ring_for(len(names), table.value_bits, table.ring).bits,
        limit=table.range,
        weight=WEIGHT_UNIT * (heaviest if plan.weighting == "examples" else 1),
        values=values,
        counters=counters,
        keystream=fastest() if table.keystream == "fastest" else table.keystream,
    )
    return terms, roster


def digest_of(plan: Plan) -> bytes:
    """Return the digest of the signed roster; empty if there is none."""
    return b"" if plan.roster is None else bytes.fromhex(plan.roster.digest)


def _require_sendable(file: GatewayFile, folder: GatewayFolder, roster: Roster) -> None:
    """Raise ConfigError for a roster that fits no message, beside the terms."""
    members = math.ceil(file.cohort * file.over_selection)
    needed = len(msgspec.json.encode(roster)) + NAME * members + MESSAGE
    if needed > file.limits.message_bytes:
        raise ConfigError(
            f"{folder.roster}: {len(roster.peers)} devices are told in one message of {needed} "
            f"bytes, and limits.message_bytes = {file.limits.message_bytes}: raise it in "
            "gateway.toml, or revoke devices that are gone and sign a new roster"
        )


@functools.lru_cache(maxsize=8)
def _plan(data: bytes) -> Plan:
    return msgspec.json.decode(data, type=Plan)
