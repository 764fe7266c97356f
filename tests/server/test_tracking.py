from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from anabranch.protocols.config import parse
from anabranch.protocols.errors import ConfigError, RunError
from anabranch.server import tracking
from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.page.trackers import Trackers
from anabranch.server.coordinator.page.view import Watcher, view
from anabranch.server.coordinator.settings import Tracking
from anabranch.server.tracking import Point, Tracker, points
from tests.page_cases import NOW, make, ran
from tests.runs import table_text


class Server(ThreadingHTTPServer):
    """Takes what MLflow's REST API 2.0 takes, as far as it is used, and remembers it."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.calls: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.broken = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, call: str, given: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.calls.append(call)
        if self.broken:
            return 500, {"error_code": "INTERNAL_ERROR", "message": "the store is full"}
        match call:
            case "experiments/get-by-name":
                found = self.experiments.get(given["experiment_name"])
                if found is None:
                    return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no"}
                return 200, {"experiment": {"experiment_id": found}}
            case "experiments/create":
                self.experiments[given["name"]] = number = str(len(self.experiments) + 1)
                return 200, {"experiment_id": number}
            case "runs/create":
                run = f"run-{len(self.runs)}"
                self.runs[run] = {**given, "metrics": []}
                return 200, {"run": {"info": {"run_id": run}}}
            case "runs/log-batch":
                assert len(given["metrics"]) <= 1000
                self.runs[given["run_id"]]["metrics"] += given["metrics"]
                return 200, {}
            case "runs/update":
                self.runs[given["run_id"]]["status"] = given["status"]
                return 200, {}
        return 404, {"error_code": "ENDPOINT_NOT_FOUND"}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self._answer(parts.path, {key: one for key, (one,) in parse_qs(parts.query).items()})

    def do_POST(self) -> None:
        self._answer(self.path, json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def _answer(self, path: str, given: dict[str, Any]) -> None:
        self.server.headers.append(dict(self.headers))
        status, said = self.server.answer(path.removeprefix("/api/2.0/mlflow/"), given)
        body = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def mlflow(port: int = 0) -> Iterator[Server]:
    server = Server(port)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return make(tmp_path / "heart")


def with_tracking(federation: Federation, table: str) -> Federation:
    file = federation.folder / "coordinator.toml"
    before = file.read_text().partition("[tracking]")[0]  # the last table of a new file
    file.write_text(f"{before}\n[tracking]\n{table}\n")
    return Federation(federation.folder)


def known(federation: Federation, run: str) -> Any:
    return next(one for one in Watcher(federation).facts(NOW).runs if one.entry.run == run)


# -- points ----------------------------------------------------------------------------------------


def test_the_points_are_the_rounds_that_are_over_each_once(federation: Federation) -> None:
    folder = ran(federation, "toy-1", rounds=3)
    folder.event("round_started", round=4, sites=["cork"])
    one = known(federation, "toy-1")

    found = list(points(one.log, one.config, 0, 4))

    assert {point.round for point in found} == {1, 2, 3}
    assert len({(point.name, point.round) for point in found}) == len(found)
    assert found == [
        *points(one.log, one.config, 0, 1),
        *points(one.log, one.config, 1, 2),
        *points(one.log, one.config, 2, 4),
    ]
    assert {p.value for p in found if p.name == "round/deltas"} == {4.0}
    assert {p.value for p in found if p.name == "sites/training_loss"} == {0.25}


def test_epsilon_of_each_site_goes_out_as_the_coordinator_knows_it(federation: Federation) -> None:
    folder = ran(federation, "toy-1", rounds=1)
    folder.event("site_trained", site="cork", round=2, num_examples=9, epsilon=1.5)
    folder.event("round_aggregated", round=2, sites=["cork"], num_examples=9)
    one = known(federation, "toy-1")

    spent = [p for p in points(one.log, one.config, 1, 2) if p.name.startswith("epsilon/")]

    assert [(p.name, p.round, p.value) for p in spent] == [("epsilon/cork", 2, 1.5)]


def test_of_a_client_private_run_nothing_goes_out_that_tells_who_took_part(
    federation: Federation,
) -> None:
    folder = ran(federation, "toy-1", rounds=2)
    folder.event("client_noise", round=1, epsilon=0.5)
    one = known(federation, "toy-1")
    private = parse(
        table_text(
            ("rounds = 2", 'rounds = 2\ncohort = 2\nweighting = "uniform"'),
            extra="\n[client_privacy]\nepsilon = 8.0\npopulation = 4\n",
        ),
        source="run.toml",
    )

    for config in (private, None):
        names = {point.name for point in points(one.log, config, 0, 2)}
        assert names == {"epsilon/clients"}


# -- TensorBoard -----------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(one.step, one.value) for one in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_reads_back_what_was_written_also_by_two_processes(
    federation: Federation,
) -> None:
    folder = ran(federation, "toy-1", rounds=2)
    one, settings = known(federation, "toy-1"), Tracking(tensorboard=True)
    first = Tracker(settings, folder.path, "toy-1", "tiny")
    first.catch_up(one.log, one.config, "running")
    first.close()
    folder.event("round_aggregated", round=3, sites=["cork"], num_examples=9, update_norm=0.5)
    one = known(federation, "toy-1")
    second = Tracker(settings, folder.path, "toy-1", "tiny")

    second.catch_up(one.log, one.config, "finished")
    second.catch_up(one.log, one.config, "finished")

    found = read(folder.path / "tensorboard")
    assert found["round/deltas"] == [(1, 4.0), (2, 4.0), (3, 1.0)]
    assert found["sites/training_loss"] == [(1, 0.25), (2, 0.25)]
    assert [step for step, _ in found["round/update_norm"]] == [1, 2, 3]


def test_without_the_package_it_says_which_extra_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)

    with pytest.raises(ConfigError, match=r"pip install 'anabranch\[tracking\]'"):
        tracking.require(Tracking(tensorboard=True))
    tracking.require(Tracking())


# -- MLflow ----------------------------------------------------------------------------------------


def test_mlflow_gets_one_run_with_every_round_once(federation: Federation) -> None:
    folder = ran(federation, "toy-1", rounds=3)
    one = known(federation, "toy-1")
    with mlflow() as server:
        settings = Tracking(mlflow=server.address + "/", experiment="hearts")
        for state in ("running", "running", "finished", "finished"):  # a process each
            tracker = Tracker(settings, folder.path, "toy-1", "tiny")
            tracker.catch_up(one.log, one.config, state)
            tracker.close()

    ((_, run),) = server.runs.items()
    assert server.experiments == {"hearts": run["experiment_id"]}
    assert run["run_name"] == "toy-1"
    assert {"key": "anabranch.name", "value": "tiny"} in run["tags"]
    assert run["status"] == "FINISHED"
    logged = [(m["key"], m["step"], m["value"]) for m in run["metrics"]]
    assert logged == [(p.name, p.round, p.value) for p in points(one.log, one.config, 0, 3)]
    assert run["metrics"][0]["timestamp"] == int(1000 * one.log.rounds[1].ended)
    assert server.calls.count("runs/update") == 1


def test_many_points_go_in_pieces_that_the_server_takes() -> None:
    with mlflow() as server:
        writer = tracking.MLflow(server.address, "hearts", "toy-1", {})
        writer.write([Point("round/deltas", number, 1.0, NOW) for number in range(2500)])
        writer.close(finished=False)

    assert server.calls.count("runs/log-batch") == 3
    assert len(server.runs["run-0"]["metrics"]) == 2500
    assert server.runs["run-0"]["status"] == "FAILED"


def test_a_server_that_is_away_or_refuses_is_tried_again_and_gets_all(
    federation: Federation,
) -> None:
    folder = ran(federation, "toy-1", rounds=2)
    one = known(federation, "toy-1")
    with mlflow() as server:
        port = server.server_port
        settings = Tracking(mlflow=server.address, tensorboard=True)
    tracker = Tracker(settings, folder.path, "toy-1", "tiny")
    with pytest.raises(RunError, match=r"MLflow at http://127.0.0.1:\d+: ConnectError"):
        tracker.catch_up(one.log, one.config, "finished")
    assert [step for step, _ in read(folder.path / "tensorboard")["round/deltas"]] == [1, 2]

    with mlflow(port) as server:
        server.broken = True
        with pytest.raises(RunError, match="HTTP 500 the store is full"):
            tracker.catch_up(one.log, one.config, "finished")
        server.broken = False
        tracker.catch_up(one.log, one.config, "finished")

    assert len(server.runs) == 1
    assert server.runs["run-0"]["status"] == "FINISHED"
    assert [step for step, _ in read(folder.path / "tensorboard")["round/deltas"]] == [1, 2]


def test_credentials_come_from_the_environment_and_go_nowhere_else(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "s3cret")
    folder = ran(federation, "toy-1", rounds=1)
    one = known(federation, "toy-1")
    with mlflow() as server:
        server.broken = True
        tracker = Tracker(Tracking(mlflow=server.address), folder.path, "toy-1", "tiny")
        with pytest.raises(RunError) as refused:
            tracker.catch_up(one.log, one.config, "running")
        server.broken = False
        tracker.catch_up(one.log, one.config, "running")
        tracker.close()

    assert {one["authorization"] for one in server.headers} == {"Bearer s3cret"}
    assert "s3cret" not in str(refused.value)
    assert "s3cret" not in (folder.path / "tracking.json").read_text()


@pytest.mark.parametrize("address", ["file:/srv/mlruns", "mlruns", "ftp://x"])
def test_an_address_that_is_no_server_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="expected the address of a tracking server"):
        tracking.require(Tracking(mlflow=address))


# -- beside the page -------------------------------------------------------------------------------


def test_all_runs_are_followed_and_trouble_is_an_alert(federation: Federation) -> None:
    ran(federation, "toy-1", rounds=1)
    ran(federation, "toy-2", rounds=1)
    with mlflow() as server:
        followed = with_tracking(federation, f'mlflow = "{server.address}"')
        server.broken = True
        trackers = Trackers(followed, now=lambda: NOW)
        assert trackers.wanted
        trackers.look()
        shown = trackers.alerted(view(followed, NOW))
        assert [(a.level, a.about) for a in shown.alerts if a.kind == "tracking"] == [
            ("problem", "coordinator")
        ]
        server.broken = False
        trackers.look()
        trackers.look()

    assert trackers.problem == ""
    assert sorted(run["run_name"] for run in server.runs.values()) == ["toy-1", "toy-2"]
    plain = view(followed, NOW)
    assert trackers.alerted(plain) is plain
    assert not Trackers(federation).wanted
