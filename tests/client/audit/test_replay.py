"""Replays of every kind of private run: clipping modes, engines, methods that train a part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from anabranch.client.audit.record import SiteFound, audit_site, checks_of, report_of
from anabranch.client.audit.replay import replay, replays_of
from anabranch.client.audit.report import TESTS, level_for
from anabranch.client.tuning.lora import read_adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PrivacyError
from anabranch.server.audit import _parts
from tests.client.audit.audit_rig import fix_keys, subject
from tests.runs import table_run, write_table


def config(*, method: str = "fedavg", privacy: str = "", federation: str = "") -> RunConfig:
    return table_run(
        ("batch_size = 8", "batch_size = 12\nlocal_steps = 4"),
        ("rounds = 2", f'rounds = 3\nmethod = "{method}"\n{federation}'),
        extra=f"\n[privacy]\nepsilon = 4.0\n{privacy}\n",
    )


RUNS = {
    "flat": config(),
    "automatic": config(privacy='clipping = "automatic"'),
    "per-layer": config(privacy='clipping = "per-layer"'),
    "adaptive": config(privacy='clipping = "adaptive"'),
    "opacus": config(privacy='engine = "opacus"'),
    "altqr": config(method="altqr"),  # A and B in turn
    "fedsa": config(method="fedsa"),  # B stays at the site, and is trained with A
    "flora": config(method="flora"),  # ranks of the residual are frozen
    "hetlora": config(method="hetlora", federation="mixed_ranks = true"),  # rank 2 of 3 here
    "fedprox": config(federation="proximal_mu = 0.5"),
}


@pytest.mark.parametrize("name", RUNS)
def test_an_honest_run_of_every_kind_passes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_keys(monkeypatch, 0)
    data = write_table(tmp_path / "a.csv", n=60)
    site = SiteFound(name="a", data=data, max_rank=2 if name == "hetlora" else None)
    run, level = RUNS[name], level_for(1)

    result = audit_site(
        site,
        run,
        _parts(run, site),
        canaries=60,
        rng=np.random.default_rng(0),
        level=level,
        final=None,
        recorded={},
    )
    part = report_of(result, level)

    assert [row.name for row in part.checks if not row.passed] == []
    assert len(checks_of(result)) <= TESTS
    assert part.steps == 12
    assert part.bound.canaries == 60
    assert sum(len(fit.drawn) for fit in result.replays[0].fits) == 12


def test_one_replay_holds_no_more_canaries_than_values_move() -> None:
    of = subject()
    values = len(of.trained(1)[0])

    assert replays_of(of, values) == [values]
    assert replays_of(of, 2 * values + 1) == [values, values, 1]


def test_a_replay_puts_the_adapter_back_and_draws_fresh_noise() -> None:
    of = subject()

    one, other = (replay(of, 40, np.random.default_rng(1)) for _ in range(2))

    assert (one.included == other.included).all()  # the coins are the seed's
    assert not np.array_equal(one.scores, other.scores)  # the noise is not
    back = read_adapter(of.classifier)
    assert all(np.array_equal(a, back.arrays[name]) for name, a in of.start.arrays.items())


def test_a_run_without_a_record_level_claim_is_refused(tmp_path: Path) -> None:
    site = SiteFound(name="a", data=write_table(tmp_path / "a.csv", n=60))
    run = table_run()

    with pytest.raises(PrivacyError, match="no record-level claim"):
        audit_site(
            site,
            run,
            _parts(run, site),
            canaries=10,
            rng=np.random.default_rng(0),
            level=0.01,
            final=None,
            recorded={},
        )
