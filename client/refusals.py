"""What leaves a site where something is wrong with its records, or training fails on them.

Of training that failed, or of the frozen layers before it, by what the run promises (`Tells`):

    all       the error as it is: a run that hides no update
    sentence  FAILED for values that are not finite, else the type of the error: a sum
              hides the update, but not that there is none
    nothing   an update of zeros, kept, reported and charged as any other: the members make the
              noise of the sum, and a refusal would tell a bit of the records without noise

A coordinator chooses the model and the data contract. It may choose them so that a site fails if,
and only if, a record is beyond some bound. So what exactly is wrong is for the site's log, unless
the run hides nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from anabranch.client.site_file import Budget
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import AnabranchError, DataError, RunError

Tells = Literal["all", "sentence", "nothing"]

FAILED = (
    "training came to values or a loss that are not finite, and nothing is sent; the site's log "
    "says more"
)
MACHINE = (  # what Python and torch raise, and records may bring about: by a length, a word, a size
    ArithmeticError,
    AssertionError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)  # no AnabranchError is one of them: a stop by the owner, or privacy that fails, passes through

log = logging.getLogger(__name__)


def tells(config: RunConfig) -> Tells:
    """Return what may leave of a round of this run that failed on records."""
    if config.secure_aggregation is None:
        return "all"
    together = config.privacy is not None and config.privacy.noise == "distributed"
    return "nothing" if together or config.client_privacy is not None else "sentence"


def failures(telling: Tells, *of_training: type[Exception]) -> tuple[type[Exception], ...]:
    """Return which errors are caught in training: `of_training`, and where nothing is told more.

    Of what the frozen layers say of the records as well. Elsewhere an error that nobody foresaw is
    raised, and its type leaves (flower.py).
    """
    return (*of_training, *MACHINE) if telling == "nothing" else of_training


def excuse(site: str, telling: Tells, error: Exception) -> None:
    """Log why a round of `site` failed, and return if it counts as zeros.

    Else raise what may leave: the error, or RunError with FAILED.
    """
    if telling == "all":
        raise error
    if telling == "sentence":
        log.error("%s: %s", site, error)
        raise RunError(FAILED) from None
    unexpected = None if isinstance(error, AnabranchError) else error
    log.error("%s: its update counts as zeros: %s", site, error, exc_info=unexpected)


# the data contract


def explains(config: RunConfig, budget: Budget | None) -> bool:
    """Return whether the coordinator of this run may read what is wrong with the records.

    Not in a run that hides records, updates or clients from it, nor at a site with a [budget].
    """
    hides = (config.privacy, config.client_privacy, config.secure_aggregation, budget)
    return all(one is None for one in hides)


def outside(error: DataError, data: Path) -> str:
    """Return what the coordinator may read of a broken contract where it is explained."""
    return str(error).replace(str(data), "records")  # where files lie is not told


def kept_back(error: Exception, name: str) -> str:
    """Return what it may read where it is not explained; the log of site `name` has all of it.

    Whoever writes the contract could find out a cell by asking again and again with other
    bounds: it learns that something is wrong and no more.
    """
    unexpected = None if isinstance(error, AnabranchError) else error
    log.error("%s: %s", name, error, exc_info=unexpected)
    return (
        "the records do not keep the data contract of this run; at the site, `anabranch site "
        "check` lists what is wrong"
    )


def without_folders(text: str, folders: Iterable[Path]) -> str:
    """Return an error's text without these folders, however they are written: it is sent on."""
    for folder in folders:
        for way in {folder, folder.absolute(), folder.resolve()}:
            text = text.replace(f"{way}{os.sep}", "")
    return text
