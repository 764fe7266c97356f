"""Parts of the report without charts: what a run guarantees, and how its secure sums went."""

from __future__ import annotations

from collections.abc import Sequence

from anabranch.server.page import ABSENT, bullets, paragraph, table
from anabranch.server.statement.guarantees import PrivacyStatement
from anabranch.server.statement.text import (
    APART,
    DISCLOSURE_HEAD,
    GROUP_HEAD,
    LEGEND,
    SITE_HEAD,
    client_paragraphs,
    disclosure_rows,
    group_note,
    group_rows,
    limits,
    paragraphs,
    record_paragraphs,
    site_rows,
    sums_paragraphs,
)
from anabranch.server.sums.log import SumEvent, lost_words
from anabranch.server.svg import Markup, element, integer, size, text


def secure_sums(sums: Sequence[SumEvent]) -> list[Markup]:
    """Return how many were in each sum, and at which stage the others were lost."""
    if not sums:
        return []
    says = (
        "Members trained in time; survivors are those whose updates are in the sum that was "
        "opened. Updates, norms and record counts of single sites are seen by nobody."
    )
    cells = [
        [
            str(one.round),
            integer(one.attempt),
            integer(len(one.members)),
            integer(len(one.survivors)) if one.opened else "not opened",
            lost_words(one.lost) or ABSENT,
            size(one.bytes_up),
            f"{one.seconds:.1f} s",
        ]
        for one in sums
    ]
    head = ["round", "attempt", "members", "survivors", "lost at stage", "up", "time"]
    return [
        element("h3", text("Secure sums")),
        paragraph(says),
        table(head, cells, kinds="tnnntnn"),
    ]


def privacy_statement(statement: PrivacyStatement) -> list[Markup]:
    """Return both guarantees apart, each with its tables, then all other releases."""
    if not statement.disclosures:
        return [_quote(paragraphs(statement))]
    both = [paragraph(APART)] if statement.both else []
    parts = [
        *both,
        element("h3", text("Record level")),
        _quote(record_paragraphs(statement)),
    ]
    if rows := site_rows(statement):
        several = (
            f"Several records of one patient at a site, this run alone. {group_note(statement)}"
        )
        parts += [
            table(SITE_HEAD, rows, kinds="tnnnnnntm", caption="Every site"),
            bullets(LEGEND),
        ]
        if groups := group_rows(statement):
            kinds = "t" + "n" * (len(GROUP_HEAD) - 1)
            parts.append(table(GROUP_HEAD, groups, kinds=kinds, caption=several.strip()))
    seen = sums_paragraphs(statement)
    sums = [element("h3", text("Secure aggregation")), _quote(seen)] if seen else []
    others = [[w, s.replace(" ", "\u00a0"), y] for w, s, y in disclosure_rows(statement)]
    return [
        *parts,
        element("h3", text("Client level")),
        _quote(client_paragraphs(statement)),
        *sums,
        element("h3", text("Everything else that leaves or is published")),
        table(DISCLOSURE_HEAD, others, kinds="ttt"),
        element("h3", text("Not covered by any guarantee")),
        bullets(limits(statement)),
    ]


def _quote(lines: Sequence[str]) -> Markup:
    return element("blockquote", text("\n\n".join(lines)))
