"""Engines in processes of their own, which run a round when they are asked for one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.harness import ROOT
from benchmarks.simulation.peer import JOBS, Job, dump

HERE = Path(__file__).resolve().parent
TAIL = 3000  # characters of a failed worker's log that are shown


def peers_python() -> Path:
    """Return the interpreter of the peers' environment; SystemExit if it is not there."""
    place = os.environ.get("ANABRANCH_PEERS_PYTHON", ROOT / ".venv-peers" / "bin" / "python")
    if not Path(place).exists():
        raise SystemExit(f"{place} is missing: run `make .venv-peers/installed`")
    return Path(place)


@dataclass(eq=False)
class Laps:
    """What an engine reported: seconds and CPU seconds of every round, and the loss."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    loss: float | None = None


class Engine:
    """A worker script, or several processes of it that work together, with its jobs in order."""

    def __init__(
        self, script: str, jobs: Sequence[Job], *, python: Path | None = None, ranks: int = 1
    ) -> None:
        """`ranks` processes form one torch.distributed group. Jobs have the same threads."""
        self.laps = {job.workload: Laps() for job in jobs}
        self.started = time.perf_counter()
        self._logs = [tempfile.TemporaryFile() for _ in range(ranks)]  # noqa: SIM115 - closed below
        groups: Sequence[dict[str, str]] = [{}] if ranks == 1 else _ranks(ranks)
        settings = {
            "OMP_NUM_THREADS": str(jobs[0].threads),
            "HF_HUB_OFFLINE": "1",
            JOBS: dump(jobs),
        }
        self._runs = [
            subprocess.Popen(
                [str(python or sys.executable), str(HERE / script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | settings | group,
            )
            for group, log in zip(groups, self._logs, strict=True)
        ]
        self._ready: set[str] = set()

    @property
    def pid(self) -> int:
        """Return the process id of the first worker."""
        return self._runs[0].pid

    def ready(self, workload: str) -> None:
        """Wait until the first round of a job can be asked for."""
        if workload not in self._ready:
            self._answers()
            self._ready.add(workload)

    def round(self, workload: str) -> None:
        """Run one round of a job, and note what it took. Jobs are done in their order."""
        self.ready(workload)
        for run in self._runs:
            if run.stdin is not None:
                run.stdin.write("\n")
                run.stdin.flush()
        answers = self._answers()
        laps = self.laps[workload]
        laps.seconds.append(max(answer["seconds"] for answer in answers))
        laps.cpu.append(sum(answer["cpu"] for answer in answers))
        laps.loss = answers[0].get("loss", laps.loss)

    def _answers(self) -> list[dict[str, Any]]:
        lines = [run.stdout.readline() if run.stdout else "" for run in self._runs]
        for run, line, log in zip(self._runs, lines, self._logs, strict=True):
            if not line:
                status = run.wait()
                log.seek(0)
                text = log.read().decode(errors="replace")[-TAIL:]
                raise RuntimeError(f"{run.args!r} ended with status {status}:\n{text}")
        return [json.loads(line) for line in lines]

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for run in self._runs:
            if kind is not None:
                run.terminate()
            run.communicate()
        for log in self._logs:
            log.close()


def _ranks(count: int) -> list[dict[str, str]]:
    """Return what torch.distributed reads of its group from the environment, for each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    return [
        common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "simulation"}
        for rank in range(count)
    ]
