"""[secure_aggregation] in run.toml: what goes with it, and what is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from anabranch.protocols.config import RunConfig, parse
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.secagg.graph import shape_of
from tests.runs import TABLE_RUN

DOC = Path(__file__).parents[2] / "docs" / "secure-aggregation.md"


def config(federation: str = "", secure: str = "", more: str = "") -> RunConfig:
    text = TABLE_RUN.replace("[federation]", f"[federation]\n{federation}")
    return parse(f"{text}\n[secure_aggregation]\n{secure}\n{more}", source="run.toml")


@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"federation": 'method = "fedavg"\nproximal_mu = 0.1'},
        {"federation": 'method = "fedavg"\nnormalize_steps = true'},
        {"federation": 'method = "altqr"\nmixed_ranks = true'},
        {"federation": 'method = "ffa"', "more": "[server]\nlearning_rate = 0.1"},
        {"federation": 'method = "fedsa"'},
        {
            "federation": 'weighting = "uniform"',
            "secure": "group = 3",
            "more": '[robust]\nrule = "median"',
        },
        {"secure": "threshold = 0.5\ncolluding = 0.0"},
        {"more": "[personal]\nrank = 2"},
        {"secure": "ring = 16\nvalue_bits = 12"},
        {
            "federation": 'weighting = "uniform"\ncohort = 20',
            "secure": "ring = 16",  # noise has a grid of its own
            "more": "[client_privacy]\nepsilon = 8.0\npopulation = 100",
        },
    ],
)
def test_what_a_sum_is_enough_for_is_taken(tables: dict[str, Any]) -> None:
    assert config(**tables).secure_aggregation is not None


@pytest.mark.parametrize(
    ("tables", "why"),
    [
        ({"federation": 'method = "flora"'}, 'federation.method = "flora"'),
        ({"federation": 'method = "fedex"'}, 'federation.method = "fedex"'),
        ({"federation": 'method = "flexlora"'}, 'federation.method = "flexlora"'),
        ({"federation": 'method = "hetlora"'}, 'federation.method = "hetlora"'),
        ({"federation": 'method = "fedavg"\nmixed_ranks = true'}, "mixed_ranks"),
        ({"federation": 'method = "ffa"\nbuffer = 3'}, "federation.buffer"),
        ({"more": '[uplink]\ncodec = "int8"'}, 'uplink.codec = "int8"'),
        ({"more": '[uplink]\ncodec = "top-k"'}, 'uplink.codec = "top-k"'),
        ({"more": "[uplink]\nerror_feedback = true"}, "error_feedback"),
        ({"more": '[robust]\nrule = "median"'}, "[robust] alone"),
        ({"secure": "group = 3"}, "group is for [robust]"),
        ({"secure": "group = 2", "more": '[robust]\nrule = "median"'}, "groups of 2"),
        (
            {"secure": "group = 3", "more": '[robust]\nrule = "median"'},
            'group needs federation.weighting = "uniform"',
        ),
        (
            {
                "federation": 'method = "ffa"\ncohort = 40',
                "secure": "group = 4",
                "more": '[robust]\nrule = "median"',
            },
            "4 of 40 members may collude, all of them in one group, and secure_aggregation.minimum "
            "= 3 who do not must be in it: a group of 4 is too small. Set group to 7 or more",
        ),
        ({"federation": "cohort = 2"}, "federation.cohort: 2 sites"),
        ({"secure": "threshold = 0.5"}, "threshold = 0.5 does not hold"),
        ({"secure": "ring = 16"}, "values of 20 bits from 3 members overflow a ring of 16 bits"),
        (
            {"federation": "cohort = 40", "secure": "ring = 16\nvalue_bits = 12"},
            "values of 12 bits from 40 members overflow a ring of 16 bits",
        ),
        ({"secure": "range = 1e-40"}, "secure_aggregation.range between"),
    ],
)
def test_what_needs_more_than_a_sum_is_refused_by_name(tables: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        config(**tables)


@pytest.mark.parametrize("field", ["minimum = 1", "threshold = 0.4", "threshold = 1.0", "ring = 8"])
def test_what_no_sum_can_have_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field.split()[0]):
        config(secure=field)


def test_the_documents_thresholds_are_those_of_the_graph() -> None:
    table = DOC.read_text().split("<!-- thresholds -->")[1].split("<!-- /thresholds -->")[0]
    rows = re.findall(r"\| (\d+) \| (\d+) \| (\d+) of (\d+) \| (\d+) \|", table)
    assert len(rows) == 12

    for members, degree, threshold, holders, lost in (map(int, row) for row in rows):
        shape = shape_of(members, 2 / 3, 0.1)
        assert (shape.holders - 1, shape.threshold, shape.holders) == (degree, threshold, holders)
        assert lost == (members - threshold if shape.complete else members // 10)
