"""Write one file per attack on the wire format: who reads it, which error it must get.

Run it after adding an attack:  python -m tests.protocols.attacks.create
"""

from __future__ import annotations

from pathlib import Path

from tests.protocols.attacks.adapters import (
    framing,
    hostile_parts,
    hostile_specs,
    hostile_values,
    json_tricks,
)
from tests.protocols.attacks.deltas import hostile_codes, hostile_deltas
from tests.protocols.attacks.frames import Attack

FOLDER = Path(__file__).parent


def attacks() -> dict[str, Attack]:
    """Return every attack by name."""
    return (
        framing()
        | json_tricks()
        | hostile_specs()
        | hostile_values()
        | hostile_parts()
        | hostile_deltas()
        | hostile_codes()
    )


def text(attack: Attack) -> str:
    """Return the content of an attack's file: four fields, a blank line, hex."""
    fields = (
        f"reader: {attack.reader}\nexpect: {attack.error}\n"
        f"match: {attack.match}\ncomment: {attack.comment}"
    ).rstrip()
    lines = attack.data.hex("\n", -32)  # 32 bytes to a line
    return f"{fields}\n\n{lines}\n"


def main() -> None:
    """Write every attack into its file, and remove the files of those that are no more."""
    for old in FOLDER.glob("*.txt"):
        old.unlink()
    for name, attack in attacks().items():
        (FOLDER / f"{name}.txt").write_text(text(attack))


if __name__ == "__main__":
    main()
