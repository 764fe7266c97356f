"""Every parser that the network reaches, and valid input of each, to be damaged.

    python -m tests.fuzz.parsers --minutes 10 [--only NAME] [--seed N]

damages samples until the time is over, and stops at the first input that does something else
than parse or raise the parser's declared errors: another exception, or more than SLOW_S. The
input is written to the current folder, and said in hex.

What a parser may do: return, or raise one of `declared`. The same holds for arbitrary bytes.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import logging
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

import msgspec
import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from flwr.app import RecordDict

from anabranch.client import contents, flower
from anabranch.client.sums.stages import unpack_reply, unpack_request
from anabranch.protocols import config, messages, wire
from anabranch.protocols.adapter import WHOLE
from anabranch.protocols.codecs.codec import CodecName
from anabranch.protocols.errors import (
    AnabranchError,
    ConfigError,
    MalformedMessage,
    PolicyError,
    ProtocolError,
    RunError,
)
from anabranch.protocols.identity import audit, authority, join, proposal
from anabranch.protocols.identity.invitation import Invitation
from anabranch.protocols.secagg.messages import STAGES
from anabranch.server.coordinator import door
from anabranch.server.coordinator.page.access import by_token
from anabranch.server.coordinator.state import SiteEntry
from anabranch.server.flower import read_described, read_evaluated, read_kept, read_trained
from tests.fuzz import mutate, sums
from tests.fuzz.contents import (
    ASSIGNMENT,
    DESCRIBE,
    DESCRIBED,
    EVALUATED,
    KEY,
    PEER,
    REFUSED,
    TRAINED,
    UPLINK,
    content_of,
)
from tests.fuzz.fetched import fetched
from tests.protocols.rig import ADAPTER, CODECS, DELTA, ONLY_B, SPEC
from tests.runs import TABLE_RUN, TEXT_RUN

SLOW_S = 5  # a parser that needs longer for one small input is a finding
NOW = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True)
class Parser:
    """One parser: what it reads, how samples are damaged knowingly, what it may raise."""

    name: str
    parse: Callable[[bytes], object]
    declared: tuple[type[Exception], ...]
    samples: Sequence[bytes]
    aware: Sequence[mutate.Mutation] = (mutate.blind,)

    def try_one(self, data: bytes) -> None:
        """Parse; raises whatever the parser may not raise."""
        try:
            self.parse(data)
        except self.declared as error:
            if isinstance(error, AnabranchError):
                str(error).encode()  # can be sent


# Frames and messages -------------------------------------------------------------------------


def _frames() -> list[Parser]:
    whole, part = wire.encode(ADAPTER), wire.encode_part(ADAPTER, ONLY_B)
    found = [
        Parser("adapter", wire.decode_adapter, (ProtocolError,), [whole, part], [mutate.frame])
    ]
    for codec in CODECS:
        sample = wire.encode(DELTA, codec=codec, keep=0.5, rng=np.random.default_rng(0))

        def parse(data: bytes, codec: CodecName = codec) -> object:
            return wire.decode_delta(data, SPEC, codec=codec, keep=0.5)

        found.append(Parser(f"delta-{codec}", parse, (ProtocolError,), [sample], [mutate.frame]))
    return found


def _checked(data: bytes) -> None:
    """What a site does with an assignment before anything else."""
    assignment = messages.decode(data, messages.Assignment)
    if assignment.signed is not None:
        proposed = assignment.signed.verified()
        proposal.require_fits(proposed, assignment.run, assignment.config)


def _message(sample: msgspec.Struct) -> Parser:
    def parse(data: bytes) -> None:
        messages.encode(messages.decode(data, type(sample)))

    name = type(sample).__name__.lower()
    text = messages.encode(sample)
    return Parser(name, parse, (MalformedMessage,), [text], [mutate.json_value])


# What Flower's messages hold -----------------------------------------------------------------


def _fetched(data: bytes) -> None:
    fetched(data)


def _by_site(data: bytes) -> None:
    content = content_of(data)
    unpacks: tuple[Callable[[RecordDict], object], ...] = (
        flower.unpack_assignment,
        lambda content: contents.unpack(content, flower.Describe),
        flower.payload_bytes,
        *(partial(unpack_request, stage=stage) for stage in STAGES),
    )
    for unpack in unpacks:
        try:
            unpack(content)
        except ProtocolError:
            continue


def _by_coordinator(data: bytes) -> None:
    content = content_of(data)
    flower.payload_bytes(content)
    read_described(content, 1)
    read_evaluated(content, PEER)
    read_kept(content, PEER, private=False)
    for stage in STAGES:
        try:
            unpack_reply(content, stage)
        except ProtocolError:
            continue
    read_trained(content, PEER, spec=SPEC, parts={"north": WHOLE}, uplink=UPLINK)


# Identities ----------------------------------------------------------------------------------

SITE_KEY = authority.new_key()
AUTHORITY = authority.new_authority("heart", ["fl.example.org", "10.1.2.3"], NOW)
SITE = AUTHORITY.site(SITE_KEY.public_key(), "st-anna", NOW)
ENTRY = SiteEntry(
    name="st-anna",
    key=authority.key_digest(SITE_KEY.public_key()),
    public_key="",
    node=1,
    status="active",
    joined=0.0,
    expires=0.0,
    serial="",
    version="",
    reason="",
)


def _node_key(data: bytes) -> None:
    door._require_own_key({"headers": [(door.PUBLIC_KEY, data)]}, ENTRY)


def _public_pems() -> list[bytes]:
    keys = (
        SITE_KEY,
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    )
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return [base64.b64encode(key.public_key().public_bytes(*form)) for key in keys]


def _page(data: bytes) -> None:
    text = data.decode("latin-1")  # as headers are
    if by_token("t" * 43, text, text) is not None:
        raise ValueError("somebody without the token was let in")


def _join_messages() -> list[Parser]:
    from tests.protocols.identity.test_join_messages import GOOD

    found = []
    for kind, values in GOOD.items():

        def parse(data: bytes, kind: type[msgspec.Struct] = kind) -> None:
            join.encode(join.decode(data, kind))

        name, sample = f"site-{kind.__name__.lower()}", msgspec.json.encode(values)
        found.append(Parser(name, parse, (MalformedMessage,), [sample], [mutate.json_value]))
    return found


def _certificate(data: bytes) -> None:
    found = authority.read_certificate(data, "site.pem")
    authority.site_of(found, AUTHORITY.certificate, NOW)
    authority.fingerprint(found)


def _invitation(data: bytes) -> None:
    found = Invitation.parse(data.decode("utf-8", "replace"))
    found.host.encode()
    if not 0 < found.port < 65536:
        raise ValueError(found.port)


def _identities() -> list[Parser]:
    line = audit.write_line(
        None,
        audit.OPENED,
        "2026",
        audit.Opening(format=1, log="ab" * 16, who="x", key="ab" * 32).fields(),
        KEY,
    )
    secret = "s3cret_-" * 5 + "end"
    invitation = f"anabranch:[::1]:8443/{'ab' * 32}/{secret}".encode()
    malformed = (MalformedMessage,)
    return [
        Parser("invitation", _invitation, malformed, [invitation]),
        Parser(
            "certificate-request",
            authority.request_key,
            malformed,
            [authority.certificate_request(SITE_KEY)],
            [mutate.pem],
        ),
        Parser(
            "certificate",
            _certificate,
            (ProtocolError,),
            [authority.certificate_pem(SITE), authority.certificate_pem(AUTHORITY.certificate)],
            [mutate.pem],
        ),
        Parser("node-key", _node_key, (door.Refused,), _public_pems(), [mutate.pem_in_base64]),
        Parser("page-access", _page, (), [b"Bearer x", b"anabranch_0=x; a=b", b'a="\\042"']),
        Parser(
            "audit-line",
            lambda data: audit.opening_of(audit.read_line(data)),
            (ProtocolError,),
            [line],
            [mutate.json_value],
        ),
        *_join_messages(),
    ]


def _sums() -> list[Parser]:
    refused = (ProtocolError, PolicyError)
    return [
        *(_message(sums.SAMPLES[kind.__name__]) for kind in sums.KINDS),
        Parser("invited", sums.invited, refused, [sums.INVITE], [mutate.json_value]),
        Parser("adverts-shown", sums.shown_adverts, refused, [sums.ADVERTS], [mutate.json_value]),
        Parser("advert-sent", sums.sent_advert, refused, [sums.ADVERT], [mutate.json_value]),
    ]


PARSERS = (
    *_frames(),
    *map(_message, (ASSIGNMENT, TRAINED, EVALUATED, REFUSED, DESCRIBE, DESCRIBED)),
    Parser(
        "assignment-checked",
        _checked,
        (ProtocolError,),
        [messages.encode(ASSIGNMENT)],
        [mutate.json_value],
    ),
    Parser("fetched", _fetched, (ProtocolError, RunError), [b""], [mutate.fresh]),
    Parser("content-at-site", _by_site, (), [b"0"], [mutate.fresh]),
    Parser("content-at-coordinator", _by_coordinator, (), [b"0"], [mutate.fresh]),
    Parser(
        "contract",
        lambda data: config.parse(data, source="contract"),
        (ConfigError,),
        [TABLE_RUN.encode(), TEXT_RUN.encode()],
    ),
    *_identities(),
    *_sums(),
)


# The runner ----------------------------------------------------------------------------------


class TooSlow(Exception):
    """A parser needed more than SLOW_S."""


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise TooSlow


def damage(parsers: Sequence[Parser], seconds: float, seed: int) -> tuple[Parser, bytes] | None:
    """Damage samples for so long; return the first finding, its traceback printed."""
    rng = random.Random(seed)
    counts = dict.fromkeys((parser.name for parser in parsers), 0)
    end = time.monotonic() + seconds
    signal.signal(signal.SIGALRM, _stop)
    while time.monotonic() < end:
        for parser in parsers:
            for _ in range(50):
                data = mutate.changed(parser.samples, parser.aware, rng)
                signal.alarm(SLOW_S)
                try:
                    parser.try_one(data)
                except Exception:  # noqa: BLE001 - whatever it is, it is a finding
                    signal.alarm(0)
                    traceback.print_exc()
                    return parser, data
                signal.alarm(0)
                counts[parser.name] += 1
    sys.stdout.write(f"{sum(counts.values())} inputs, {min(counts.values())} at least of each\n")
    return None


def main() -> int:
    """Run until the time is over or something is found; 1 if so."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--minutes", type=float, default=10.0)
    arguments.add_argument("--only", default="")
    arguments.add_argument("--seed", type=int, default=int(time.time()))
    given = arguments.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()  # Flower tells of records that are exchanged
    chosen = [parser for parser in PARSERS if given.only in parser.name]
    sys.stdout.write(f"seed {given.seed}: {', '.join(p.name for p in chosen)}\n")
    found = damage(chosen, 60 * given.minutes, given.seed)
    if found is None:
        return 0
    parser, data = found
    with tempfile.NamedTemporaryFile(prefix=f"{parser.name}-", dir=".", delete=False) as file:
        file.write(data)
    sys.stdout.write(f"{parser.name}: {Path(file.name).name}: {data[:500].hex()}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
