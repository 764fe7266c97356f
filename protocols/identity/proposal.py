"""What a site's owner agrees to: exactly this run, by these people, with this code.

    proposal   the values below as canonical JSON (keys in order, no spaces)
    digest     SHA-256 of it: what is approved or rejected, and what the audit logs name
    signature  Ed25519 (RFC 8032) of DOMAIN ‖ proposal, by the run's author

A value that a proposal does not have (`roster` None) is not in its JSON: the digest of a proposal
from before there were rosters is the one it always was.

A signed proposal comes with every message of a run. A site checks that it fits the message: its
configuration has the proposal's digest, its run the proposal's name.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import MalformedMessage, ProtocolError
from anabranch.protocols.tables import Name

DOMAIN = b"anabranch run proposal 1\0"
MAX_PROPOSAL = 4096  # bytes of JSON

Hex = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Signature = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{128}\Z")]
# No control characters: what a peer says is shown in terminals.
Short = Annotated[
    str, msgspec.Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f]*\Z")
]


class Proposal(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """One run, in digests. Two proposals are the same if they are equal in every value."""

    federation: Name
    run: Short  # identity of the run
    author: Name  # who answers for it; `Signed.key` is theirs
    version: Short  # of the software that the sites are to run
    code: Hex  # SHA-256 of that software (client/policy/code.py)
    config: Hex  # RunConfig.digest()
    base: Short  # the base model: its name, or its digest where it has one
    contract: Hex  # `contract_digest(config)`
    roster: Hex | None = None  # secagg Roster.digest: among whom updates are summed

    @property
    def encoded(self) -> bytes:
        """Return the canonical JSON: what is signed."""
        return msgspec.json.encode(self, order="sorted")

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the canonical JSON, hex."""
        return hashlib.sha256(self.encoded).hexdigest()


class Signed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A proposal with its author's signature."""

    proposal: Proposal
    key: Hex  # the author's Ed25519 public key
    signature: Signature

    def verified(self) -> Proposal:
        """Return the proposal; raise ProtocolError if its author did not sign it."""
        try:
            public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.key))
            public.verify(bytes.fromhex(self.signature), DOMAIN + self.proposal.encoded)
        except (InvalidSignature, ValueError):
            raise ProtocolError(
                f"run {self.proposal.run}: the proposal is not signed by {self.proposal.author}"
            ) from None
        return self.proposal


def sign(proposal: Proposal, key: Ed25519PrivateKey) -> Signed:
    """Return the proposal signed by its author."""
    if len(proposal.encoded) > MAX_PROPOSAL:
        raise MalformedMessage(f"proposal: more than {MAX_PROPOSAL} bytes")
    return Signed(
        proposal=proposal,
        key=key.public_key().public_bytes_raw().hex(),
        signature=key.sign(DOMAIN + proposal.encoded).hex(),
    )


def contract_digest(config: RunConfig) -> str:
    """Return the SHA-256 of what a run asks of records: its [task] and [data], hex."""
    text = msgspec.json.encode({"task": config.task, "data": config.data}, order="sorted")
    return hashlib.sha256(text).hexdigest()


def require_fits(proposal: Proposal, run: str, config: RunConfig) -> None:
    """Raise ProtocolError unless a message of `run` with `config` is what was proposed.

    A run with [secure_aggregation] must have been proposed with its roster.
    """
    for what, proposed, got in (
        ("run", proposal.run, run),
        ("configuration", proposal.config, config.digest()),
        ("data contract", proposal.contract, contract_digest(config)),
        ("base model", proposal.base, config.model.base),
    ):
        if proposed != got:
            raise ProtocolError(
                f"run {proposal.run}: the message has {what} {got[:64]!r}, the signed proposal "
                f"{proposed[:64]!r}; nothing was done"
            )
    if config.secure_aggregation is not None and proposal.roster is None:
        raise ProtocolError(
            f"run {proposal.run}: it has [secure_aggregation], and its proposal has no roster: "
            "nobody has signed among whom updates are summed. Propose the run again"
        )
