"""Write the golden vectors of whole sums: python -m tests.vectors.secagg.create

Each is one JSON document (docs/secure-aggregation.md, "Golden vectors"). Run it only when the
protocol changes; tests/protocols/secagg/test_golden_sums.py compares.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec

from anabranch.protocols.secagg import keys
from anabranch.protocols.secagg.member import Answer
from anabranch.protocols.secagg.messages import Request, Stage
from tests.protocols.secagg.rig import Cohort, Random, integers, key_of, random_of

HERE = Path(__file__).parent
DRAWS = ("sealing key", "masking key", "self-mask seed", "polynomial of the seed", "of the key")

CASES: dict[str, tuple[int, dict[str, Stage], dict[str, Any]]] = {
    "absent": (4, {"site-0001": "advertise"}, {"ring": 16, "threshold": 0.67}),
    "three": (3, {"site-0002": "mask"}, {"ring": 32, "keystream": "aes-256-ctr"}),
    "three-24-bits": (3, {}, {"ring": 24, "keystream": "chacha20", "threshold": 0.7}),
    "groups": (9, {"site-0004": "mask"}, {"ring": 16, "group": 4, "values": 2, "colluding": 0.12}),
    "sparse": (132, {"site-0007": "mask", "site-0101": "share"}, {"ring": 64, "values": 2}),
}


def played(case: str) -> dict[str, Any]:
    """Play the sum of a case and return its vector; digests alone above a size."""
    count, silent, changes = CASES[case]
    cohort = Cohort.of(count, **changes)
    drawn: dict[str, list[str]] = {name: [] for name in cohort.terms.members}
    letters: list[dict[str, Any]] = []
    asked: dict[str, Request] = {}

    def random(name: str) -> Random:
        source = random_of(name)

        def draw(size: int) -> bytes:
            data = source(size)
            drawn[name].append(data.hex())
            return data

        return draw

    def ask(name: str, request: Request) -> Request:
        asked[name] = request
        return request

    def hear(name: str, answer: Answer) -> Answer:
        letter = {
            "member": name,
            "stage": asked[name].stage,
            "request": msgspec.to_builtins(asked[name]),
            "reply": msgspec.to_builtins(answer.reply),
        }
        if any(one.get("request") == letter["request"] for one in letters):
            del letter["request"]  # the same as somebody's before
        letters.append(letter | ({"data": answer.data.hex()} if answer.data else {}))
        return answer

    cohort.random, cohort.asking, cohort.answering = random, ask, hear
    cohort.run(silent)
    cohort.require_exact()
    vector = {
        "terms": cohort.terms.digest,
        "roster": cohort.roster.digest,
        "context": cohort.plan.context.hex(),
        "groups": [
            {
                "names": list(group.names),
                "holders": group.shape.holders,
                "threshold": group.shape.threshold,
                "needed": group.needed,
                "neighbours_of_the_first": list(group.peers[group.names[0]]),
            }
            for group in cohort.plan.groups
        ],
        "silent": silent,
        "sums": [
            {"members": list(one.members), "total": integers(one.total, cohort.terms.ring)}
            for one in cohort.aggregation.sums
        ],
    }
    if count > 20:
        return vector | {
            "terms_canonical": msgspec.json.encode(cohort.terms, order="sorted").decode(),
            "vectors": {
                name: integers(one, cohort.terms.ring) for name, one in cohort.vectors.items()
            },
            "letters_sha256": digest_of(letters),
        }
    return vector | {
        "members": {
            name: {
                "ed25519": key_of(name).private_bytes_raw().hex(),
                "vector": integers(cohort.vectors[name], cohort.terms.ring),
                "random": dict(zip(DRAWS, drawn[name], strict=False)),
            }
            | mask_keys(cohort, name, drawn[name])
            for name in cohort.terms.members
        },
        "letters": letters,
    }


def mask_keys(cohort: Cohort, name: str, drawn: list[str]) -> dict[str, Any]:
    """Return the keys of a member's masks: its own, and with those whose boxes it was sent."""
    if name not in cohort.seen.delivered:
        return {}
    plan, private = cohort.plan, bytes.fromhex(drawn[1])
    pairs = {
        peer: keys.mask_key(
            private, bytes.fromhex(plan.adverts[peer].masking), plan.context, name, peer
        ).hex()
        for peer in sorted(cohort.seen.delivered[name])
    }
    return {
        "self_mask_key": keys.self_key(bytes.fromhex(drawn[2]), plan.context, name).hex(),
        "mask_keys": pairs,
    }


def digest_of(letters: list[dict[str, Any]]) -> str:
    """Return the SHA-256 of all letters in order, as JSON with sorted keys and no spaces."""
    text = json.dumps(letters, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    """Write every case."""
    for case in CASES:
        text = json.dumps(played(case), indent=1, sort_keys=True)
        (HERE / f"{case}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
