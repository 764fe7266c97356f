"""Peers of a benchmark, each in a process and an environment of its own, asked in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.harness import ROOT

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def device_python() -> Path:
    """Return the interpreter of the device's environment; `make test` makes it."""
    path = Path(os.environ.get("ANABRANCH_EDGE_PYTHON", ROOT / ".venv-edge" / "bin" / "python"))
    if not path.exists():
        raise SystemExit(f"{path} is missing: run `make .venv-edge/installed`")
    return path


class Process:
    """A worker script that answers JSON lines."""

    def __init__(self, script: str, python: Path | None = None) -> None:
        self._run = subprocess.Popen(
            [str(python or sys.executable), str(HERE / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )

    def ask(self, op: str, **fields: Any) -> Any:
        """Return the answer to one request; RuntimeError if the process has ended."""
        pipes = self._run.stdin, self._run.stdout
        if pipes[0] is None or pipes[1] is None:
            raise RuntimeError("the worker has no pipes")
        pipes[0].write(json.dumps({"op": op, **fields}) + "\n")
        pipes[0].flush()
        line = pipes[1].readline()
        if not line:
            raise RuntimeError(f"the worker ended in {op} with status {self._run.wait()}")
        return json.loads(line)

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._run.communicate()
