"""Runs, as the operator asks for them: proposed, stopped, resumed, continued under a new agreement.

    propose    run.toml is checked, signed by its author, and queued; sites decide by themselves.
               With [secure_aggregation] the author signs the roster, too: every site that is in
               now, with its peer key. Who joins later takes no part in that run
    stop       the run's process ends between two messages; what was merged is kept
    resume     it goes on where it was
    continued  a changed run.toml is a new run, with an id and approvals of its own, whose first
               adapter is the old run's last

The supervisor starts and stops processes by what is written here (`desired`); whether it serves
now does not matter.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from anabranch.protocols.config import RunConfig, parse
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.identity.proposal import Proposal, contract_digest, sign
from anabranch.protocols.secagg.terms import Peer, Roster
from anabranch.server.coordinator.folder import AUTHOR, Federation
from anabranch.server.coordinator.state import RunEntry
from anabranch.server.store import new_run

OVER = ("finished",)  # states after which there is nothing to stop or resume


def propose(
    federation: Federation,
    run_toml: Path,
    now: float,
    *,
    author: str = AUTHOR,
    validation: Path | None = None,
    test: Path | None = None,
    continues: str | None = None,
) -> RunEntry:
    """Queue a new run, signed by `author`; return its entry.

    `validation` and `test` are the coordinator's own records, with which there is a release at the
    end; `continues` is the run whose last adapter is the first of this one. Raises ConfigError,
    PrivacyError or DataError for whatever would end the run at its start, and for a run with
    [secure_aggregation] that too few sites with a peer key are in for; nothing is stored then.
    """
    text = _read(run_toml)
    config = parse(text, source=str(run_toml))
    _require_can_begin(config, validation=validation, test=test)
    if continues is not None:
        _require_continues(federation, existing(federation, continues), config, str(run_toml))
    roster = None if config.secure_aggregation is None else _roster(federation, config)
    run = new_run(config.name)
    signed = sign(
        Proposal(
            federation=federation.settings.name,
            run=run,
            author=author,
            version=federation.version,
            code=federation.code,
            config=config.digest(),
            base=config.model.base,
            contract=contract_digest(config),
            roster=None if roster is None else roster.digest,
        ),
        federation.author(author),
    )
    entry = RunEntry(
        run=run,
        name=config.name,
        toml=text,
        signed=msgspec.json.encode(signed).decode(),
        created=now,
        continues=continues,
        validation=None if validation is None else str(validation.absolute()),
        test=None if test is None else str(test.absolute()),
    )
    federation.audit.append(
        "proposed",
        run=run,
        author=author,
        proposal=signed.proposal.digest,
        config=signed.proposal.config,
        code=signed.proposal.code,
        continues=continues,
        **({} if roster is None else {"roster": roster.digest, "sites": len(roster.peers)}),
    )
    federation.state.propose(entry, roster)
    return entry


def stop(federation: Federation, run: str) -> RunEntry:
    """Ask a run to stop between two messages; what was merged is kept.

    Raises ConfigError if there is no such run, or it is over.
    """
    entry = existing(federation, run)
    if entry.state in OVER:
        raise ConfigError(f"run {entry.run}: {entry.state} already; there is nothing to stop")
    federation.audit.append("stop-asked", run=entry.run)
    state = "stopped" if entry.state == "queued" else entry.state  # no process has it yet
    return federation.state.set_run(entry.run, desired="stopped", state=state)


def resume(federation: Federation, run: str) -> RunEntry:
    """Let a run that was stopped or failed go on from its last merge.

    Raises ConfigError if there is no such run, it is over, or it is not stopped; and if this
    version refuses its configuration.
    """
    entry = existing(federation, run)
    if entry.state in OVER:
        raise ConfigError(f"run {entry.run}: {entry.state} already; for more rounds, {_CONTINUE}")
    if entry.desired == "running" and entry.state != "failed":
        raise ConfigError(f"run {entry.run}: {entry.state}; it was not stopped")
    parse(entry.toml, source=f"run {entry.run} cannot go on with this version")
    federation.audit.append("resume-asked", run=entry.run)
    state = "queued" if entry.state in ("stopped", "failed") else entry.state
    return federation.state.set_run(
        entry.run, desired="running", state=state, detail="", restarts=0
    )


def resume_with(
    federation: Federation, run: str, run_toml: Path, now: float, *, author: str = AUTHOR
) -> RunEntry:
    """Queue a new run that goes on from the last adapter of `run` under a changed configuration.

    Sites have to approve it anew. Raises ConfigError as `propose` does, and if `run` still runs,
    has merged nothing, has a model that the new configuration does not fit, or trained without the
    privacy that the new one promises.
    """
    entry = existing(federation, run)
    return propose(
        federation,
        run_toml,
        now,
        author=author,
        validation=None if entry.validation is None else Path(entry.validation),
        test=None if entry.test is None else Path(entry.test),
        continues=entry.run,
    )


def existing(federation: Federation, run: str) -> RunEntry:
    """Return a run by its id, or the newest of that name; ConfigError if there is none."""
    found = federation.state.run(run)
    if found is None:
        named = [entry for entry in federation.state.runs() if entry.name == run]
        if not named:
            raise ConfigError(
                f"run {run}: there is none of this id or name; `anabranch coordinator runs` lists "
                "them"
            )
        found = named[-1]
    return found


def roster_of(federation: Federation, run: str, proposal: Proposal) -> Roster | None:
    """Return the roster that a run was proposed with; None: it has none.

    Raises ConfigError if what is kept is not what the author signed.
    """
    roster = federation.state.roster(run)
    if proposal.roster != (None if roster is None else roster.digest):
        raise ConfigError(
            f"run {run}: the roster in the state is not the one that {proposal.author} signed; "
            "restore the state from a backup, or propose the run again"
        )
    return roster


_CONTINUE = "`anabranch coordinator resume RUN --config NEW.toml`"


def last_checkpoint(folder: Path) -> Path | None:
    """Return the adapter after the last round of a run's folder; None before the first."""
    return max((folder / "checkpoints").glob("round-*.adapter"), default=None)


def _require_continues(
    federation: Federation, old: RunEntry, config: RunConfig, source: str
) -> None:
    before = parse(old.toml, source=f"run {old.run}")
    if old.state not in ("stopped", "failed", "finished"):
        raise ConfigError(
            f"run {old.run}: {old.state}; stop it first: `anabranch coordinator stop {old.run}`"
        )
    if last_checkpoint(federation.run_folder(old.run)) is None:
        raise ConfigError(
            f"run {old.run}: no round of it was merged, so there is nothing to go on from; "
            f"propose {source} with `anabranch coordinator run`"
        )
    for what, one, other in (
        ("[task]", before.task, config.task),
        ("[model]", before.model, config.model),
        ("[lora]", before.adapter, config.adapter),
        ("the part that stays at the sites", before.kept, config.kept),
    ):
        if one != other:
            raise ConfigError(
                f"{source}: {what} is not that of run {old.run}, whose adapter would not fit; "
                "propose it as a run of its own"
            )
    if before.client_privacy is not None or config.client_privacy is not None:
        raise ConfigError(
            f"{source}: a run with [client_privacy] is planned as a whole: its epsilon would not "
            "cover both runs. Propose it as a run of its own"
        )
    if config.privacy is not None and before.privacy is None:
        raise ConfigError(
            f"{source}: [privacy] cannot be promised of an adapter that run {old.run} trained "
            "without; propose it as a run of its own"
        )


def _roster(federation: Federation, config: RunConfig) -> Roster:
    """Return the roster of all sites that are in; ConfigError if no sum could be opened."""
    assert config.secure_aggregation is not None
    active = [site for site in federation.state.sites() if site.status == "active"]
    peers = [Peer(name=one.name, key=one.peer_key) for one in active if one.peer_key is not None]
    silent = [one.name for one in active if one.peer_key is None]
    need = max(config.secure_aggregation.minimum, config.federation.quorum)
    if len(peers) < need:
        said = f"{len(peers)} ({', '.join(one.name for one in peers)})" if peers else "none"
        advice = (
            f". {', '.join(silent)}: active, and no peer key announced: update anabranch there and "
            "start the agent, which announces one by itself"
            if silent
            else ""
        )
        raise ConfigError(
            f"[secure_aggregation]: a round needs {need} sites with a peer key, and {said} "
            f"{'is' if len(peers) == 1 else 'are'} active{advice}. Who joins after the proposal "
            "takes no part: propose when all are in"
        )
    return Roster.of(peers)


def _require_can_begin(config: RunConfig, **records: Path | None) -> None:
    # Here and not above: they bring torch, and whoever stops a run does not wait for it.
    from anabranch.client.data.records import load_records
    from anabranch.server.client_privacy import plan_of
    from anabranch.server.evaluation import require_shared_model

    require_shared_model(config, **records)
    plan_of(config)
    for path in records.values():
        if path is not None:
            load_records(path, config)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
