"""A model that is a device's own: trained offline, kept only if it is no worse, undone by hand.

    adapters/<name>/
      personal.json       which adapter is in use, which one was before, and of which bundle
      <sha256>.bin        their frames (docs/wire-format.md)

Part of the records is held out. The adapter that is in use is scored on it, training starts
from that adapter, and the result is scored on the same records; a lower accuracy, or an equal one
with a higher cross-entropy, is not kept. Nothing leaves the device. An adapter belongs to one
bundle: under another one, also under the next version, the released adapter is in use again.

personal.json is replaced as a whole, after the frames it names are on disk: a kill at any moment
leaves the adapter before or the one after.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from anabranch.edge.runtime import state as states
from anabranch.edge.runtime.bundle_manifest import Precision
from anabranch.edge.runtime.data import Records, split
from anabranch.edge.runtime.engine import EngineName
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.joint import open_engine
from anabranch.edge.runtime.manifest import Digest
from anabranch.edge.runtime.predict import Score, evaluate
from anabranch.edge.runtime.training import Checkpoints, Trained, train
from anabranch.protocols.adapter import WHOLE, Adapter
from anabranch.protocols.errors import DataError, DeviceError, ProtocolError
from anabranch.protocols.part import Part
from anabranch.protocols.tables import Training
from anabranch.protocols.wire import decode_adapter, digest, encode
from anabranch.storage.files import write_atomic

if TYPE_CHECKING:
    from anabranch.edge.runtime.bundle import Bundle

FILE = "personal.json"
STATE = "personal"  # folder of the state, in Home.training


class Choice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of personal.json. Adapters by the SHA-256 of their frames."""

    bundle: Digest  # of its manifest
    adapter: Digest  # in use; the manifest's own: the released one
    previous: Digest | None  # in use before; None: nothing to undo


@dataclass(frozen=True, eq=False, kw_only=True)
class Personalised:
    """What a personalisation did. Scores are of the device's own records: they do not leave."""

    kept: bool
    before: Score
    after: Score
    trained: Trained


def personalise(
    bundle: Bundle,
    records: Records,
    home: Home,
    *,
    training: Training | None = None,
    steps: int | None = None,
    seed: int = 0,
    part: Part = WHOLE,
    engine: EngineName = "joint",
    precision: Precision = "fp32",
    threads: int = 1,
    memory_bytes: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Personalised:
    """Train on the records; the result is in use afterwards only if it is not worse.

    `training` None is the bundle's own. A call that was killed or interrupted goes on where it
    was, with the same result. Raises DataError if the records are too few to hold some out, and
    what `open_engine` and `train` raise; then the adapter in use stays.
    """
    share = bundle.manifest.validation
    learned, held = split(records, share, seed)
    if not len(held):
        raise DataError(
            f"{len(records)} records leave none to judge by (share {share:g} of every label): "
            "collect more, at least two of a label"
        )
    settings = training or bundle.manifest.training
    folder = home.training(bundle.manifest.name) / STATE
    about = {
        "bundle": bundle.digest,
        "engine": engine,
        "precision": precision,
        "memory": str(memory_bytes),
    }
    opened = open_engine(
        bundle, engine=engine, precision=precision, threads=threads, memory_bytes=memory_bytes
    )
    with closing(opened):
        opened.set_params((in_use(home, bundle) or bundle.adapter).arrays)
        before = evaluate(opened, held)
        trained = train(
            opened,
            learned,
            settings,
            steps=steps,
            seed=seed,
            part=part,
            checkpoints=Checkpoints(folder=folder, about=about),
            should_stop=should_stop,
        )
        after = evaluate(opened, held)
    kept = after.at_least(before)
    states.discard(
        folder
    )  # first: a kill between the two costs the steps, and trains nothing twice
    if kept:
        keep(home, bundle, trained.adapter)
    return Personalised(kept=kept, before=before, after=after, trained=trained)


def in_use(home: Home, bundle: Bundle) -> Adapter | None:
    """Return the personal adapter for this bundle; None if the released one is in use.

    Raises DeviceError for files that are damaged.
    """
    choice = _choice(home, bundle)
    if choice is None or choice.adapter == bundle.manifest.adapter:
        return None
    return _read(home, bundle, choice.adapter)


def keep(home: Home, bundle: Bundle, adapter: Adapter) -> None:
    """Use `adapter` from now on; the one that is in use now can be brought back by `undo`.

    Raises DeviceError if the disk does not take it, with nothing changed.
    """
    choice = _choice(home, bundle)
    before = bundle.manifest.adapter if choice is None else choice.adapter
    frame = encode(adapter)
    if digest(frame) == before:
        return
    _write(_folder(home, bundle) / f"{digest(frame)}.bin", frame)
    _choose(home, bundle, Choice(bundle=bundle.digest, adapter=digest(frame), previous=before))


def undo(home: Home, bundle: Bundle) -> Adapter | None:
    """Use the adapter that was in use before; return it, None for the released one.

    Raises DeviceError if there is nothing to undo (also a second time), or files are damaged.
    """
    choice = _choice(home, bundle)
    if choice is None or choice.previous is None:
        raise DeviceError(
            f"bundle {bundle.manifest.name}: there is nothing to undo; the released adapter, or "
            "the one from before, is already in use"
        )
    if choice.previous != bundle.manifest.adapter:
        _read(home, bundle, choice.previous)  # before anything changes
    _choose(home, bundle, Choice(bundle=bundle.digest, adapter=choice.previous, previous=None))
    return in_use(home, bundle)


def _folder(home: Home, bundle: Bundle) -> Path:
    return home.adapters(bundle.manifest.name)


def _choice(home: Home, bundle: Bundle) -> Choice | None:
    """Return what personal.json says for this bundle; None without one, or for another bundle."""
    path = _folder(home, bundle) / FILE
    try:
        choice = msgspec.json.decode(path.read_bytes(), type=Choice)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DeviceError(
            f"{path}: damaged or not readable ({error}); delete it to use the released adapter"
        ) from None
    return choice if choice.bundle == bundle.digest else None


def _choose(home: Home, bundle: Bundle, choice: Choice) -> None:
    """Replace personal.json, then remove the frames that it does not name."""
    folder = _folder(home, bundle)
    _write(folder / FILE, msgspec.json.encode(choice))
    for path in folder.glob("*.bin"):
        if path.stem not in (choice.adapter, choice.previous):
            path.unlink(missing_ok=True)


def _read(home: Home, bundle: Bundle, name: str) -> Adapter:
    path = _folder(home, bundle) / f"{name}.bin"
    try:
        data = path.read_bytes()
        if digest(data) != name:
            raise DeviceError(f"{path}: damaged (SHA-256 differs from its name); {_MEND}")
        return decode_adapter(data, bundle.manifest.spec)
    except OSError as error:
        raise DeviceError(f"{path}: cannot be read ({error.strerror or error}); {_MEND}") from None
    except ProtocolError as error:
        raise DeviceError(f"{path}: {error}; {_MEND}") from None


_MEND = f"delete {FILE} beside it to use the released adapter"


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomic(path, data, mode=0o600)
    except OSError as error:
        raise DeviceError(
            f"{path}: cannot be written ({error.strerror or error}); free some space"
        ) from None
