"""Why a call is refused: one class per gRPC status, each with a sentence for the device.

Malformed   INVALID_ARGUMENT     the request breaks a rule of the protocol, named
Unknown     NOT_FOUND            no such file, task or upload of this device
Denied      PERMISSION_DENIED    token or certificate
Exhausted   RESOURCE_EXHAUSTED   a quota
Gap         OUT_OF_RANGE         an offset beyond the bytes that are there
Damaged     DATA_LOSS            checksum or digest: send again
Superseded  ABORTED              a later call took over, or the state changed meanwhile
"""

from __future__ import annotations

from anabranch.protocols.errors import ProtocolError


class Refusal(ProtocolError):
    """A call is refused. `status` is the name of a gRPC status code."""

    status = "INVALID_ARGUMENT"


class Malformed(Refusal):
    """The request breaks a rule of the protocol."""


class Unknown(Refusal):
    """There is no such thing, or it belongs to another device."""

    status = "NOT_FOUND"


class Denied(Refusal):
    """Token or certificate are not valid here."""

    status = "PERMISSION_DENIED"


class Exhausted(Refusal):
    """A quota is used up."""

    status = "RESOURCE_EXHAUSTED"


class Gap(Refusal):
    """Bytes before this offset are missing."""

    status = "OUT_OF_RANGE"


class Damaged(Refusal):
    """Bytes are not what was announced."""

    status = "DATA_LOSS"


class Superseded(Refusal):
    """A later call took over."""

    status = "ABORTED"
