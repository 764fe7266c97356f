"""The checks of a site's preflight, one small function each (preflight.py has the list).

A sentence may name files of this machine, and is for its owner. `Check.told` is what the
coordinator may read: nothing computed from records, no path.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from anabranch.client.agent import machine
from anabranch.client.agent.door import Door
from anabranch.client.agent.identity import Identity
from anabranch.client.policy.code import app_hash, code_digest, version
from anabranch.client.policy.policy_file import read_policy
from anabranch.client.site_file import SiteFile, ledger_of
from anabranch.protocols.errors import AnabranchError
from anabranch.protocols.identity.join import Hello

CLOCK_AHEAD_S = 5.0  # Flower refuses what is signed further ahead of its clock
CLOCK_BEHIND_S = 60.0
DISK_BYTES = 1 << 30
TEMPORARY_BYTES = 256 << 20
MEMORY_BYTES = 1 << 30  # torch and a small base model
DAY_S = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding."""

    name: str
    ok: bool
    value: str
    sentence: str = ""  # what to do; "" if all is well
    private: bool = field(default=False, repr=False)  # the sentence is for this site alone

    @property
    def told(self) -> str:
        """Return what the coordinator may read."""
        if self.private or not self.sentence:
            return f"{self.name}: not ready; at the site, `anabranch site preflight` says why"
        return f"{self.name}: {self.sentence}"[:500]


def coordinator(
    identity: Identity, hello: Callable[[], Hello] | None, clock: Callable[[], float]
) -> Iterator[Check]:
    """Ask the coordinator who and when it is; without an answer, that is the only finding."""
    try:
        before = clock()
        if hello is None:
            with Door(identity) as door:
                before = clock()
                answer = door.hello()
        else:
            answer = hello()
        after = clock()
    except AnabranchError as error:
        yield failed("coordinator", identity.address, error)
        return
    if answer.federation != identity.federation:
        yield Check(
            name="coordinator",
            ok=False,
            value=identity.address,
            sentence=f"answers for federation {answer.federation!r}, not {identity.federation!r}",
        )
        return
    yield Check(name="coordinator", ok=True, value=f"{identity.federation}, {identity.address}")
    yield clock_check(answer.time, before, after)
    yield version_check(answer.version, version())


def clock_check(theirs: float, before: float, after: float) -> Check:
    """Compare the coordinator's clock with this machine's just before and after the answer."""
    ahead = max(before - theirs, 0.0) - max(theirs - after, 0.0)  # 0: it fits in between
    value = f"{ahead:+.1f} s"
    if -CLOCK_BEHIND_S <= ahead <= CLOCK_AHEAD_S:
        return Check(name="clock", ok=True, value=value)
    way = "ahead of" if ahead > 0 else "behind"
    return Check(
        name="clock",
        ok=False,
        value=value,
        sentence=f"this machine's clock is {abs(ahead):.0f} s {way} the coordinator's: set it, "
        "for example with `timedatectl set-ntp true`; messages of a wrong clock are refused",
    )


def version_check(theirs: str, ours: str) -> Check:
    """Compare the releases of both sides."""
    if theirs == ours:
        return Check(name="version", ok=True, value=ours)
    return Check(
        name="version",
        ok=False,
        value=ours,
        sentence=f"the coordinator has {theirs}, this site {ours}: runs name the software they "
        f"were approved with; install anabranch=={theirs}, or ask the operator to update",
    )


def code(identity: Identity) -> Check:
    """Compare the sources that are installed with those the coordinator named."""
    digest = code_digest()
    if version() != identity.coordinator.version:
        value = f"{digest[:16]}, another release than when this site joined"
        return Check(name="code", ok=True, value=value)  # each run names the one that it needs
    if app_hash(digest) == identity.app:
        return Check(name="code", ok=True, value=digest[:16])
    return Check(
        name="code",
        ok=False,
        value=digest[:16],
        sentence=f"the sources of anabranch {version()} that are installed here are not those of "
        "the coordinator: install the release anew, unchanged",
    )


def libraries() -> Check:
    """Find the libraries that training needs."""
    found = []
    for name in ("torch", "flwr"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            return Check(
                name="libraries",
                ok=False,
                value=f"no {name}",
                sentence=f'{name} is not installed: pip install "anabranch[client]"',
            )
    return Check(name="libraries", ok=True, value=", ".join(found))


def certificate(identity: Identity, now: float) -> Check:
    """Look at the certificate's time and the key's mode."""
    try:
        begin = identity.certificate().not_valid_before_utc.timestamp()
        left = (identity.expires - now) / DAY_S
        _ = identity.key_file
    except AnabranchError as error:
        return failed("certificate", "cannot be used", error)
    if begin > now:
        return Check(
            name="certificate",
            ok=False,
            value="not valid yet",
            sentence="this machine's clock is before the certificate's first second: set the clock",
        )
    if left <= 0:
        return Check(
            name="certificate",
            ok=False,
            value=f"ended {-left:.0f} days ago",
            sentence="the certificate has expired; if the clock is right, ask for a new "
            "invitation, then `anabranch site leave --offline` and `anabranch site join`",
        )
    return Check(name="certificate", ok=True, value=f"{left:.0f} days left, renewed by itself")


def folder(folder: Path) -> Check:
    """Try to write in the site's folder."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight."):
            pass
    except OSError as error:
        return Check(
            name="folder",
            ok=False,
            value=str(folder),
            sentence=f"{folder}: {error.strerror}; the agent's user must be able to write there",
            private=True,
        )
    return Check(name="folder", ok=True, value="can be written")


def disk(folder: Path) -> Check:
    """Look for room for what a site keeps."""
    return space_check("disk", shutil.disk_usage(folder).free, DISK_BYTES, str(folder))


def temporary() -> Check:
    """Look for room for what a run needs for a while."""
    place = tempfile.gettempdir()
    return space_check("temporary", shutil.disk_usage(place).free, TEMPORARY_BYTES, place)


def space_check(name: str, free: int, needed: int, place: str) -> Check:
    """Compare free bytes with what is needed."""
    if free >= needed:
        return Check(name=name, ok=True, value=f"{size(free)} free")
    return Check(
        name=name,
        ok=False,
        value=f"{size(free)} free",
        sentence=f"{place}: {size(free)} free, at least {size(needed)} are needed: make room",
        private=True,
    )


def memory() -> Check:
    """Look for memory, within the limits of a container."""
    left = machine.memory_bytes()
    if left is None:
        return Check(name="memory", ok=True, value="not known on this system")
    return memory_check(left)


def memory_check(left: int) -> Check:
    """Compare the memory that is left with what the smallest run needs."""
    if left >= MEMORY_BYTES:
        return Check(name="memory", ok=True, value=f"{size(left)} free")
    return Check(
        name="memory",
        ok=False,
        value=f"{size(left)} free",
        sentence=f"{size(left)} of memory free, at least {size(MEMORY_BYTES)} are needed: end "
        "other programs, or raise the limit of the container",
    )


def cores() -> Check:
    """Count the CPUs, within the limits of a container."""
    count = machine.cores()
    return Check(name="cores", ok=True, value=f"{count:g}")


def gpu(file: SiteFile) -> Check:
    """Look for a CUDA device; none is fine unless site.toml asks for one."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        value = f"{torch.cuda.get_device_name()}, {size(free)} of {size(total)} free"
        return Check(name="gpu", ok=True, value=value)
    if file.device == "cuda":
        return Check(
            name="gpu",
            ok=False,
            value="none",
            sentence='device = "cuda" in site.toml, but torch sees no CUDA device: install a CUDA '
            'build of torch and the driver, or set device = "cpu"',
        )
    return Check(name="gpu", ok=True, value='none, and site.toml has device = "cpu"')


def ledger(folder: Path, file: SiteFile) -> Check:
    """Open the privacy ledger as a round would, without writing."""
    try:
        ledger = ledger_of(folder, file)
        state = ledger.state() if ledger.path.exists() else None
    except (AnabranchError, OSError, sqlite3.Error) as error:
        return failed("ledger", "cannot be used", error, private=True)
    return Check(
        name="ledger", ok=True, value="none yet" if state is None else f"{state.count} events"
    )


def policy(folder: Path, identity: Identity) -> Check:
    """Read policy.toml; it must know the federation that this site joined."""
    try:
        allowed = read_policy(folder).coordinators
    except AnabranchError as error:
        return failed("policy", "cannot be read", error, private=True)
    if identity.coordinator.authority not in allowed:
        return Check(
            name="policy",
            ok=False,
            value="another federation's",
            sentence=f"policy.toml does not allow the federation {identity.federation!r}: add "
            f'"{identity.coordinator.authority}" to coordinators',
            private=True,
        )
    return Check(name="policy", ok=True, value="policy.toml allows this federation")


def failed(name: str, value: str, error: Exception, *, private: bool = False) -> Check:
    """Return the finding for an error."""
    return Check(
        name=name,
        ok=False,
        value=value,
        sentence=str(error) or type(error).__name__,
        private=private,
    )


def size(count: int) -> str:
    """Return a number of bytes for people."""
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.0f} MiB"
