"""What makes a task secure: its delta goes into a secure sum, and is not uploaded.

Both sides compute `sum_config` from the task: it stands in the terms of the sum for everything
that the devices of a round have in common. A device that was given another adapter, training or
bundle has other terms, so its masks cancel with nobody's.
"""

from __future__ import annotations

import hashlib
import math

import msgspec

from anabranch.edge.generated import edge_pb2
from anabranch.edge.runtime.device_file import SecureFloors
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.peer import authority_of
from anabranch.edge.runtime.roster import require_roster
from anabranch.edge.runtime.trust import read_trusted
from anabranch.protocols.errors import PolicyError, ProtocolError
from anabranch.protocols.part import Part
from anabranch.protocols.spec import shown
from anabranch.protocols.tables import Uplink

WEIGHTINGS = ("examples", "uniform")
DIGEST_BYTES = 32


def require_secure(task: str, secure: edge_pb2.SecureSum, part: Part, uplink: Uplink) -> None:
    """Raise ProtocolError, naming the field, for a secure task that no sum can be made of."""
    if uplink.codec != "fp32":
        raise ProtocolError(f'task {task}: a secure sum of deltas in "{uplink.codec}"')
    if part.ranks is not None:
        raise ProtocolError(f"task {task}: a secure sum of some ranks only")
    if secure.minimum < 2 or not 0.5 <= secure.threshold < 1 or not 0 <= secure.colluding < 0.5:
        raise ProtocolError(
            f"task {task}: a secure sum of {secure.minimum} updates, threshold "
            f"{secure.threshold:g}, colluding {secure.colluding:g}"
        )
    if not (math.isfinite(secure.range) and secure.range > 0):
        raise ProtocolError(f"task {task}: a secure sum in a range of {secure.range:g}")
    if secure.weighting not in WEIGHTINGS:
        raise ProtocolError(f"task {task}: weighting {shown(repr(secure.weighting))}")
    if len(secure.roster) not in (0, DIGEST_BYTES):
        raise ProtocolError(f"task {task}: a roster's digest of {len(secure.roster)} bytes")


def require_allowed(task: edge_pb2.Task, floors: SecureFloors, home: Home) -> None:
    """Raise PolicyError for a task that the device's owner does not allow."""
    if not task.HasField("secure"):
        if floors.required:
            raise PolicyError(
                "the gateway asks for the delta itself, and [secure_aggregation] of device.toml "
                "says required: nothing is trained"
            )
        return
    secure = task.secure
    for name in ("minimum", "threshold", "colluding"):
        asked, floor = getattr(secure, name), getattr(floors, name)
        if asked < floor:
            raise PolicyError(
                f"the gateway's secure sums have {name} = {asked:g}, and [secure_aggregation] of "
                f"device.toml asks for {floor:g}: nothing is trained"
            )
    if floors.required:
        require_roster(
            secure.roster.hex(),
            authority_of(home),
            secure.roster_signature,
            read_trusted(home.trusted),
        )


def sum_config(task: edge_pb2.Task) -> str:
    """Return the SHA-256 of what all devices of a round are told alike, hex."""
    privacy, secure = task.privacy, task.secure
    common = [
        "anabranch device sum 1",
        task.run,
        task.round,
        task.manifest.sha256.hex(),
        task.adapter.sha256.hex(),
        task.training.decode(errors="replace"),
        task.part.decode(errors="replace"),
        task.proximal_mu,
        [privacy.noise_multiplier, privacy.sample_rate, privacy.clipping_norm, privacy.delta],
        [secure.minimum, secure.threshold, secure.colluding, secure.range, secure.weighting],
        secure.roster.hex(),
    ]
    return hashlib.sha256(msgspec.json.encode(common)).hexdigest()
