"""anabranch site policy: what a site allows, which runs wait for its owner, and the answers."""

from __future__ import annotations

import getpass
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer
from typer.core import TyperGroup

from anabranch.cli.folders import SITE, SiteFolder
from anabranch.cli.output import Json, emit, table

if TYPE_CHECKING:
    from anabranch.client.policy.approvals import Approvals, Entry

Digest = Annotated[str, typer.Argument(help="Of the proposal: at least 8 hex digits.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


class Verbs(TyperGroup):
    """`policy` alone is `policy show`."""

    usual = "show"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the verb in that is left out."""
        if not args or (args[0].startswith("-") and args[0] != "--help"):
            args = [self.usual, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=Verbs,
    rich_markup_mode=None,
    help="What this site allows, and the runs that wait for your answer.",
)


@app.command()
def show(
    folder: SiteFolder = SITE,
    as_json: Json = False,
) -> int:
    """Show every value of the policy that is in force."""
    from anabranch.client.policy.approvals import Approvals, Outdated
    from anabranch.client.policy.policy_file import read_policy
    from anabranch.client.policy.review import policy_text, policy_values

    _require_site(folder)
    policy, entries = read_policy(folder), Approvals(folder).entries()
    waiting = sum(entry.state == "pending" for entry in entries.values())
    text = f"{policy_text(policy)}\n\n{waiting} runs wait for an answer"
    if outdated := sum(isinstance(entry, Outdated) for entry in entries.values()):
        text += (
            f"\n{outdated} proposals are no longer valid with this version and approve nothing: "
            "`anabranch site policy list` says why"
        )
    values = {"policy": policy_values(policy), "pending": waiting, "outdated": outdated}
    emit(values, text, as_json=as_json)
    return 0


@app.command("list")
def list_runs(folder: SiteFolder = SITE, as_json: Json = False) -> int:
    """List the runs that were proposed to this site, the oldest first."""
    from anabranch.client.policy.approvals import Approvals, Outdated
    from anabranch.client.policy.review import entry_values, roster_values

    _require_site(folder)
    entries = list(Approvals(folder).entries().values())
    rows = [(e.digest[:12], e.state, e.proposal.run[:40], e.proposal.author, e.by) for e in entries]
    text = table(("proposal", "state", "run", "author", "by"), rows) if rows else "none yet"
    outdated = [e for e in entries if isinstance(e, Outdated)]
    text = "\n".join([text, *(f"{e.digest[:12]}: {e.sentence}" for e in outdated)])
    values = [entry_values(entry) | {"roster": roster_values(folder, entry)} for entry in entries]
    emit({"runs": values}, text, as_json=as_json)
    return 0


@app.command()
def approve(
    digest: Digest, folder: SiteFolder = SITE, yes: Yes = False, as_json: Json = False
) -> int:
    """Approve exactly this run. Shows it first."""
    approvals, entry = _known(folder, digest, as_json=as_json)
    if not yes:
        typer.confirm("Approve this run?", abort=True, err=True)
    by = getpass.getuser()
    record = _logging(folder, "run-approved", by)
    after = approvals.approve(entry.digest, by=by, now=time.time(), record=record)
    _done(folder, after, as_json=as_json)
    return 0


@app.command()
def reject(
    digest: Digest,
    folder: SiteFolder = SITE,
    reason: Annotated[str, typer.Option("--reason", help="For your own records.")] = "",
    yes: Yes = False,
    as_json: Json = False,
) -> int:
    """Reject a run for good. An approval is withdrawn from the next message on."""
    approvals, entry = _known(folder, digest, as_json=as_json)
    if not yes:
        typer.confirm("Reject this run? It cannot be approved later.", abort=True, err=True)
    by = getpass.getuser()
    record = _logging(folder, "run-rejected", by, reason=reason[:200])
    after = approvals.reject(entry.digest, by=by, now=time.time(), reason=reason, record=record)
    _done(folder, after, as_json=as_json)
    return 0


@app.command()
def check(
    run: Annotated[Path, typer.Argument(help="A run.toml.")],
    folder: SiteFolder = SITE,
    author: Annotated[str | None, typer.Option("--author", help="Who would propose it.")] = None,
    as_json: Json = False,
) -> int:
    """Say, line by line, whether this site's policy would allow a run. Asks nobody."""
    from anabranch.client.files import read_run
    from anabranch.client.policy.review import check_run

    _require_site(folder)
    lines = check_run(folder, read_run(run), author)
    ok = all(line.ok is not False for line in lines)
    words = {True: "yes", False: "NO", None: "later"}
    text = "\n".join(f"{words[line.ok]:<6} {line.what:<9} {line.sentence}" for line in lines)
    found = [{"what": line.what, "ok": line.ok, "sentence": line.sentence} for line in lines]
    emit({"ok": ok, "lines": found}, text, as_json=as_json)
    return 0 if ok else 1


def _require_site(folder: Path) -> None:
    """Raise ConfigError unless a site lives in `folder`, or lived there."""
    from anabranch.client.agent.identity import Identity
    from anabranch.client.policy.policy_file import FILE

    if not (folder / FILE).exists():
        Identity(folder)


def _known(folder: Path, digest: str, *, as_json: bool) -> tuple[Approvals, Entry]:
    """Return the entry, shown to whoever is about to answer."""
    from anabranch.client.policy.approvals import Approvals
    from anabranch.client.policy.review import entry_text, roster_text, used, waits_text

    _require_site(folder)
    approvals = Approvals(folder)
    entry = approvals.find(digest)
    if not as_json:
        typer.echo(f"{entry_text(entry)}\n{'used':<11} {used(folder, entry.proposal.run)}")
        if shown := roster_text(folder, entry):
            typer.echo(shown)
        if waits := waits_text(folder, entry):
            typer.echo(waits)
    return approvals, entry


def _done(folder: Path, entry: Entry, *, as_json: bool) -> None:
    from anabranch.client.policy.review import entry_values, roster_values

    values = entry_values(entry) | {"roster": roster_values(folder, entry)}
    emit(values, f"{entry.digest[:12]} is {entry.state}", as_json=as_json)


def _logging(folder: Path, kind: str, by: str, **more: object) -> Callable[[Entry], object]:
    """Return what writes an answer to the site's audit log."""
    from anabranch.client.policy.peers import audit_log

    log = audit_log(folder)
    return lambda entry: log.append(
        kind,
        proposal=entry.digest,
        run=entry.proposal.run,
        author=entry.proposal.author,
        by=by,
        before=entry.state,
        **more,
    )
