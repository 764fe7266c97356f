"""Adapters between formats: what is written is what is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from anabranch.client.tuning import adapter_files as files
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.lora import read_adapter
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import ConfigError, IncompatibleAdapter, ModelError
from tests.runs import TEXT_RUN, table_run, table_text


def adapter(seed: int = 3) -> Adapter:
    start = read_adapter(load_classifier(table_run(("seed = 3", f"seed = {seed}"))))
    rng = np.random.default_rng(seed)
    return Adapter(
        start.spec, {n: rng.normal(size=s).astype(np.float32) for n, s in start.spec.tensors}
    )


def test_a_frame_and_a_peft_folder_hold_the_same_adapter(tmp_path: Path) -> None:
    value = adapter()
    files.write_any(tmp_path / "a.adapter", value)

    files.convert(tmp_path / "a.adapter", tmp_path / "peft")
    files.convert(tmp_path / "peft", tmp_path / "b.adapter")

    assert (tmp_path / "a.adapter").read_bytes() == (tmp_path / "b.adapter").read_bytes()
    assert files.read_any(tmp_path / "peft").spec == value.spec


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    files.write_any(tmp_path / "a.adapter", adapter())

    with pytest.raises(ConfigError, match=r"a\.adapter exists: .* nothing is overwritten"):
        files.write_any(tmp_path / "a.adapter", adapter())


def test_difference_is_zero_with_itself_and_exact_otherwise() -> None:
    value = adapter()
    name = value.spec.tensors[0][0]
    moved = {n: a + np.float32(0.5) * (n == name) for n, a in value.arrays.items()}

    same = files.difference(value, value)
    other = files.difference(Adapter(value.spec, moved), value)

    assert same["max"] == 0.0
    assert other["max"] == pytest.approx(0.5, rel=1e-5)
    assert [t["max"] > 0 for t in other["tensors"]] == [n == name for n in value.arrays]


def test_adapters_of_two_bases_cannot_be_compared() -> None:
    with pytest.raises(IncompatibleAdapter, match="adapter is for base model"):
        files.difference(adapter(3), adapter(4))


def test_merge_writes_w_plus_s_b_a_and_the_head(tmp_path: Path) -> None:
    value = adapter()
    files.write_any(tmp_path / "a.adapter", value)
    (tmp_path / "run.toml").write_text(table_text())
    base = load_classifier(table_run()).base.get_submodule("hidden.1").base.weight.numpy()  # type: ignore[union-attr, operator]

    files.merge_into(tmp_path / "merged", tmp_path / "a.adapter", tmp_path / "run.toml")

    merged = safetensors.numpy.load((tmp_path / "merged" / "model.safetensors").read_bytes())
    b, a = (value.arrays[f"hidden.1.lora_{x}.weight"] for x in "BA")
    np.testing.assert_allclose(merged["hidden.1.weight"], base + 2.0 * b @ a, atol=1e-5)
    np.testing.assert_array_equal(merged["head.weight"], value.arrays["head.weight"])


def test_merge_refuses_an_adapter_for_another_base(tmp_path: Path) -> None:
    files.write_any(tmp_path / "a.adapter", adapter())
    (tmp_path / "run.toml").write_text(TEXT_RUN)

    with pytest.raises(IncompatibleAdapter, match="adapter is for base model"):
        files.merge_into(tmp_path / "merged", tmp_path / "a.adapter", tmp_path / "run.toml")

    assert not (tmp_path / "merged").exists()


def test_a_path_without_an_adapter_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"expected a \*\.adapter file or a PEFT folder"):
        files.read_any(tmp_path / "nothing")
