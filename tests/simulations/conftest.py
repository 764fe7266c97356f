"""What Ray leaves behind it."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture
def ray_leftovers() -> Iterator[None]:
    """Ray ends its processes and does not wait for them: let its objects go in here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()
