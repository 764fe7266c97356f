"""A signed proposal: one changed value and it is nobody's; one other value and it does not fit."""

from __future__ import annotations

import hashlib
import json

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import MalformedMessage, ProtocolError
from anabranch.protocols.identity.proposal import (
    DOMAIN,
    Proposal,
    Signed,
    contract_digest,
    require_fits,
    sign,
)
from anabranch.protocols.tables import SecureAggregation
from tests.runs import table_run

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
CONFIG: RunConfig = table_run()
PROPOSAL = Proposal(
    federation="heart",
    run="heart-1",
    author="dr-lee",
    version="0.7.0",
    code="ab" * 32,
    config=CONFIG.digest(),
    base=CONFIG.model.base,
    contract=contract_digest(CONFIG),
)
SIGNED = sign(PROPOSAL, KEY)

names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)
short = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=200)
hexes = st.binary(min_size=32, max_size=32).map(bytes.hex)
VALUES = {
    "federation": names,
    "run": short,
    "author": names,
    "version": short,
    "code": hexes,
    "config": hexes,
    "base": short,
    "contract": hexes,
    "roster": hexes | st.none(),
}
proposals = st.builds(Proposal, **VALUES)


@given(proposals)
def test_a_signed_proposal_is_read_back(proposal: Proposal) -> None:
    text = msgspec.json.encode(sign(proposal, KEY))
    again = msgspec.json.decode(text, type=Signed)

    assert again.verified() == proposal
    assert again.key == KEY.public_key().public_bytes_raw().hex()


@given(st.sampled_from(sorted(VALUES)), st.data())
def test_any_changed_value_breaks_the_signature(name: str, data: st.DataObject) -> None:
    other = data.draw(VALUES[name].filter(lambda value: value != getattr(PROPOSAL, name)))
    changed = msgspec.structs.replace(PROPOSAL, **{name: other})

    assert changed.digest != PROPOSAL.digest
    with pytest.raises(ProtocolError, match="the proposal is not signed by"):
        msgspec.structs.replace(SIGNED, proposal=changed).verified()


def test_the_values_are_all_the_values() -> None:
    """A value that is added to proposals must be added to the law above."""
    assert set(VALUES) == set(Proposal.__struct_fields__)


@given(st.integers(0, 511))
def test_any_changed_bit_of_the_signature_or_key_breaks_it(bit: int) -> None:
    for name in ("signature", "key"):
        value = bytearray.fromhex(getattr(SIGNED, name))
        value[bit // 8 % len(value)] ^= 1 << bit % 8
        with pytest.raises(ProtocolError, match="the proposal is not signed by dr-lee"):
            msgspec.structs.replace(SIGNED, **{name: bytes(value).hex()}).verified()


def test_a_signature_without_its_domain_or_for_another_purpose_is_refused() -> None:
    assert DOMAIN.endswith(b"\0")
    for message in (PROPOSAL.encoded, b"anabranch run proposal 2\0" + PROPOSAL.encoded):
        signed = msgspec.structs.replace(SIGNED, signature=KEY.sign(message).hex())
        with pytest.raises(ProtocolError, match="is not signed by"):
            signed.verified()


def test_what_is_signed_is_canonical_json() -> None:
    """Another program gets the same bytes: keys in order, no spaces."""
    for roster in (None, "ef" * 32):
        proposal = msgspec.structs.replace(PROPOSAL, roster=roster)
        values = {name: getattr(proposal, name) for name in Proposal.__struct_fields__}
        there = {name: value for name, value in values.items() if value is not None}
        text = json.dumps(there, sort_keys=True, separators=(",", ":")).encode()

        assert proposal.encoded == text
        assert proposal.digest == hashlib.sha256(text).hexdigest()


def test_a_proposal_without_a_roster_has_the_digest_it_had_before_there_were_any() -> None:
    """Runs that owners approved stay approved; the text is one that an earlier version wrote."""
    text = (
        b'{"author":"dr-lee","base":"tiny","code":"' + b"ab" * 32 + b'","config":"' + b"cd" * 32
        + b'","contract":"' + b"ef" * 32 + b'","federation":"heart","run":"heart-1",'
        b'"version":"0.7.0"}'
    )  # fmt: skip
    before = msgspec.json.decode(text, type=Proposal)
    assert before.encoded == text
    assert before.digest == "4c010de9ad939f72376929babb61dc1c1744e6e2449064ced6d85c612397fdfb"
    assert b"roster" not in msgspec.json.encode(sign(before, KEY))
    named = msgspec.structs.replace(before, roster="00" * 32)
    assert named.digest != before.digest


@pytest.mark.parametrize("name", ["key", "signature"])
@pytest.mark.parametrize("change", ["\n", " ", "00"])
def test_a_key_or_signature_has_one_spelling(name: str, change: str) -> None:
    """Python's bytes.fromhex skips spaces: a key with one would be the same key, unlike a name."""
    values = msgspec.to_builtins(SIGNED)
    values[name] += change
    with pytest.raises(msgspec.ValidationError, match="matching regex"):
        msgspec.convert(values, Signed)
    values[name] = getattr(SIGNED, name).upper()
    with pytest.raises(msgspec.ValidationError, match="matching regex"):
        msgspec.convert(values, Signed)


def test_a_proposal_of_too_many_bytes_is_not_signed() -> None:
    long = msgspec.structs.replace(PROPOSAL, run="\U0001f9e1" * 1200)
    with pytest.raises(MalformedMessage, match="more than 4096 bytes"):
        sign(long, KEY)


def test_a_message_that_was_proposed_fits() -> None:
    require_fits(PROPOSAL, "heart-1", CONFIG)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"run": "heart-2"}, "run 'heart-1'"),
        ({"config": "00" * 32}, "configuration"),
        ({"contract": "00" * 32}, "data contract"),
        ({"base": "another"}, "base model"),
    ],
)
def test_a_message_that_was_not_proposed_is_refused(change: dict[str, str], what: str) -> None:
    proposed = msgspec.structs.replace(PROPOSAL, **change)
    with pytest.raises(ProtocolError, match=f"the message has {what}.*nothing was done"):
        require_fits(proposed, "heart-1", CONFIG)


def test_a_run_that_sums_securely_fits_only_with_a_roster() -> None:
    config = msgspec.structs.replace(CONFIG, secure_aggregation=SecureAggregation())
    without = msgspec.structs.replace(PROPOSAL, config=config.digest())
    with pytest.raises(ProtocolError, match=r"its proposal has no roster.*Propose the run again"):
        require_fits(without, "heart-1", config)
    require_fits(msgspec.structs.replace(without, roster="00" * 32), "heart-1", config)


def test_each_part_of_a_configuration_counts() -> None:
    """Another seed is another configuration; other labels are another contract as well."""
    seed = msgspec.structs.replace(CONFIG, seed=CONFIG.seed + 1)
    with pytest.raises(ProtocolError, match="configuration"):
        require_fits(PROPOSAL, "heart-1", seed)
    assert contract_digest(seed) == contract_digest(CONFIG)
    task = msgspec.structs.replace(CONFIG.task, labels=tuple(reversed(CONFIG.task.labels)))
    assert contract_digest(msgspec.structs.replace(CONFIG, task=task)) != contract_digest(CONFIG)
