from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.page.metrics import METRICS, metrics_text
from anabranch.server.coordinator.page.shown import Alert, SiteView, View
from anabranch.server.coordinator.page.view import view
from tests.page_cases import NOW, example, make

ROOT = Path(__file__).parents[3]
Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]

NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(,|(?=\}))')


def parse(text: str) -> tuple[dict[str, str], Samples]:
    """Read the text exposition format 0.0.4 strictly: kinds of the families, and their samples.

    https://prometheus.io/docs/instrumenting/exposition_formats/#text-format-details
    """
    assert text == "" or text.endswith("\n")
    kinds: dict[str, str] = {}
    samples: Samples = {}
    helped, family = set[str](), ""
    for line in text.split("\n")[:-1]:
        if line.startswith("# HELP "):
            _, _, name, said = line.split(" ", 3)
            assert NAME.fullmatch(name)
            assert said
            assert name not in helped
            helped.add(name)
            family = name
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == family
            assert kind in ("gauge", "counter")
            assert name not in kinds
            kinds[name] = kind
            samples[name] = {}
        else:
            name, labels, value = sample(line)
            assert name == family
            assert labels not in samples[name], line
            samples[name][labels] = value
    return kinds, samples


def sample(line: str) -> tuple[str, tuple[tuple[str, str], ...], float]:
    """Read `name{label="value"} number`."""
    found = NAME.match(line)
    assert found, line
    rest, labels = line[found.end() :], list[tuple[str, str]]()
    if rest.startswith("{"):
        place = 1
        while rest[place] != "}":
            label = LABEL.match(rest, place)
            assert label, line
            value = re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), label[2])
            labels.append((label[1], value))
            place = label.end()
        rest = rest[place + 1 :]
    assert rest.startswith(" "), line
    return found[0], tuple(labels), float(rest[1:])


EMPTY = View(at=NOW, federation="heart", address="127.0.0.1:8443", version="0.1.0")


@given(text=st.text(), more=st.text())
def test_whatever_a_name_holds_the_format_is_kept_and_gives_it_back(text: str, more: str) -> None:
    site = SiteView(name=text, status="active", state=more, doing="", certificate_ends=0.0)
    alert = Alert(kind=text, level="notice", about=more, text="")

    _, samples = parse(metrics_text(replace(EMPTY, sites=(site,), alerts=(alert,))))

    clean = [re.sub("[\ud800-\udfff]", "\ufffd", one) for one in (text, more)]
    labels = (("site", clean[0]), ("state", clean[1]))
    assert samples["anabranch_site_state"] == {labels: 1.0}
    assert (("kind", clean[0]), ("level", "notice"), ("about", clean[1])) in samples[
        "anabranch_alert"
    ]


@given(value=st.floats(allow_nan=False))
def test_every_number_is_read_back_exactly(value: float) -> None:
    _, samples = parse(metrics_text(replace(EMPTY, certificate_ends=value)))

    assert samples["anabranch_certificate_end_timestamp_seconds"] == {(): value}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return example(tmp_path_factory.mktemp("page") / "heart", NOW)


def test_the_metrics_of_a_federation_say_what_its_view_says(federation: Federation) -> None:
    shown = view(federation, NOW)
    kinds, samples = parse(metrics_text(shown))
    run = shown.runs[0]

    def of(name: str, **labels: str) -> float:
        return samples[f"anabranch_{name}"][tuple(labels.items())]

    assert of("info", federation="heart", version=shown.version) == 1
    assert of("site_up", site="aarhus") == 1
    assert of("site_up", site="delft") == 0
    assert of("run_round", run=run.run) == 12
    assert of("run_rounds", run=run.run) == 20
    assert of("run_waiting", run=run.run) == 1
    assert run.wait is not None
    assert of("run_wait_until_timestamp_seconds", run=run.run) == run.wait.until
    assert of("run_bytes_total", run=run.run, direction="up") == 12 * 410_000
    assert of("run_restarts_total", run=run.run) == 2
    assert of("run_site_epsilon", run=run.run, site="cork") == run.sites[2].epsilon
    assert of("run_epsilon_planned", run=run.run) == 8
    assert of("run_metric", run=run.run, metric="epsilon", source="largest") == run.epsilon
    assert {name for name, kind in kinds.items() if kind == "counter"} == {
        name for name in kinds if name.endswith("_total")
    }


def test_what_is_not_known_is_left_out_not_zero(tmp_path: Path) -> None:
    _, samples = parse(metrics_text(view(make(tmp_path / "heart"), NOW)))

    assert "anabranch_run_rounds" not in samples
    assert "anabranch_site_up" not in samples
    assert samples["anabranch_invitations_open"] == {(): 0.0}


def test_every_metric_is_in_the_document_with_its_kind_and_no_other() -> None:
    text = (ROOT / "docs" / "watching.md").read_text()

    documented = dict(re.findall(r"^\| `(anabranch_[a-z_]+)` \| (gauge|counter) \|", text, re.M))

    assert documented == {metric.name: metric.kind for metric in METRICS}
