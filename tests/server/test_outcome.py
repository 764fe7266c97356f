import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.messages import Trained
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import Privacy, SecureAggregation
from anabranch.server.client_privacy import published
from anabranch.server.flower import Failure
from anabranch.server.outcome import Finished, conclude, facts_of, statement_of
from anabranch.server.result import Result, RoundReport, SiteRow
from anabranch.server.statement.text import paragraphs
from anabranch.server.store import RunFolder
from tests.privacy_cases import client_config, client_plan, open_config, private_config

SPEC = AdapterSpec(
    base="b" * 64, tokenizer="", rank=0, alpha=1.0, targets=(), tensors=(("head.weight", (2, 3)),)
)
ADAPTER = Adapter(SPEC, {"head.weight": np.zeros((2, 3), np.float32)})


def trained(site: str, number: int, **changes: Any) -> Trained:
    fields: dict[str, Any] = {
        "num_examples": 200, "steps": 25, "seconds": 1.5, "epsilon": 1.0 + number / 2,
        "delta": 5e-4, "noise_multiplier": 2.32, "sample_rate": 0.16, "engine": "fast",
        "ledger": f"{number:064x}",
    }  # fmt: skip
    return Trained(site=site, **fields | changes)


def result_of(*rounds: dict[str, Trained]) -> Result:
    rows: dict[str, SiteRow] = {}
    history = []
    for number, reports in enumerate(rounds, 1):
        for name, one in reports.items():
            rows[name] = rows.get(name, SiteRow(bytes_up=700)).after(one)
        history.append(
            RoundReport(
                round=number,
                asked=("north", "south"),
                trained=reports,
                failed={"late": Failure("deadline", "no answer")},
                method="fedavg",
                update_norm=0.5,
                aggregation_error=0.25,
                delta_norms=dict.fromkeys(reports, 1.25),
                ages={},
                evaluated={},
                client={},
                coordinator={},
                bytes_up=700,
                bytes_down=900,
                seconds=1.0,
            )
        )
    return Result(
        adapter=ADAPTER, best_adapter=ADAPTER, best_round=len(rounds), history=tuple(history),
        sites=rows, bytes_up=700, bytes_down=900, seconds=2.0,
    )  # fmt: skip


def finished(config: RunConfig, result: Result, tmp_path: Path, **fields: Any) -> Finished:
    folder = RunFolder.create(tmp_path / "run", b"")
    return Finished(run="run-1", config=config, folder=folder, result=result, **fields)


def both(number: int, **changes: Any) -> dict[str, Trained]:
    return {name: trained(name, number, **changes) for name in ("north", "south")}


def test_the_facts_hold_what_every_site_said_last_and_all_its_steps(tmp_path: Path) -> None:
    first, second = both(1), {"north": trained("north", 2, engine="opacus")}
    north, south = facts_of(finished(private_config(), result_of(first, second), tmp_path)).privacy

    assert (north.epsilon, north.steps, north.engine) == (2.0, 50, "fast, opacus")
    assert north.ledger == f"{2:064x}"
    assert (south.epsilon, south.steps, south.engine) == (1.5, 25, "fast")


def test_rounds_after_a_sites_last_delta_are_stated_as_not_counted(tmp_path: Path) -> None:
    rounds = result_of(both(1), {"north": trained("north", 2)})
    run = finished(private_config(), rounds, tmp_path)

    assert [one.unheard for one in facts_of(run).privacy] == [0, 1]
    text = " ".join(paragraphs(statement_of(run)))
    assert "Not in these ε: rounds after a site's last delta" in text
    assert "by site: south (1). It may have trained in them" in text
    whole = finished(private_config(), result_of(both(1)), tmp_path / "whole")
    assert "Not in these ε" not in " ".join(paragraphs(statement_of(whole)))


def test_a_row_of_a_site_holds_the_mechanism_of_its_last_delta() -> None:
    row = result_of(both(1), both(2)).sites["north"]

    assert (row.noise_multiplier, row.sample_rate, row.steps) == (2.32, 0.16, 25)
    assert (row.engine, row.ledger, row.rounds) == ("fast", f"{2:064x}", 2)


@pytest.mark.parametrize("name", ["noise_multiplier", "sample_rate", "delta"])
def test_a_mechanism_that_changed_within_the_run_has_no_statement(
    name: str, tmp_path: Path
) -> None:
    changed = both(2) | {"south": trained("south", 2, **{name: 0.0625})}

    with pytest.raises(PrivacyError, match=r"site 'south' states 2 different \(σ, q, δ\)"):
        statement_of(finished(private_config(), result_of(both(1), changed), tmp_path))


@pytest.mark.parametrize("name", ["epsilon", "delta", "noise_multiplier", "sample_rate"])
def test_a_site_that_leaves_a_number_out_has_no_statement(name: str, tmp_path: Path) -> None:
    partial = both(1) | {"south": trained("south", 1, **{name: None})}
    run = finished(private_config(), result_of(partial), tmp_path)

    with pytest.raises(PrivacyError, match="no privacy facts of site 'south'"):
        conclude(run, test=None, validation=None, seconds=1.0)
    assert not (run.folder.path / "summary.json").exists()
    assert not (run.folder.path / "report.html").exists()


def test_summary_and_report_of_a_private_run_state_both_levels(tmp_path: Path) -> None:
    run = finished(private_config(), result_of(both(1), both(2)), tmp_path)
    summary = conclude(run, test=None, validation=None, seconds=1.0)

    assert json.loads((run.folder.path / "summary.json").read_text()) == summary
    assert summary["epsilon"] == {"north": 2.0, "south": 2.0}
    assert summary["privacy"]["record_level"]["sites"]["south"]["steps"] == 50
    assert summary["privacy"]["client_level"] is None
    page = (run.folder.path / "report.html").read_text()
    assert "Record level" in page
    assert "Client level: none." in page
    assert "ε spent per site" in page


def test_a_run_without_privacy_says_so_in_its_summary(tmp_path: Path) -> None:
    plain = {"north": Trained(site="north", num_examples=9, steps=1, seconds=1.0, loss=0.5)}
    run = finished(open_config(), result_of(plain), tmp_path)
    summary = conclude(run, test=None, validation=None, seconds=1.0)

    assert summary["privacy"]["record_level"] is summary["privacy"]["client_level"] is None
    assert "There is no differential privacy" in summary["privacy"]["statement"]


def test_a_run_of_secure_sums_says_what_was_seen_and_how_the_sums_went(tmp_path: Path) -> None:
    told = {"num_examples": 0, "steps": 0, "epsilon": None, "delta": None, "sample_rate": None,
            "noise_multiplier": None, "engine": None, "ledger": None}  # fmt: skip
    config = open_config(secure_aggregation=SecureAggregation())
    run = finished(config, result_of(both(1, **told)), tmp_path)
    run.folder.event(
        "secure_sum", round=1, opened=True, members=["late", "north", "south"],
        survivors=["north", "south"], dropped={"mask": ["late"]}, seconds=0.5,
    )  # fmt: skip
    summary = conclude(run, test=None, validation=None, seconds=1.0)
    page = (run.folder.path / "report.html").read_text()

    assert summary["num_examples"] == {"north": None, "south": None}
    assert summary["privacy"]["secure_aggregation"]["coordinator_saw"] == "sums of updates"
    assert summary["aggregation"]["secure sums"].startswith("at least 3 updates, more than 0.6667")
    assert summary["aggregation"]["codec"] == "whole numbers, masked"
    assert "the coordinator saw sums of updates, and no update" in page
    assert "1 at mask" in page


@pytest.mark.parametrize("record", [False, True])
def test_nothing_published_of_a_client_private_run_tells_who_took_part(
    record: bool, tmp_path: Path
) -> None:
    """Even of a result that was not stripped, report and summary leave out what they can."""
    config = client_config(privacy=Privacy(epsilon=8.0) if record else None)
    result = published(result_of(both(1), both(2)))
    labels = {"north": (10, 20), "south": (1, 2)}
    run = finished(config, result, tmp_path, label_counts=labels)
    summary = conclude(run, test=None, validation=None, seconds=1.0)
    page = (run.folder.path / "report.html").read_text()

    for text in (json.dumps(summary), page):
        assert "north" not in text
        assert "south" not in text
    assert (summary["bytes_up"], summary["aggregation_error"]) == (None, [])
    assert "Aggregation error" not in page
    assert "delivered in every round" not in page
    assert summary["privacy"]["client_level"]["population"] == 1000
    assert (summary["privacy"]["record_level"] is not None) is record


def test_the_plan_that_ran_is_the_plan_that_is_stated(tmp_path: Path) -> None:
    plan = client_plan(epsilon=1.25)
    run = finished(client_config(), published(result_of(both(1))), tmp_path, client_plan=plan)

    assert statement_of(run).client == plan
