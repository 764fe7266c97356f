"""Which precisions are accurate enough to be shipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from anabranch.edge.export.accuracy import measured_on, torch_accuracy
from anabranch.edge.export.bundle import PRECISIONS
from anabranch.protocols.errors import (
    ReleaseError,
)
from tests.edge.made import RECORDS, Made, said_by

KINDS = ("text", "image", "tabular")
Bundles = Callable[[str], Made]


def judge(one: Made, truth: float, int4: float = 1.0) -> Any:
    """Measure a bundle again, on records for which torch is always right."""
    labels = said_by(one.classifier, one.inputs).argmax(1)
    allowed: Any = {"int8": 1.0, "int4": int4}
    return measured_on(one.folder, PRECISIONS, one.inputs, labels, truth=truth, allowed=allowed)


def test_a_precision_that_loses_more_than_allowed_is_refused(made: Bundles) -> None:
    measured = judge(made("image"), 1.0)
    loss = measured["fp32"].accuracy - measured["int4"].accuracy
    assert loss > 0
    assert judge(made("image"), 1.0, int4=loss)["int4"].accuracy == measured["int4"].accuracy
    with pytest.raises(
        ReleaseError, match=rf"int4 loses {loss:.4f} of accuracy on {RECORDS} held-out records, 0"
    ):
        judge(made("image"), 1.0, int4=0.0)


@pytest.mark.parametrize("records", [1.4, -1.4])
def test_one_record_that_ties_break_differently_on_is_no_reason(
    made: Bundles, records: float
) -> None:
    assert judge(made("tabular"), 1 + records / RECORDS)["fp32"].accuracy == 1


@pytest.mark.parametrize("records", [1.6, -1.6])
def test_fp32_that_is_not_as_accurate_as_torch_is_refused(made: Bundles, records: float) -> None:
    truth = 1 + records / RECORDS
    with pytest.raises(
        ReleaseError,
        match=rf"accuracy 1\.0000 on {RECORDS} held-out records, torch {truth:.4f}: the export is",
    ):
        judge(made("tabular"), truth)


def test_torch_accuracy_is_the_share_that_torch_gets_right(made: Bundles) -> None:
    for kind in KINDS:
        one = made(kind)
        predicted = said_by(one.classifier, one.inputs).argmax(1)
        share = torch_accuracy(one.classifier, one.inputs, one.labels)
        assert math.isclose(share, (predicted == one.labels).mean(), abs_tol=1.01 / RECORDS)
        assert torch_accuracy(one.classifier, one.inputs, (predicted + 1) % 3) == 0
