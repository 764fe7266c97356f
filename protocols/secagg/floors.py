"""What a member asks of the terms that it is invited to, whatever the coordinator says."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.protocols.errors import PolicyError, ProtocolError
from anabranch.protocols.secagg.messages import Invite
from anabranch.protocols.spec import shown


@dataclass(frozen=True, kw_only=True)
class Limits:
    """A member's own floors, whatever the coordinator asks for."""

    minimum: int = 2  # updates in a sum
    threshold: float = 0.5  # share of a complete graph's members that must stay
    colluding: float = 0.0  # share of the members that the terms must hold against


NO_LIMITS = Limits()


def require_invited(name: str, key: Ed25519PrivateKey, invite: Invite) -> None:
    """Raise ProtocolError unless the roster has `name` with this key, and the terms have it."""
    terms, roster = invite.terms, invite.roster
    if terms.roster != roster.digest:
        raise ProtocolError(
            f"the terms name roster {terms.roster[:12]}…, and {roster.digest[:12]}… came with them"
        )
    identities = roster.keys
    if identities.get(name) != key.public_key().public_bytes_raw().hex():
        raise ProtocolError(f"the roster does not have {name} with its own key")
    if name not in terms.members:
        raise ProtocolError(f"{name} is not in the terms it was invited to")
    strangers = [member for member in terms.members if member not in identities]
    if strangers:
        raise ProtocolError(f"terms: {shown(strangers[0])} is not on the roster")


def require_floors(limits: Limits, invite: Invite) -> None:
    """Raise PolicyError for terms below a member's floors, ProtocolError for unsafe ones."""
    terms = invite.terms
    if terms.minimum < limits.minimum or len(terms.members) < limits.minimum:
        raise PolicyError(
            f"sums of {min(terms.minimum, len(terms.members))} updates may be opened, and this "
            f"member takes part in sums of {limits.minimum} or more"
        )
    if terms.threshold < limits.threshold:
        raise PolicyError(
            f"a share of {terms.threshold:g} of the members could open a sum, and this member "
            f"asks for {limits.threshold:g}"
        )
    if terms.colluding < limits.colluding:
        raise PolicyError(
            f"a sum that holds against {terms.colluding:g} of the members colluding, and this "
            f"member asks for {limits.colluding:g}"
        )
    if terms.threshold < 0.5:
        raise ProtocolError(
            f"terms: a threshold of {terms.threshold:g}: two halves of the members could open two "
            "sums; 0.5 or more is needed"
        )
