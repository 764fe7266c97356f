"""`anabranch simulate tune`: settings searched with Optuna, on validation records alone.

    tune.json           which experiment and [tune] this is; another one is refused
    study.sqlite3       Optuna's study: every trial, its rounds and its outcome
    trials/trial-0003/  a run folder, without a release
    best.toml           the best settings, a patch of run.toml
    run.toml            the experiment's run.toml with them

A trial is a run of the experiment with settings that the sampler chose (TPE: Bergstra et al.,
NeurIPS 2011), and its outcome is the metric of its best round on the validation records. Test
records are never opened: what chose the settings cannot also judge them.

Killed at any point and started again, a study goes on: a trial that was under way is marked as
failed and its number is not used again. What a trial is asked to try is drawn from (seed, trials
that were completed or pruned before it), so an interrupted study tries what an uninterrupted one
would have.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from anabranch.protocols.errors import AnabranchError, ConfigError, RunError
from anabranch.simulations.experiment import (
    Experiment,
    OnEvent,
    Source,
    experiment_of,
    read_source,
)
from anabranch.simulations.experiments.settings import changed, encode
from anabranch.simulations.experiments.tune_plan import Parameter, Tune, read_tune
from anabranch.simulations.simulate import Told, digests, override, perform
from anabranch.storage.files import locked, write_atomic

if TYPE_CHECKING:
    import optuna

MARKER: Final = "tune.json"
NO_RELEASE = "a trial is measured, not released; run the best settings by themselves"

OnTrial = Callable[[int, int, "float | None", str], None]  # (done, of how many, value, state)


def tune(
    path: Path,
    output: Path,
    *,
    on_event: OnEvent | None = None,
    on_trial: OnTrial = lambda done, total, value, state: None,
    **given: Any,
) -> dict[str, Any]:
    """Complete the study of an experiment in `output`; return its best trial and all outcomes.

    Raises ConfigError before anything is run: without [tune] or validation records, with an engine
    whose rounds cannot be watched, or for an `output` of something else. RunError: every trial
    failed.
    """
    source, seed = read_source(path), given.pop("seed", None)
    table = source.trees()[0].get("tune")
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: there is no [tune]")
    search = read_tune(table, str(path))
    base = _without_test(override(experiment_of(source, {}, seed), **given))
    _require_validation(path, base)
    with locked(output / MARKER):
        _begin(output, search, base)
        with _opened(output, search) as study:
            _search(study, search, source, base, seed, given, output, on_event, on_trial)
            return _conclude(study, search, source, base, output)


def _search(
    study: optuna.Study,
    search: Tune,
    source: Source,
    base: Experiment,
    seed: int | None,
    given: Mapping[str, Any],
    output: Path,
    on_event: OnEvent | None,
    on_trial: OnTrial,
) -> None:
    """Run trials until there are as many as asked for."""
    while (done := len(_ended(study))) < search.trials:
        study.sampler = _sampler(search, base.config.seed, done)
        trial = study.ask()
        changes = {name: suggest(trial, name, one) for name, one in search.parameters.items()}
        folder = output / "trials" / f"trial-{trial.number:04d}"
        if folder.exists():  # of a study whose database was lost
            shutil.rmtree(folder)
        watch = _Watch(trial, search)
        told = Told(
            name=folder.name, changes=changes, withheld=NO_RELEASE, on_event=on_event, watch=watch
        )
        try:
            experiment = _without_test(override(experiment_of(source, changes, seed), **given))
            perform(experiment, folder, told)
        except _Pruned:
            state = "pruned"
        except AnabranchError as error:
            state = "failed"
            trial.set_user_attr("error", str(error))
        else:
            state = "complete"
        _tell(study, trial, watch.best, state)
        on_trial(len(_ended(study)), search.trials, watch.best, state)
        _require_progress(study, search)


def suggest(trial: optuna.Trial, name: str, parameter: Parameter) -> Any:
    """Return what the sampler chooses for a setting."""
    low, high, step = parameter.low, parameter.high, parameter.step
    if parameter.choices:
        return trial.suggest_categorical(name, parameter.choices)
    assert low is not None  # or Parameter had refused
    assert high is not None
    if parameter.whole:
        return trial.suggest_int(name, int(low), int(high), step=int(step or 1), log=parameter.log)
    return trial.suggest_float(name, low, high, step=step, log=parameter.log)


class _Pruned(Exception):  # it is no error
    """The trial is not worth its remaining rounds."""


class _Watch:
    """Tells the study every round's metric, keeps the best, and ends a trial that lags behind."""

    def __init__(self, trial: optuna.Trial, search: Tune) -> None:
        self.best: float | None = None
        self._trial, self._search, self._evaluations = trial, search, 0

    def __call__(self, metrics: Mapping[str, float]) -> None:
        value = metrics[self._search.metric]
        better = max if self._search.direction == "maximize" else min
        self.best = value if self.best is None else better(self.best, value)
        self._evaluations += 1
        self._trial.report(value, self._evaluations)
        if self._trial.should_prune():
            raise _Pruned


def _sampler(search: Tune, seed: int, done: int) -> optuna.samplers.BaseSampler:
    from optuna.samplers import TPESampler

    own = (seed * 1_000_003 + done) % 2**32
    return TPESampler(seed=own, n_startup_trials=search.startup_trials)


@contextmanager
def _opened(output: Path, search: Tune) -> Iterator[optuna.Study]:
    """Yield the study in study.sqlite3, trials that nobody runs any more marked as failed."""
    import optuna
    import sqlalchemy
    from optuna.pruners import MedianPruner, NopPruner
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = (
        NopPruner()
        if search.pruner == "none"
        else MedianPruner(
            n_startup_trials=search.startup_trials, n_warmup_steps=search.warmup_rounds
        )
    )
    file = output / "study.sqlite3"
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{file.resolve()}")
    except sqlalchemy.exc.DatabaseError as error:
        raise ConfigError(
            f"{file}: {error.orig}; expected Optuna's study: move it away to begin anew"
        ) from None
    try:
        study = optuna.create_study(
            study_name="tune",
            storage=storage,
            direction=search.direction,
            pruner=pruner,
            load_if_exists=True,
        )
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
        yield study
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _ended(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Return the trials that were completed or pruned."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _tell(study: optuna.Study, trial: optuna.Trial, value: float | None, state: str) -> None:
    from optuna.trial import TrialState

    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    told = states.get(state, TrialState.FAIL)
    study.tell(trial, value if told is TrialState.COMPLETE else None, state=told)


def _require_progress(study: optuna.Study, search: Tune) -> None:
    """Raise RunError once as many trials have failed, with a reason, as were asked for."""
    errors = [t.user_attrs["error"] for t in study.get_trials(False) if "error" in t.user_attrs]
    if len(errors) >= search.trials:
        raise RunError(f"{len(errors)} trials have failed, the last one with: {errors[-1]}")


def _conclude(
    study: optuna.Study, search: Tune, source: Source, base: Experiment, output: Path
) -> dict[str, Any]:
    """Write best.toml and run.toml; return the outcome."""
    best = study.best_trial
    settings = {name: best.params[name] for name in search.parameters}
    patch = encode(changed({}, settings))
    head = f"# trial {best.number} of {len(_ended(study))}: {search.metric} {best.value} on the "
    write_atomic(output / "best.toml", f"{head}validation records\n".encode() + patch)
    whole = changed(source.trees()[1], {**settings, "seed": base.config.seed})
    write_atomic(output / "run.toml", encode(whole))
    return {
        "folder": str(output),
        "metric": search.metric,
        "best": {"trial": best.number, "value": best.value, "settings": settings},
        "trials": [
            {
                "trial": one.number,
                "state": one.state.name.lower(),
                "value": one.value,
                "rounds": len(one.intermediate_values),
                "settings": dict(one.params),
                "error": one.user_attrs.get("error"),
            }
            for one in study.get_trials(deepcopy=False)
        ],
    }


def _begin(output: Path, search: Tune, base: Experiment) -> None:
    """Write tune.json, or check that it is of this study: trials of two are never mixed."""
    path, whole = output / MARKER, digests(base)[0]
    what = {"experiment": whole, "tune": msgspec.to_builtins(search)}
    what["tune"].pop("trials")  # a study may be made longer
    text = msgspec.json.format(msgspec.json.encode(what, order="deterministic"), indent=2) + b"\n"
    if path.exists():
        if path.read_bytes() != text:
            raise ConfigError(
                f"{output}: holds the trials of another experiment or another [tune]; name "
                "another output, or move it away"
            )
    elif any(not one.name.startswith(".") for one in output.iterdir()):
        raise ConfigError(
            f"{output}: a study needs a folder of its own, and this one is not empty; name "
            "another, or move this one away"
        )
    write_atomic(path, text)


def _without_test(experiment: Experiment) -> Experiment:
    return dataclasses.replace(experiment, test=None)


def _require_validation(path: Path, experiment: Experiment) -> None:
    if experiment.validation is None:
        raise ConfigError(
            f"{path}: tuning needs `validation`: settings are chosen on records that are neither "
            "the sites' nor the test's"
        )
    if experiment.engine == "flower":
        raise ConfigError(
            f'{path}: engine = "flower" cannot end a trial early: take "cohort" or "sequential"'
        )
