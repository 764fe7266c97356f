import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from anabranch.server.report import (
    Comparison,
    Failure,
    ReleaseFile,
    ReportData,
    render,
    write_report,
)
from anabranch.server.statement.guarantees import state
from tests.privacy_cases import client_config, client_plan, facts_of, open_config, private_config

VOID = {"meta", "link", "br", "hr", "img", "input"}
HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)> $title & \u202eevil"

DATA = ReportData(
    name="2025-demo",
    title="Diagnosis to chapter",
    description="Two sites, three labels.",
    evaluated_on="60 held-out records",
    comparison=(
        Comparison(name="majority", accuracy=0.25, macro_f1=0.1),
        Comparison(name="federated", accuracy=0.75, macro_f1=0.7, note="2 rounds", ours=True),
    ),
    accuracy={"federated": {1: 0.5, 2: 0.75}, "federated with DP": {1: 0.4, 2: 0.65}},
    loss={"federated": {1: 1.25, 2: 0.875}},
    aggregation_error={"federated": {1: 0.25, 2: 3.4e-08}},
    site_accuracy={"federated": {"north": 0.7, "south": 0.8}, "alone": {"north": 0.6}},
    labels=("eye", "ear", "skin"),
    label_counts={"north": (10, 0, 1200), "south": (3, 44, 5)},
    failures=(Failure(round=2, site="south", reason="deadline: no answer within 60 s"),),
    privacy=state(private_config(), facts_of("north", "south")),
    epsilon={"north": {1: 4.0, 2: 6.5}, "south": {1: 4.25, 2: 7.125}},
    epsilon_target=8.0,
    bytes_up={1: 2_400_000, 2: 1_200_000},
    bytes_down={1: 2_500_000, 2: 2_500_000},
    confusion=((18, 1, 1), (2, 15, 3), (4, 0, 16)),
    confusion_of="Federated adapter",
    release=(
        ReleaseFile(name="model.fp32.onnx", size_bytes=90_992_112, accuracy=0.75, latency_ms=6.31),
        ReleaseFile(
            name="model.int8.onnx", size_bytes=23_044_101, accuracy=0.742, sha256="7c" * 32
        ),
    ),
    seed=7,
    aggregation={"method": "altqr", "codec": "int8, error feedback"},
    facts={"time": "3 min 2 s"},
    digests={"base model": "55" * 32},
    versions={"torch": "2.13.0"},
)

SECTIONS = {
    "Result": {"comparison": ()},
    "Rounds": {"accuracy": {}, "loss": {}, "aggregation_error": {}},
    "Sites": {"site_accuracy": {}, "label_counts": {}, "failures": None},
    "Privacy": {"privacy": None, "epsilon": {}, "epsilon_target": None},
    "Traffic": {"bytes_up": {}, "bytes_down": {}},
    "Errors": {"confusion": ()},
    "Release": {"release": ()},
    "Provenance": {
        "seed": None,
        "aggregation": {},
        "facts": {},
        "digests": {},
        "versions": {},
    },
}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def values(self, attribute: str) -> list[str]:
        return [v for _, attrs in self.tags if (v := attrs.get(attribute)) is not None]


def headings(html: str) -> list[str]:
    return re.findall(r"<h2>([^<]*)</h2>", html)


def test_the_page_is_well_formed_and_each_chart_is_xml() -> None:
    html = render(DATA)
    page = Page(html)
    charts = re.findall(r"<svg.*?</svg>", html, flags=re.S)
    assert len(charts) == 9
    for chart in charts:
        root = ElementTree.fromstring(chart)
        assert root.get("role") == "img"
        assert root.get("aria-label") == root[0].text
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert [link.removeprefix("#") for link in page.values("href") if link != "data:,"] == ids
    assert [attrs["scope"] for tag, attrs in page.tags if tag == "th"].count("row") > 20


def test_nothing_on_the_page_asks_for_anything_elsewhere() -> None:
    html = render(DATA)
    for way in ("http:", "https:", "//", "url(", "@import", "src=", "<script", "<iframe", "file:"):
        assert way not in html, way
    assert all(link.startswith("#") or link == "data:," for link in Page(html).values("href"))
    assert "default-src 'none'" in html


def test_every_number_in_a_chart_is_also_in_a_table_under_it() -> None:
    figures = re.findall(r"<figure>.*?</figure>", render(DATA), flags=re.S)
    assert len(figures) == 9
    for figure in figures:
        chart, tables = figure.split("</svg>")
        shown = set(re.findall(r'class="value[^"]*"[^>]*>([^<]+)<', chart))
        cells = set(re.findall(r"<t[dh][^>]*>([^<]*)<", tables))
        assert shown, figure[:80]
        assert shown <= cells, shown - cells


def test_every_tooltip_number_is_also_in_a_table() -> None:
    html = render(DATA)
    tips = re.findall(r"<(?:circle|rect)[^>]*><title>[^<]*: ([^<:]+)</title>", html)
    cells = set(re.findall(r"<t[dh][^>]*>([^<]*)<", html))
    assert len(tips) > 30
    assert set(tips) <= cells


def test_hostile_strings_stay_text_wherever_they_come_from() -> None:
    evil = ReportData(
        name=HOSTILE, title=HOSTILE, description=HOSTILE, evaluated_on=HOSTILE,
        comparison=(Comparison(name=HOSTILE, accuracy=0.5, note=HOSTILE, ours=True),),
        accuracy={HOSTILE: {1: 0.5}}, loss={HOSTILE: {1: 0.5}},
        aggregation_error={HOSTILE: {1: 0.5}}, aggregation={HOSTILE: HOSTILE},
        site_accuracy={HOSTILE: {HOSTILE: 0.5}}, labels=(HOSTILE, "b"),
        label_counts={HOSTILE: (1, 2)}, privacy=state(private_config(), facts_of(HOSTILE)),
        failures=(Failure(round=1, site=HOSTILE, reason=HOSTILE),),
        epsilon={HOSTILE: {1: 1.0}}, confusion=((1, 2), (3, 4)), confusion_of=HOSTILE,
        release=(ReleaseFile(name=HOSTILE, size_bytes=1, accuracy=0.5, sha256=HOSTILE),),
        facts={HOSTILE: HOSTILE}, digests={HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE},
    )  # fmt: skip
    html = render(evil)
    page = Page(html)
    calm = {tag for tag, _ in Page(render(DATA)).tags}
    assert {tag for tag, _ in page.tags} <= calm
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on") or a == "src"]
    assert "\u202e" not in html
    assert "$title" in html  # text is put in once and never read as a template
    for chart in re.findall(r"<svg.*?</svg>", html, flags=re.S):
        ElementTree.fromstring(chart)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_without_data_is_left_out_and_the_others_stay(section: str) -> None:
    assert headings(render(DATA)) == list(SECTIONS)
    without = dataclasses.replace(DATA, **SECTIONS[section])  # type: ignore[arg-type]
    assert headings(render(without)) == [name for name in SECTIONS if name != section]


def test_the_page_says_how_deltas_were_merged_and_how_exactly() -> None:
    html = render(DATA)

    assert "Aggregation error" in html
    assert "3.4e-08" in html
    assert "int8, error feedback" in html


def test_a_run_with_a_name_only_is_a_page_without_sections() -> None:
    html = render(ReportData(name="bare"))
    Page(html)
    assert "<h1>bare</h1>" in html
    assert "<svg" not in html
    assert "<section" not in html
    assert "<nav" not in html


def test_no_failures_is_said_and_unknown_failures_are_not() -> None:
    none = render(dataclasses.replace(DATA, failures=()))
    unknown = render(dataclasses.replace(DATA, failures=None))
    assert "every site that was asked delivered in every round" in none
    assert "did not deliver" not in unknown


def test_a_literal_run_shows_its_numbers() -> None:
    html = render(DATA).replace("\u202f", " ")
    for said in ("75.0 %", "ε = 7.12", "8.60 MB", "3 600 000", "23 044 101", "6.3 ms", "74.2 %"):
        assert said in html, said
    row = '<th class="said" scope="row">eye</th><td class="n">20</td><td class="n">90.0 %</td>'
    assert row + '<td class="n">75.0 %</td>' in html  # recall 18/20, precision 18/24
    cells = ["1", "2.40 MB", "2 400 000", "2.50 MB", "2 500 000", "4.90 MB"]  # up, down, both
    assert re.findall(r">([^<]+)</t[hd]>", html.split("bytes down")[1])[1:7] == cells
    missing = '<th class="said" scope="row">south</th><td class="n">80.0 %</td><td class="n">\u2013'
    assert missing in html


def privacy_of(**changes: Any) -> str:
    html = render(dataclasses.replace(DATA, **changes))
    return html.split('<section id="privacy"')[1].split("</section>")[0]


def test_both_guarantees_stand_apart_and_an_absent_one_is_said() -> None:
    record = privacy_of()
    assert re.findall("<h3>([^<]*)</h3>", record) == [
        "Record level",
        "Client level",
        "Everything else that leaves or is published",
        "Not covered by any guarantee",
    ]
    assert "Client level: none." in record
    assert "Both guarantees hold at once" not in record

    client = privacy_of(privacy=state(client_config(), facts_of(client=client_plan())))
    assert "Record level: none." in client
    assert "N = 1000" in client

    config = client_config(privacy=private_config().privacy)
    both = privacy_of(privacy=state(config, facts_of(client=client_plan())))
    assert "they are not to be added" in both
    assert "none." not in both


def test_every_site_stands_in_the_privacy_tables_with_its_numbers() -> None:
    section = privacy_of()
    for site in ("north", "south"):
        row = re.search(rf'<th class="said" scope="row">{site}</th>(.*?)</tr>', section)
        assert row is not None
        cells = re.findall(r">([^<]*)</td>", row[1])
        assert cells == ["3.500", "3.003", "0.0005", "2.3200", "0.160000", "150", "fast", "ab12"]


def test_a_run_without_privacy_says_so_and_lists_nothing() -> None:
    section = privacy_of(privacy=state(open_config(), facts_of("north")), epsilon={})
    assert "There is no differential privacy" in section
    assert "<table" not in section


def test_what_a_client_costs_is_seen_first_beside_what_a_record_costs() -> None:
    statement = state(client_config(), facts_of(client=client_plan()))
    html = render(ReportData(name="run", privacy=statement))
    assert "ε = 2.90" in html.split("<section")[0]
    assert "a client with all its records; 1000 clients" in html


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="'federated': expected finite numbers, got nan"):
        render(dataclasses.replace(DATA, loss={"federated": {1: math.nan}}))


def test_shapes_that_do_not_match_the_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="'south': expected 3 label counts, got 2"):
        render(dataclasses.replace(DATA, label_counts={"south": (1, 2)}))
    with pytest.raises(ValueError, match=r"expected 3 rows of 3 values, got 2 rows of \[3\]"):
        render(dataclasses.replace(DATA, confusion=((1, 2, 3), (4, 5, 6))))
    with pytest.raises(ValueError, match="expected the names of all labels, got none"):
        render(dataclasses.replace(DATA, labels=()))


def test_the_file_holds_what_render_returns(tmp_path: Path) -> None:
    write_report(tmp_path / "run" / "report.html", DATA)
    assert (tmp_path / "run" / "report.html").read_text("utf-8") == render(DATA)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["report.html"]
