"""The numbers of a run for TensorBoard and MLflow, from its events: rounds and metrics, no records.

    events.jsonl ─► points: (round, name, value) ─► TensorBoard event files in the run's folder
                                                 └► MLflow's REST API, version 2.0

    round/…         update norm, seconds, bytes, deltas that counted, failures, examples
    coordinator/…   metrics on the coordinator's records
    sites/…         the mean of the sites' metrics, and of their training loss
    epsilon/…       of each site, as it says; of clients, as planned

What goes out is what the coordinator knows anyway and never more than is shown on its page: of a
client-private run only what is published. `Tracker` remembers in tracking.json which rounds have
been written, so a process that is started again goes on; a round whose writing was interrupted may
be written twice with the same values, never left out.

TensorBoard needs the package of that name (pip extra `tracking`). MLflow needs no package: a
server of version 2 or 3 is spoken to over HTTP (https://mlflow.org/docs/latest/rest-api.html:
experiments/get-by-name, experiments/create, runs/create, runs/log-batch, runs/update). A user name
and password, or a token, are taken from MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD and
MLFLOW_TRACKING_TOKEN, as MLflow's own clients do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import httpx
import msgspec

from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError, RunError
from anabranch.server.coordinator.page.run_log import RoundLog, RunLog
from anabranch.server.coordinator.page.run_view import training_loss
from anabranch.server.coordinator.settings import Tracking
from anabranch.storage.files import write_atomic

FILE = "tracking.json"
BATCH = 1000  # metrics in one runs/log-batch, MLflow's limit
TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Point:
    """One number of one round."""

    name: str
    round: int
    value: float
    at: float  # seconds since 1970


class Writer(Protocol):
    """Where points go."""

    def write(self, points: Sequence[Point]) -> None:
        """Take points, whole or not at all; RunError if it cannot now."""

    def close(self, finished: bool | None) -> None:
        """End: the run finished, failed, or (None) goes on in another process."""


class Kept(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """tracking.json: of every writer the last round that it has taken."""

    rounds: dict[str, int] = {}
    closed: set[str] = set()  # writers that know that the run is over
    mlflow_run: str | None = None


def points(log: RunLog, config: RunConfig | None, after: int, up_to: int) -> Iterator[Point]:
    """Yield the points of the rounds after < r ≤ up_to that are over.

    Of a run whose configuration cannot be read no more than of a client-private one.
    """
    hidden = config is None or config.client_privacy is not None
    for number in range(after + 1, up_to + 1):
        one = log.rounds.get(number)
        if one is None or one.ended is None:
            continue
        for name, value in _values(one, hidden):
            if value is not None:
                yield Point(name, number, float(value), one.ended)


def _values(one: RoundLog, hidden: bool) -> Iterator[tuple[str, float | None]]:
    if one.evaluated is not None:
        for name, value in sorted(one.evaluated.coordinator.items()):
            yield f"coordinator/{name}", value
    yield "epsilon/clients", one.epsilon
    if hidden:
        return
    merged = one.merged
    if one.evaluated is not None:
        for name, value in sorted(one.evaluated.client.items()):
            yield f"sites/{name}", value
    if merged is None:
        return
    counted = {name: one.trained[name] for name in one.counted if name in one.trained}
    yield "sites/training_loss", training_loss(counted.values())
    yield "round/update_norm", merged.update_norm
    yield "round/seconds", merged.seconds
    yield "round/bytes_up", merged.bytes_up
    yield "round/bytes_down", merged.bytes_down
    yield "round/examples", merged.num_examples
    yield "round/deltas", len(merged.sites)
    yield "round/failures", len(one.failed)
    for name, event in sorted(counted.items()):
        yield f"epsilon/{name}", event.epsilon


class TensorBoard:
    """One event file in `folder` for as long as this lives; a later one goes on in another.

    Raises ConfigError if the package is not installed.
    """

    def __init__(self, folder: Path) -> None:
        if find_spec("tensorboard") is None:
            raise ConfigError(
                "[tracking] tensorboard = true needs the package tensorboard, and it is not "
                "installed: pip install 'anabranch[tracking]'"
            )
        self._folder = folder
        self._file: Any = None

    def write(self, points: Sequence[Point]) -> None:
        """Append the points; the file holds them when this returns."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        try:
            self._file = self._file or EventFileWriter(str(self._folder))
            for one in points:
                value = Summary.Value(tag=one.name, simple_value=one.value)
                summary = Summary(value=[value])
                self._file.add_event(Event(wall_time=one.at, step=one.round, summary=summary))
            self._file.flush()
        except OSError as error:
            self._file = None
            raise RunError(f"TensorBoard: {self._folder}: {error}") from None

    def close(self, finished: bool | None) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class MLflow:
    """One MLflow run on a tracking server, through its REST API 2.0.

    `run` is the id of the MLflow run that is gone on with; None: a new one, made by the first
    `write`. Raises RunError if the server cannot be reached or refuses.
    """

    def __init__(
        self, uri: str, experiment: str, name: str, tags: Mapping[str, str], run: str | None = None
    ) -> None:
        if not uri.startswith(("http://", "https://")):
            raise ConfigError(
                f"[tracking] mlflow: expected the address of a tracking server, such as "
                f"http://127.0.0.1:5000, got {uri!r}"
            )
        self.run = run
        self._experiment, self._name, self._tags = experiment, name, dict(tags)
        self._uri = uri.rstrip("/")
        self._http = httpx.Client(timeout=TIMEOUT_S, auth=_auth(), headers=_headers())

    def write(self, points: Sequence[Point]) -> None:
        """Log the points as metrics, the round as their step."""
        self.begin(min(one.at for one in points))
        for start in range(0, len(points), BATCH):
            metrics = [
                {
                    "key": one.name,
                    "value": one.value,
                    "timestamp": int(1000 * one.at),
                    "step": one.round,
                }
                for one in points[start : start + BATCH]
            ]
            self._post("runs/log-batch", {"run_id": self.run, "metrics": metrics})

    def close(self, finished: bool | None) -> None:
        """Say that the run is over, if it is; close the connection."""
        if finished is not None and self.run is not None:
            status = "FINISHED" if finished else "FAILED"
            self._post("runs/update", {"run_id": self.run, "status": status})
        self._http.close()

    def begin(self, at: float) -> None:
        """Make the MLflow run, if there is none yet; it began at `at`."""
        if self.run is not None:
            return
        asked = {
            "experiment_id": self._experiment_id(),
            "run_name": self._name,
            "start_time": int(1000 * at),
            "tags": [{"key": key, "value": value} for key, value in sorted(self._tags.items())],
        }
        self.run = str(self._post("runs/create", asked)["run"]["info"]["run_id"])

    def _experiment_id(self) -> str:
        query = {"experiment_name": self._experiment}
        found = self._call("GET", "experiments/get-by-name", params=query)
        if found.status_code == 404:
            made = self._post("experiments/create", {"name": self._experiment})
            return str(made["experiment_id"])
        return str(self._said(found)["experiment"]["experiment_id"])

    def _post(self, call: str, body: Mapping[str, Any]) -> Any:
        return self._said(self._call("POST", call, json=body))

    def _call(self, method: str, call: str, **given: Any) -> httpx.Response:
        try:
            return self._http.request(method, f"{self._uri}/api/2.0/mlflow/{call}", **given)
        except httpx.TransportError as error:
            raise RunError(f"MLflow at {self._uri}: {type(error).__name__}: {error}") from None

    def _said(self, answer: httpx.Response) -> Any:
        try:
            said = answer.json() if answer.content else {}
        except ValueError:
            said = {}
        if answer.status_code >= 400:
            why = said.get("message", "") if isinstance(said, dict) else ""
            raise RunError(f"MLflow at {self._uri}: HTTP {answer.status_code} {str(why)[:200]}")
        return said


def require(settings: Tracking) -> None:
    """Raise ConfigError if a writer that is asked for cannot be made here."""
    if settings.tensorboard:
        TensorBoard(Path())
    if settings.mlflow is not None:
        MLflow(settings.mlflow, settings.experiment, "", {}).close(None)


def _auth() -> httpx.BasicAuth | None:
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    return httpx.BasicAuth(user, os.environ.get("MLFLOW_TRACKING_PASSWORD", "")) if user else None


def _headers() -> dict[str, str]:
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return {"authorization": f"Bearer {token}"} if token else {}


class Tracker:
    """Keeps the writers of one run up to date, wherever an earlier process stopped."""

    def __init__(self, settings: Tracking, folder: Path, run: str, name: str) -> None:
        self._file = folder / FILE
        self._kept = _kept(self._file)
        self._writers: dict[str, Writer] = {}
        self._mlflow: MLflow | None = None
        if settings.tensorboard:
            self._writers["tensorboard"] = TensorBoard(folder / "tensorboard")
        if settings.mlflow is not None:
            tags = {"anabranch.run": run, "anabranch.name": name}
            old = self._kept.mlflow_run
            self._mlflow = MLflow(settings.mlflow, settings.experiment, run, tags, old)
            self._writers["mlflow"] = self._mlflow

    def catch_up(self, log: RunLog, config: RunConfig | None, state: str) -> None:
        """Write what is over and was not written.

        Every writer goes on where it stopped, whatever happens to the others. Raises RunError
        with what went wrong at any of them; the next call tries again.
        """
        problems = []
        for name, writer in self._writers.items():
            if name in self._kept.closed:
                continue
            try:
                self._write(name, writer, log, config)
                if state in ("finished", "failed"):
                    writer.close(state == "finished")
                    self._kept.closed.add(name)
                    self._keep()
            except RunError as error:
                problems.append(str(error))
        if problems:
            raise RunError("; ".join(problems))

    def close(self) -> None:
        """Let the writers go; the run may go on in another process."""
        for name, writer in self._writers.items():
            if name not in self._kept.closed:
                writer.close(None)

    def _write(self, name: str, writer: Writer, log: RunLog, config: RunConfig | None) -> None:
        before = self._kept.rounds.get(name, 0)
        last = max((n for n, one in log.rounds.items() if one.ended is not None), default=0)
        new = list(points(log, config, before, last))
        if not new:
            return
        if writer is self._mlflow:
            self._mlflow.begin(new[0].at)
            self._keep()  # before anything is sent: a process that is killed makes no second run
        writer.write(new)
        self._kept.rounds[name] = last
        self._keep()

    def _keep(self) -> None:
        if self._mlflow is not None:
            self._kept.mlflow_run = self._mlflow.run
        write_atomic(self._file, msgspec.json.encode(self._kept))


def _kept(file: Path) -> Kept:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Kept)
    except FileNotFoundError:
        return Kept()
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"{file}: {error}; delete it, and all rounds are written once more"
        ) from None
