"""policy.toml: what the owner of a site allows. It stays at the site and fails closed.

A missing file, one that cannot be read, one that others may write, and an unknown or wrong value
all mean: nothing is allowed. It is read anew for every message, so a change counts at once.
docs/policy.md says what each value refuses, and with which sentence.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from anabranch.client.policy.hours import Hours, parse_hours
from anabranch.protocols.config import not_finite
from anabranch.protocols.errors import ConfigError, PolicyError
from anabranch.protocols.identity.proposal import Hex
from anabranch.protocols.tables import Count, Name, Positive

FILE = "policy.toml"
PRIVATE = 0o600
MAX_FILE = 1 << 20  # bytes
MAX_RUNS = 100
JSON_BYTES = 8 << 20  # beside the adapter: the assignment, and what Flower puts around both

Same = Literal["author", "version", "code", "config", "base", "contract"]
Delta = Annotated[float, msgspec.Meta(gt=0, lt=0.1)]


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[[approval.rules]]: what is approved because something like it was, by a person.

    What that means beyond these values: by_rule.py.
    """

    name: Name
    like: Hex  # digest of a proposal that is approved here; withdrawn, the rule ends
    same: tuple[Same, ...] = ("author", "code", "base", "contract")  # must be equal in both
    max_runs: Annotated[int, msgspec.Meta(ge=1, le=MAX_RUNS)] = 10  # that it may let in
    max_rounds: Count | None = None  # None: as many as the run that it is like
    epsilon_max: Positive | None = None  # of a run with privacy; None: as that run has it


class Approval(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[approval]: who decides on a run."""

    mode: Literal["each run", "by rule"] = "each run"
    rules: tuple[Rule, ...] = ()


class Privacy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[privacy]: what a run must promise before it trains here."""

    required: bool = True
    unit: Literal["record", "client", "both"] = "record"
    epsilon_max: Positive = 8.0
    delta_max: Delta = 1e-5


class Cohort(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[cohort]: among how many others a delta goes."""

    minimum: Count = 3
    secure_aggregation: Literal["required", "optional"] = "optional"
    threshold: Annotated[float, msgspec.Meta(ge=0.5, lt=1)] = 0.5  # share that must agree to open
    colluding: Annotated[float, msgspec.Meta(ge=0, lt=0.5)] = 0.0  # share it must hold against
    new_peers: Literal["accept", "refuse"] = "accept"  # on the roster of a run that was approved


class Times(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[hours]: when."""

    open: tuple[str, ...] = ()  # none: at any time
    zone: str = "UTC"


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[limits]: how much of this machine one run may have."""

    max_rounds: Count = 200
    max_minutes_per_round: Positive = 60.0
    max_minutes_total: Positive = 3000.0
    cores: Count | None = None  # None: all
    memory_mb: Count | None = None  # MiB of the process; None: all
    max_mb_down_per_round: Positive = 256.0  # MB are 10^6 bytes
    max_mb_down_total: Positive = 20_000.0
    max_mb_up_per_round: Positive = 256.0
    max_mb_up_total: Positive = 20_000.0

    @property
    def message_bytes(self) -> int:
        """Return the most bytes that a message may have: it is refused before it is fetched."""
        return int(self.max_mb_down_per_round * 1e6) + JSON_BYTES


class Data(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[data]: what of the records."""

    columns_never: tuple[str, ...] = ()


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """policy.toml."""

    coordinators: tuple[Hex, ...]  # fingerprints of the authorities whose coordinators may ask
    authors: dict[Name, Hex]  # who may propose runs: name -> Ed25519 public key
    approval: Approval = Approval()
    privacy: Privacy = Privacy()
    cohort: Cohort = Cohort()
    hours: Times = Times()
    limits: Limits = Limits()
    data: Data = Data()

    @property
    def opening(self) -> Hours:
        """Return [hours], parsed."""
        return parse_hours(self.hours.open, self.hours.zone)


def parse_policy(text: bytes | str, *, source: str) -> Policy:
    """Return the policy in TOML. Raises PolicyError naming `source` and the value."""
    try:
        policy = msgspec.toml.decode(text, type=Policy)
        _check(policy)
    except (msgspec.DecodeError, UnicodeDecodeError, ConfigError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else error
        raise PolicyError(f"{source}: {problem}; until it is mended, nothing is allowed") from None
    return policy


def read_policy(folder: Path) -> Policy:
    """Return the policy of the site in `folder`. Raises PolicyError: then nothing is allowed."""
    return parse_policy(read_private(folder / FILE), source=FILE)


def policy_digest(folder: Path) -> str:
    """Return the SHA-256 of policy.toml, hex: which policy an entry of the audit log was under."""
    return hashlib.sha256(read_private(folder / FILE)).hexdigest()


def columns_never(folder: Path) -> frozenset[str]:
    """Return the columns of a site's records that nobody may read; none without a policy.toml.

    Raises PolicyError for a policy.toml that cannot be trusted.
    """
    if not (folder / FILE).exists():
        return frozenset()  # no owner's rules: a simulated site
    return frozenset(read_policy(folder).data.columns_never)


def read_private(path: Path, limit: int = MAX_FILE) -> bytes:
    """Return the bytes of a file that its owner alone may write.

    Raises PolicyError, naming the file without its folder, if it is missing, too large or no
    plain file, belongs to another user, or could be written or replaced by others.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as file:
            _require_owned(os.fstat(file.fileno()), path.name, stat.S_ISREG)
            _require_owned(path.parent.stat(), f"the folder of {path.name}", stat.S_ISDIR)
            data = file.read(limit + 1)
    except OSError as error:
        raise PolicyError(
            f"{path.name}: {error.strerror or error}; until it can be read, nothing is allowed"
        ) from None
    if len(data) > limit:
        raise PolicyError(f"{path.name}: larger than {limit} bytes; nothing is allowed")
    return data


def default_policy(coordinators: Mapping[str, str], authors: Mapping[str, str]) -> str:
    """Return DEFAULT_POLICY for federations (name -> fingerprint) and authors (name -> key)."""
    return DEFAULT_POLICY.format(
        coordinators="".join(f'    "{key}",  # {name}\n' for name, key in coordinators.items()),
        authors="".join(f'"{name}" = "{key}"\n' for name, key in sorted(authors.items())),
    )


def _require_owned(status: os.stat_result, what: str, is_kind: Callable[[int], bool]) -> None:
    """Raise PolicyError unless this user or root owns it and nobody else may write to it."""
    if not is_kind(status.st_mode):
        raise PolicyError(f"{what}: not what it should be; nothing is allowed")
    if os.name != "posix":
        return  # modes say nothing there
    if status.st_uid not in (0, os.geteuid()):
        raise PolicyError(f"{what}: belongs to another user; nothing is allowed until it is yours")
    if status.st_mode & 0o022:
        raise PolicyError(
            f"{what}: other users may write to it (mode {stat.S_IMODE(status.st_mode):o}); nothing "
            "is allowed until `chmod go-w`"
        )


def _check(policy: Policy) -> None:
    """Raise ConfigError for what single values cannot say."""
    if (unbounded := not_finite(policy)) is not None:
        raise ConfigError(f"{unbounded}: expected a finite number")
    parse_hours(policy.hours.open, policy.hours.zone)
    approval = policy.approval
    if approval.rules and approval.mode != "by rule":
        raise ConfigError('approval.rules count only with approval.mode = "by rule"')
    if len({rule.name for rule in approval.rules}) != len(approval.rules):
        raise ConfigError("approval.rules: every rule needs a name of its own")
    for rule in approval.rules:
        if not {"author", "contract"} <= set(rule.same):
            raise ConfigError(
                f'approval.rules: {rule.name}: `same` must hold "author" and "contract"'
            )


DEFAULT_POLICY = """\
# What this site allows. It is read anew for every message; whatever it does not allow is refused,
# whoever asks. A mistake in this file refuses everything. docs/policy.md explains every value;
# `anabranch site policy` shows what is in force, `site policy check RUN.toml` tries a run on it.

coordinators = [  # SHA-256 of the authority's certificate, of every federation that may ask
{coordinators}]

[authors]  # who may propose runs, and with which key (Ed25519)
{authors}
[approval]
mode = "each run"  # you approve every run: `anabranch site policy list`, then `approve DIGEST`
# mode = "by rule"     # or: what is like a run that you approved, and no weaker, needs no answer
# [[approval.rules]]
# name = "same-study"
# like = "…"           # the digest of the run that you approved, all 64 digits
# same = ["author", "code", "base", "contract"]
# max_runs = 10
# max_rounds = 50
# epsilon_max = 2.0

[privacy]
required = true    # false: also runs whose deltas can tell about single records
unit = "record"    # or "client", "both"; "client" trusts the coordinator to add the noise
epsilon_max = 8.0  # of the whole run
delta_max = 1e-5   # the run must state a delta

[cohort]
minimum = 3                      # secure_aggregation.minimum; without it, federation.quorum
secure_aggregation = "optional"  # "required": the coordinator may see sums of updates alone
threshold = 0.5                  # share of the sites of a sum that must agree before it is opened
colluding = 0.0                  # share of them that may side with the coordinator, and it holds
new_peers = "accept"             # sites that are new on an approved roster; "refuse": add them

[hours]
open = []     # none: at any time; or ["Mon-Fri 20:00-06:00", "Sat,Sun 00:00-24:00"]
zone = "UTC"  # or "Europe/Copenhagen"

[limits]  # of one run
max_rounds = 200
max_minutes_per_round = 60.0
max_minutes_total = 3000.0
# cores = 4         # all, if it is not there
# memory_mb = 8192  # MiB of the site's process
max_mb_down_per_round = 256.0  # MB are 1 000 000 bytes
max_mb_down_total = 20000.0
max_mb_up_per_round = 256.0
max_mb_up_total = 20000.0

[data]
columns_never = []  # columns of the records that no run may read
"""
