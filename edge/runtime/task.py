"""One task of a gateway on the device: checked, trained, and its delta put into the spool.

    task.pb                          the task that was begun, as the gateway sent it
    training/<bundle>/task/          state of its training, removed when the delta is in the spool
        private.json  delta.bin      of a private task: its reservation; its delta until settled

A private task is reserved in the ledger before it trains and settled before its delta leaves:

    reserve ─► private.json ─► train ─► delta.bin ─► settle ─► spool ─► clean up

A kill between any two of them goes on there. A reservation without private.json counts as spent.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
import numpy as np
from google.protobuf.message import DecodeError

from anabranch.edge.generated import edge_pb2
from anabranch.edge.runtime import state as states
from anabranch.edge.runtime.data import Records, read_records
from anabranch.edge.runtime.device_file import read_device
from anabranch.edge.runtime.engine import Engine, EngineName
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.joint import open_engine
from anabranch.edge.runtime.ledger import DeviceLedger
from anabranch.edge.runtime.ledger_report import ledger_of
from anabranch.edge.runtime.manifest import Digest
from anabranch.edge.runtime.private import (
    DevicePlan,
    PrivateRun,
    plan_given,
    require_private,
    run_privately,
)
from anabranch.edge.runtime.secure_task import require_secure
from anabranch.edge.runtime.spool import MAX_TASK, Entry, Spool
from anabranch.edge.runtime.training import Checkpoints, Trained, num_steps, train
from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import DeviceError, PrivacyError, ProtocolError
from anabranch.protocols.part import Part
from anabranch.protocols.spec import shown
from anabranch.protocols.tables import Count, Name, Training, Uplink
from anabranch.protocols.wire import MAX_FRAME, decode_adapter, digest, encode
from anabranch.storage.files import write_atomic

if TYPE_CHECKING:
    from anabranch.edge.runtime.bundle import Bundle

FOLDER = "task"  # below Home.training
FILE = "task.pb"
PRIVATE, DELTA = "private.json", "delta.bin"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Work:
    """A task whose fields were checked."""

    id: str
    run: str
    bundle: str
    training: Training
    part: Part
    uplink: Uplink
    proximal_mu: float
    seed: int
    privacy: edge_pb2.RecordPrivacy | None
    deadline_unix: int
    max_upload_bytes: int
    secure: edge_pb2.SecureSum | None = None


class _Reserved(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """private.json: the ledger's entry for a task, and the SHA-256 of the delta once there is."""

    task: str
    entry: Count
    delta: Digest | None = None


def checked(task: edge_pb2.Task) -> Work:
    """Return what a task asks for; raise ProtocolError naming the first field that is wrong."""
    if any(not 0 < len(one) <= MAX_TASK or not one.isprintable() for one in (task.id, task.run)):
        raise ProtocolError(f"task: id and run: expected 1 to {MAX_TASK} printable characters each")
    if not _is_name(task.bundle) or task.bundle_version < 1:
        raise ProtocolError(f"task {task.id}: {shown(task.bundle)} is no name of a bundle")
    if not 0 < task.max_upload_bytes <= MAX_FRAME or not task.deadline_unix < 2**53:
        raise ProtocolError(
            f"task {task.id}: max_upload_bytes {task.max_upload_bytes} or deadline_unix "
            f"{task.deadline_unix} out of range"
        )
    if not 0 <= task.proximal_mu < float("inf"):
        raise ProtocolError(f"task {task.id}: proximal_mu = {task.proximal_mu}")
    work = Work(
        id=task.id,
        run=task.run,
        bundle=task.bundle,
        training=_table(task.training, Training, "training"),
        part=_table(task.part, Part, "part"),
        uplink=_table(task.uplink, Uplink, "uplink"),
        proximal_mu=task.proximal_mu,
        seed=task.seed,
        privacy=task.privacy if task.HasField("privacy") else None,
        deadline_unix=task.deadline_unix,
        max_upload_bytes=task.max_upload_bytes,
        secure=task.secure if task.HasField("secure") else None,
    )
    if work.secure is not None:
        require_secure(work.id, work.secure, work.part, work.uplink)
    if work.uplink.error_feedback:
        raise ProtocolError(f"task {task.id}: error feedback is not done on devices")
    return work


def remember(home: Home, task: edge_pb2.Task) -> None:
    """Write task.pb: the device goes on with this task after a kill."""
    write_atomic(home.folder / FILE, task.SerializeToString(), 0o600)


def remembered(home: Home) -> edge_pb2.Task | None:
    """Return the task in task.pb; None if there is none. A damaged file is removed."""
    path = home.folder / FILE
    try:
        data = path.read_bytes()
        task = edge_pb2.Task()
        task.ParseFromString(data)
    except FileNotFoundError:
        return None
    except DecodeError:
        path.unlink()
        return None
    return task


def forget(home: Home, task: edge_pb2.Task) -> None:
    """Remove task.pb and the state of its training."""
    if _is_name(task.bundle):
        shutil.rmtree(_folder(home, task.bundle), ignore_errors=True)
    (home.folder / FILE).unlink(missing_ok=True)


def perform(
    work: Work,
    bundle: Bundle,
    start: bytes,
    data: Path,
    home: Home,
    *,
    spool: Spool,
    engine: EngineName = "joint",
    threads: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
) -> Entry:
    """Train the task on the records in `data` from the adapter's frame `start`; spool the delta.

    Guarantees: the same task ends with one delta, whatever is killed in between; a delta of a
    private task is in the spool only if the ledger has settled it; nothing is trained if the
    device's budget does not allow it.

    Raises Interrupted when `should_stop` says so (the state is saved), PrivacyError, DataError,
    DeviceError, ProtocolError for an adapter that is not the bundle's.
    """
    there = spool.get(work.id)
    if there is not None:
        return there
    records = read_records(data, bundle.manifest, bundle.tokenizer)
    if not len(records):
        raise DeviceError(f"{data}: has no records to train on")
    adapter = decode_adapter(start, bundle.manifest.spec)
    with closing(open_engine(bundle, engine=engine, threads=threads)) as opened:
        opened.set_params(adapter.arrays)
        about = {"bundle": bundle.digest, "engine": engine, "task": work.id}
        place = Checkpoints(folder=_folder(home, work.bundle), about=about)
        frame, steps = _trained(work, bundle, records, opened, place, home, should_stop)
    if len(frame) > work.max_upload_bytes:
        raise ProtocolError(
            f"task {work.id}: its delta has {len(frame)} bytes, the gateway takes "
            f"{work.max_upload_bytes}"
        )
    return spool.put(
        work.id,
        frame,
        examples=len(records),
        steps=steps,
        deadline_unix=work.deadline_unix,
        secure=work.secure is not None,
    )


def _trained(
    work: Work,
    bundle: Bundle,
    records: Records,
    engine: Engine,
    place: Checkpoints,
    home: Home,
    should_stop: Callable[[], bool],
) -> tuple[bytes, int]:
    """Return the delta's frame and its steps."""
    steps = num_steps(len(records), work.training)

    def run(private: PrivateRun | None) -> Trained:
        return train(
            engine,
            records,
            work.training,
            seed=work.seed,
            part=work.part,
            proximal_mu=work.proximal_mu,
            checkpoints=place,
            should_stop=should_stop,
            private=None if private is None else private.steps,
        )

    budget = read_device(home.folder).budget
    plan = _plan(work, bundle, steps, len(records))
    require_private(budget, plan)
    if plan is None:
        return _frame(work, run(None).delta), steps
    ledger = ledger_of(home)
    found = _reserved(place.folder, work.id)
    if found is not None and _is_settled(ledger, found.entry):
        return _settled_delta(place.folder, found), steps
    state = states.read(place.folder) if found is not None else None
    if found is None:
        states.discard(place.folder)  # of a reservation that is not known any more
    with run_privately(
        ledger,
        plan,
        run=bundle.manifest.config,  # signed: what a gateway calls a run decides no budget
        steps=steps,
        num_examples=len(records),
        budget=budget,
        entry=None if found is None else found.entry,
        done=0 if state is None else state.step,
    ) as private:
        _reserve(place.folder, _Reserved(task=work.id, entry=private.entry))
        frame = _frame(work, run(private).delta)
        write_atomic(place.folder / DELTA, frame, 0o600)
        done = _Reserved(task=work.id, entry=private.entry, delta=digest(frame))
        _reserve(place.folder, done)
    return private.released(frame), steps


def _plan(work: Work, bundle: Bundle, steps: int, records: int) -> DevicePlan | None:
    """Return the plan of a private task. What the signed bundle asks for cannot be left out."""
    asked = work.privacy
    if asked is None:
        if bundle.manifest.privacy is not None:
            raise PrivacyError(
                f"task {work.id}: no privacy, but bundle {bundle.manifest.name} may only be "
                "trained with it; nothing is trained"
            )
        return None
    return plan_given(
        noise_multiplier=asked.noise_multiplier,
        clipping_norm=asked.clipping_norm,
        sample_rate=asked.sample_rate,
        delta=asked.delta,
        training=work.training,
        steps=steps,
        num_examples=records,
        privacy=bundle.manifest.privacy,
    )


def _frame(work: Work, delta: Delta) -> bytes:
    """Return the delta in the run's codec; its rounding follows from the task's seed."""
    rng = np.random.default_rng(work.seed)
    return encode(delta, codec=work.uplink.codec, keep=work.uplink.keep, rng=rng)


def _reserve(folder: Path, reserved: _Reserved) -> None:
    write_atomic(folder / PRIVATE, msgspec.json.encode(reserved), 0o600)


def _reserved(folder: Path, task: str) -> _Reserved | None:
    """Return the reservation of this task; one of another task counts as spent."""
    try:
        found = msgspec.json.decode((folder / PRIVATE).read_bytes(), type=_Reserved)
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return found if found.task == task else None


def _is_settled(ledger: DeviceLedger, entry: int) -> bool:
    state = ledger.state()
    return state is not None and entry in state.settled


def _settled_delta(folder: Path, found: _Reserved) -> bytes:
    frame = (folder / DELTA).read_bytes() if (folder / DELTA).exists() else b""
    if digest(frame) != found.delta:
        raise PrivacyError(
            f"{folder / DELTA}: not the delta that was settled in the ledger; nothing leaves"
        )
    return frame


def _folder(home: Home, bundle: str) -> Path:
    return home.training(bundle) / FOLDER


def _is_name(text: str) -> bool:
    """Return whether a bundle may have this name; it becomes the name of a folder."""
    try:
        msgspec.convert(text, Name)
    except msgspec.ValidationError:
        return False
    return True


def _table(data: bytes, kind: type[T], name: str) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"task: {name}: {error}") from None
