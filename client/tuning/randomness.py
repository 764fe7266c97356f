"""The random numbers of protocols/randomness.py, and for tests such as can be drawn again."""

from __future__ import annotations

import torch

from anabranch.protocols import randomness
from anabranch.protocols.randomness import KEY_BYTES


class Randomness(randomness.Randomness):
    """A stream of numbers that nobody without the key can predict."""

    @classmethod
    def reproducible(cls, generator: torch.Generator) -> Randomness:
        """Return a stream decided by `generator`: for tests, whoever knows the seed knows all."""
        return cls(bytes(torch.randint(256, (KEY_BYTES,), generator=generator).tolist()))
