import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.client.tuning.spill import SpillFile
from anabranch.protocols.errors import RunError


@given(sizes=st.lists(st.integers(1, 9), max_size=12), limit=st.integers(0, 200))
def test_what_is_kept_is_read_bit_for_bit_and_never_beyond_the_limit(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int
) -> None:
    file = SpillFile(tmp_path_factory.mktemp("spill"), limit)
    tensors = [torch.randn(n, 3) for n in sizes]
    kept = []
    for tensor in tensors:
        before = file.used_bytes
        at = file.append(tensor)
        assert (at is None) is (before + tensor.numel() * 4 > limit)
        assert file.used_bytes <= limit
        if at is not None:
            kept.append((at, tensor))

    assert all(torch.equal(file.view(at, tensor), tensor) for at, tensor in kept)
    assert list(file.folder.iterdir()) == []  # it has no name
    file.close()


def test_the_file_is_made_when_first_needed_and_gone_when_closed(tmp_path: Path) -> None:
    file = SpillFile(tmp_path / "a" / "b", 64)
    assert not (tmp_path / "a").exists()
    at = file.append(torch.ones(4))
    assert at == 0
    view = file.view(at, torch.ones(4))
    descriptor = file._descriptor
    assert os.fstat(descriptor).st_nlink == 0

    file.close()

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert torch.equal(view, torch.ones(4))  # whoever holds a view may still read it
    assert file.used_bytes == 0
    assert file.append(torch.zeros(4)) == 0  # and it can be begun again
    file.close()


def test_a_full_disk_is_an_error_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = SpillFile(tmp_path, 64)

    def full(descriptor: int, data: bytes, at: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RunError, match=r"cannot be written to .*: No space left on device\. Make"):
        file.append(torch.ones(4))
    assert file.used_bytes == 0


def test_a_folder_that_cannot_be_made_and_a_negative_limit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="activations cannot be written to"):
        SpillFile(tmp_path / "file" / "folder", 64).append(torch.ones(1))
    with pytest.raises(ValueError, match="limit_bytes >= 0, got -1"):
        SpillFile(tmp_path, -1)
