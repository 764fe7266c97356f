"""Valid messages of a round, and contents of Flower's messages damaged in their records."""

from __future__ import annotations

import random
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from anabranch.client import contents, flower
from anabranch.client.sums import stages
from anabranch.protocols import messages, wire
from anabranch.protocols.identity import proposal
from anabranch.protocols.secagg import messages as secagg
from anabranch.protocols.secagg import terms
from anabranch.protocols.secagg.member import Answer
from anabranch.protocols.tables import Uplink
from anabranch.server.flower import Peer
from tests.fuzz import mutate
from tests.protocols.rig import ADAPTER, DELTA, ONLY_B
from tests.runs import table_run

RUN = table_run()
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SIGNED = proposal.sign(
    proposal.Proposal(
        federation="heart",
        run="r",
        author="dr-lee",
        version="1",
        code="ab" * 32,
        config=RUN.digest(),
        base=RUN.model.base,
        contract=proposal.contract_digest(RUN),
    ),
    KEY,
)
ASSIGNMENT = messages.Assignment(run="r", round=1, config=RUN, part=ONLY_B, signed=SIGNED)
TRAINED = messages.Trained(
    site="north", num_examples=7, steps=3, seconds=1.5, loss=0.5, epsilon=1.0, delta=1e-5,
    noise_multiplier=1.0, sample_rate=0.5, ledger="ab" * 32,
)  # fmt: skip
EVALUATED = messages.Evaluated(site="north", num_examples=7, metrics={"accuracy": 0.5})
REFUSED = messages.Refused(site="north", reason="policy", message="not approved")
ROSTER = terms.Roster.of(
    terms.Peer(name=name, key=name[:2].encode().hex() * 16) for name in ("north", "south")
)
DESCRIBE = flower.Describe(run="r", config=RUN, signed=SIGNED, roster=ROSTER)
DESCRIBED = flower.Described(site="north", num_examples=7, held_out=7, max_rank=4)

KEPT = msgspec.structs.replace(TRAINED, num_examples=0, steps=0, loss=None)
INSTANCE = "cd" * 32
SUM_ROSTER = terms.Roster(peers=(terms.Peer(name="north", key="ab" * 32),))
SUM_TERMS = terms.Terms(
    run="r", round=1, instance=INSTANCE, config="ab" * 32, model="ab" * 32,
    roster=SUM_ROSTER.digest, members=("north", "south"), minimum=2, threshold=0.5, colluding=0.0,
    ring=24, limit=4.0, weight=1024, values=4, counters=3, keystream="chacha20",
)  # fmt: skip
ADVERT = terms.Advert(name="north", sealing="ab" * 32, masking="cd" * 32, signature="ef" * 64)
BOX = bytes(secagg.SEALED_BYTES)
SUM_REQUESTS: tuple[secagg.Request, ...] = (
    secagg.Invite(terms=SUM_TERMS, roster=SUM_ROSTER),
    secagg.Adverts(instance=INSTANCE, adverts=(ADVERT,)),
    secagg.Delivery(instance=INSTANCE, sealed={"south": BOX}),
    secagg.Survivors(instance=INSTANCE, names=("north", "south")),
    secagg.Agreement(instance=INSTANCE, signatures={"north": "ef" * 64}),
)
SUM_REPLIES: tuple[secagg.Reply, ...] = (
    ADVERT,
    secagg.Shares(instance=INSTANCE, commitment="ab" * 32, sealed={"south": BOX}),
    secagg.Masked(instance=INSTANCE),
    secagg.Agreed(instance=INSTANCE, signature="ef" * 64),
    secagg.Reveal(instance=INSTANCE, seeds={"south": bytes(33)}, keys={}),
)

CONTENTS = (
    flower.pack_assignment(ASSIGNMENT, wire.encode(ADAPTER)),
    flower.pack_trained(TRAINED, wire.encode(DELTA)),
    flower.pack_evaluated(EVALUATED),
    flower.pack_refused(REFUSED),
    flower.pack_describe(DESCRIBE),
    contents.pack(DESCRIBED),
    flower.pack_trained(KEPT, b""),
    *(stages.pack_request(ASSIGNMENT, request) for request in SUM_REQUESTS),
    *(stages.pack_reply(Answer(reply, bytes(12))) for reply in SUM_REPLIES),
)
UPLINK = Uplink()
PEER = Peer("north", 1, 7, 7)


def content_of(data: bytes) -> RecordDict:
    """Return a content that the bytes choose: a valid one, damaged in its records."""
    rng = random.Random(data)
    content = RecordDict(dict(rng.choice(CONTENTS)))
    message: dict[str, Any] = dict(content["message"])
    if isinstance(message["json"], bytes) and rng.random() < 0.7:
        message["json"] = mutate.json_value(message["json"], rng)
    if rng.random() < 0.3:
        message[rng.choice(("kind", "json", "more"))] = rng.choice(
            ("refused", "trained", "describe", "", "\x1b", 1, 1.5, b"", b"{}", True, [1], ["a"])
        )
    content["message"] = ConfigRecord(message)
    if rng.random() < 0.6:
        sample = wire.encode(rng.choice((ADAPTER, DELTA)))
        frame = rng.choice((mutate.frame, mutate.blind))(sample, rng)
        shape = rng.choice(((len(frame),), (len(frame),), (), (-1,), (2**70,), (1, 1)))
        kind = rng.choice((flower.FRAME_TYPE, flower.FRAME_TYPE, "numpy.ndarray", ""))
        array = Array(rng.choice(("uint8", "uint8", "float32", "")), shape, kind, frame)
        content["frame"] = ArrayRecord({rng.choice(("frame", "frame", "other")): array})
    if rng.random() < 0.3:
        content[rng.choice(("frame", "metrics", "message", "more"))] = rng.choice(
            (ConfigRecord({"frame": "x"}), MetricRecord({"num-examples": [1.5]}), ArrayRecord())
        )
    if rng.random() < 0.2:
        del content[rng.choice(list(content))]
    return content
