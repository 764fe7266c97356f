"""--home and --trust: which folder a device has, and whose bundles it opens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from anabranch.protocols.errors import BundleError

Home_ = Annotated[
    Path | None,
    typer.Option("--home", help="The device's folder; default $XDG_STATE_HOME/anabranch/edge."),
]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust", help="Public key that signs bundles: 64 hex digits, or a file with them."
    ),
]
KEY_DIGITS = 64


def trusted_keys(trust: Sequence[str] | None, home: Path | None) -> list[bytes]:
    """Return the keys given, or those of the device's folder if none is given.

    Raises BundleError if one is no key, or if there is none at all: nothing is opened unsigned.
    """
    from anabranch.edge.runtime.home import Home
    from anabranch.edge.runtime.trust import read_trusted

    if trust:
        return [public_key(text) for text in trust]
    place = Home.default() if home is None else Home(home)
    keys = list(read_trusted(place.trusted))
    if not keys:
        raise BundleError(
            f"no key is trusted: {place.trusted} holds none. Enrol the device, or name the key "
            "that signed the bundle with --trust KEY.pub"
        )
    return keys


def public_key(text: str, option: str = "--trust") -> bytes:
    """Return the key in 64 hex digits, or in a file with them; BundleError names the option."""
    path = Path(text)
    try:
        digits = path.read_text().strip() if path.is_file() else text.strip()
        key = bytes.fromhex(digits)
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{option} {text}: expected {KEY_DIGITS} hex digits or a file with them ({error})"
        ) from None
    if len(digits) != KEY_DIGITS:
        raise BundleError(f"{option} {text}: expected {KEY_DIGITS} hex digits, got {len(digits)}")
    return key
