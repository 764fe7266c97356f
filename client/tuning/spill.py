"""A second tier of memory: a memory-mapped file of bounded size.

Tensors are written once, one after the other, and read as views of the mapping, bit for bit what
was written; the system keeps in memory what is read often and takes it back when it needs room.
The file has no name: it is gone when it is closed, or its process ends in whatever way.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from anabranch.protocols.errors import RunError


class SpillFile:
    """At most `limit_bytes` of tensors in a file in `folder`, which is made when first needed."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise ValueError(f"expected limit_bytes >= 0, got {limit_bytes}")
        self.folder, self.limit_bytes = folder, limit_bytes
        self.used_bytes = 0
        self._descriptor = -1
        self._release: weakref.finalize[..., SpillFile] | None = None
        self._whole: Tensor | None = None

    @property
    def whole(self) -> Tensor:
        """Return the mapping, uint8 (limit_bytes,); what nobody wrote to is zero."""
        if self._whole is None:
            self._open()
        assert self._whole is not None  # _open sets it
        return self._whole

    def append(self, tensor: Tensor) -> int | None:
        """Write `tensor` behind what is there; return its first byte, None if it does not fit.

        Raises RunError if the disk is full: nothing is kept then.
        """
        size = tensor.numel() * tensor.element_size()
        if self.limit_bytes == 0 or self.used_bytes + size > self.limit_bytes:
            return None
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        if self._whole is None:
            self._open()
        at = self.used_bytes
        try:  # written, not stored through the mapping: a full disk is an error, not a signal
            done = 0
            while done < size:
                done += os.pwrite(self._descriptor, data[done:].data, at + done)
        except OSError as error:
            raise self._failed(error) from error
        self.used_bytes += size
        return at

    def view(self, at: int, like: Tensor) -> Tensor:
        """Return the tensor at byte `at`, of the shape and type of `like`."""
        size = like.numel() * like.element_size()
        return self.whole[at : at + size].view(like.dtype).view(like.shape)

    def close(self) -> None:
        """Delete the file; views that somebody holds stay readable until they are dropped."""
        if self._release is not None:
            self._release()
        self._release, self._whole, self.used_bytes = None, None, 0

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as file:  # has no name, or loses it
                file.truncate(self.limit_bytes)  # holes: costs no room before it is written
                mapped = mmap.mmap(file.fileno(), self.limit_bytes)
                self._descriptor = os.dup(file.fileno())
        except OSError as error:
            raise self._failed(error) from error
        self._release = weakref.finalize(self, os.close, self._descriptor)
        self._whole = torch.frombuffer(mapped, dtype=torch.uint8)

    def _failed(self, error: OSError) -> RunError:
        return RunError(
            f"activations cannot be written to {self.folder}: {error.strerror}. Make room there, "
            "or give another folder or fewer bytes for what does not fit into memory"
        )
