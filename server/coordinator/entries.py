"""What a coordinator's state holds (state.py): invitations, sites, runs, and what is waited for.

Times are seconds since 1970, UTC.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from anabranch.protocols.identity.join import Report

SiteStatus = Literal["active", "revoked", "left"]
Desired = Literal["running", "stopped"]
RunState = Literal["queued", "starting", "running", "stopped", "failed", "finished"]


class OpenInvitation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An invitation with which `POST /site/join` may be answered now."""

    site: str
    expires: float
    used: float | None = None  # when; then it is open for the same key alone, for RETRY_S


class SiteEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One site of the roster."""

    name: str
    key: str  # authority.key_digest of its certificate, hex; Flower's node has the same key
    public_key: str  # PEM
    node: int | None = None  # Flower's; None: to be registered with the SuperLink
    status: SiteStatus = "active"
    joined: float
    expires: float  # the end of its newest certificate
    serial: str  # of that certificate, decimal
    version: str  # of anabranch at the site, as it said last
    reason: str = ""  # why it was revoked or left
    peer_key: str | None = None  # Ed25519, hex: other sites know it by this; None: not announced


class Reported(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a site said last."""

    site: str
    report: Report
    at: float  # by the coordinator's clock


class RunEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run: what was proposed, what the operator wants of it, what it does."""

    run: str
    name: str  # of the configuration
    toml: str  # run.toml as it was given
    signed: str  # JSON of proposal.Signed
    created: float
    desired: Desired = "running"
    state: RunState = "queued"
    detail: str = ""  # a sentence: why it failed, where it stopped
    flower_run: int | None = None  # Flower's id of the last attachment
    restarts: int = 0  # of its process, by the supervisor
    continues: str | None = None  # the run whose last adapter is the first of this one
    validation: str | None = None  # path of the coordinator's own records: they choose the round
    test: str | None = None  # of those that are touched once, at the end


class Wait(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run waits for: who, since when, until when, why, and what happens then."""

    why: str
    who: tuple[str, ...] = ()
    since: float
    until: float | None = None  # None: until the operator or a site acts
    then: str = ""  # what happens at `until`


class Asked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run asked of one site last."""

    kind: Literal["train", "evaluate", "describe", "advertise", "share", "mask", "agree", "reveal"]
    round: int = 0
    since: float
    until: float
    state: Literal["sent", "answered", "failed", "late"] = "sent"
    reason: str = ""
