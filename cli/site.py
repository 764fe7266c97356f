"""anabranch site: what the data engineer, and whoever answers for privacy, types at a site."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anabranch.cli import site_agent, site_peers, site_policy
from anabranch.cli.folders import SITE, SiteFolder
from anabranch.cli.output import Json, emit, table

if TYPE_CHECKING:
    from anabranch.client.ledger_report import LedgerReport, Verified

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Take part with your records.")
for verb in (
    site_agent.join,
    site_agent.preflight,
    site_agent.serve,
    site_agent.status,
    site_agent.leave,
):
    app.command()(verb)
app.add_typer(site_policy.app, name="policy")
app.add_typer(site_peers.app, name="peers")
app.add_typer(site_agent.log, name="log")


@app.command()
def check(
    data: Annotated[Path, typer.Argument(help="CSV, TSV, JSONL, Parquet, or a folder of images.")],
    run: Annotated[Path, typer.Option("--run", help="The run.toml the coordinator gave you.")],
    show_values: Annotated[
        bool, typer.Option("--show-values", help="Print the offending cells, too.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Check records against a run's data contract. Nothing is sent, nothing is trained."""
    from anabranch.client.check import check_data

    report = check_data(data, run, show_values=show_values)
    emit(report.as_dict(), report.text(), as_json=as_json)
    return 0 if report.ok else 1


@app.command()
def ledger(
    verify: Annotated[
        bool, typer.Option("--verify", help="Check chain, rows, witnesses, and epsilon twice.")
    ] = False,
    export: Annotated[
        Path | None, typer.Option("--export", help="Write every event to this file (JSONL).")
    ] = None,
    contains: Annotated[
        str | None, typer.Option("--contains", help="Is this head, from events.jsonl, in it?")
    ] = None,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Accept a restored or lost ledger, and record it.")
    ] = False,
    folder: SiteFolder = SITE,
    as_json: Json = False,
) -> int:
    """Show what the site's records have spent, over all runs. Nothing is sent."""
    from anabranch.client import ledger_report as reports

    if sum((verify, export is not None, contains is not None, adopt)) > 1:
        raise typer.BadParameter("give one of --verify, --export, --contains and --adopt")
    if verify:
        checked = reports.verify(folder)
        emit(checked.as_dict(), _verified(checked), as_json=as_json)
        return 0 if checked.ok else 1
    if export is not None:
        count = reports.export(folder, export)
        emit({"file": str(export), "events": count}, f"{export}: {count} events", as_json=as_json)
        return 0
    if contains is not None:
        there = reports.contains(folder, contains)
        text = f"{contains[:16]}… is {'' if there else 'NOT '}in the chain"
        emit({"contains": there}, text, as_json=as_json)
        return 0 if there else 1
    if adopt:
        head = reports.adopt(folder)
        emit({"head": head}, f"accepted and recorded; the head is {head}", as_json=as_json)
        return 0
    report = reports.report(folder)
    emit(report.as_dict(), _report(report), as_json=as_json)
    return 0


def _report(report: LedgerReport) -> str:
    rows = [
        (
            f"{one.data[:12]}…",
            one.rows,
            one.rounds,
            one.open,
            f"{one.epsilon:.3f}",
            f"{one.delta:.1e}",
            "" if one.left is None else f"{one.left:.3f}",
            "" if one.rounds_left is None else one.rounds_left,
        )
        for one in report.sets
    ]
    header = ("data set", "rows", "rounds", "open", "epsilon", "delta", "left", "rounds left")
    lines = [f"{report.site}: {report.path}, {report.events} events", "", table(header, rows), ""]
    if report.budget is None:
        lines.append("budget: none in site.toml; only each run has one")
    else:
        over = {"row": "any one row", "site": "all events composed"}[report.budget.over]
        lines.append(
            f"budget: epsilon {report.budget.epsilon:g} at delta {report.budget.delta:g}, {over}"
        )
    if report.client is not None:
        one = report.client
        lines.append(
            f"as one client with all its records: {one.rounds} rounds ({one.open} open), epsilon "
            f"{one.epsilon:.3f} at delta {one.delta:.1e}; not to be added to the above"
        )
    if report.imported:
        lines.append(f"imported from an older ledger, charged to every row: {report.imported}")
    if report.records is None:
        lines.append("records: the site's file cannot be read")
    else:
        lines.append("records: {} known, {} new".format(*report.records))
    lines.append(
        f"all events composed, as if every row had been in each: epsilon "
        f"{report.everything:.3f} at delta {report.delta:.1e}"
    )
    lines.append(f"head: {report.head}")
    return "\n".join(lines)


def _verified(checked: Verified) -> str:
    rows = [
        (
            f"{data[:12]}…",
            f"{one.delta:.1e}",
            "{:.4f} to {:.4f}".format(*one.prv),
            "{:.4f} to {:.4f}".format(*one.pld),
            "agree" if one.agree else "DISAGREE",
        )
        for data, one in checked.epsilons.items()
    ]
    header = ("data set", "delta", "epsilon, PRV (Opacus)", "epsilon, PLD (dp-accounting)", "")
    return "\n".join(
        [
            f"chain: {checked.events} events, head {checked.head}",
            *(f"witness: {file}" for file in checked.witnesses),
            "",
            table(header, rows),
            *(
                f"Skellam noise, {'client' if of == 'client' else of[:12] + '…'}: epsilon "
                f"{epsilon:.4f} at delta {delta:.1e}, all its events, by Rényi divergences alone"
                for of, (epsilon, delta) in checked.renyi.items()
            ),
        ]
    )
