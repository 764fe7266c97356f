"""Workers on this machine: processes of one thread each, which live as long as the run."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from anabranch.protocols.errors import RunError
from anabranch.simulations.clients import Clients
from anabranch.simulations.cohort.precision import BaseDtype
from anabranch.simulations.cohort.shard import Answers, Batch, Shard

END_S = 5.0  # a worker that does not end by then is ended


@contextmanager
def local_workers(
    clients: Clients, count: int, base_dtype: BaseDtype = "fp32"
) -> Iterator[Sequence[_Process]]:
    """Yield `count` workers; `clients` is pickled for each of them.

    As always with processes that are spawned, a script that calls this does so under
    `if __name__ == "__main__":`.
    """
    context = multiprocessing.get_context("spawn")
    workers = []
    try:
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, clients, base_dtype), daemon=True)
            process.start()
            there.close()
            workers.append(_Process(process, here))
        yield workers
    finally:
        for worker in workers:
            worker.end()


class _Process:
    """A worker in a process of its own."""

    def __init__(self, process: BaseProcess, connection: Connection) -> None:
        self._process, self._connection = process, connection

    def send(self, batch: Batch) -> None:
        try:
            self._connection.send(batch)
        except OSError:
            raise self._gone() from None

    def receive(self) -> Answers:
        try:
            answers: Answers | str = self._connection.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        if isinstance(answers, str):
            raise RunError(f"a worker process failed: {answers}")
        return answers

    def end(self) -> None:
        """Let it end; it has nothing to write."""
        self._connection.close()
        self._process.join(END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()

    def _gone(self) -> RunError:
        self._process.join(END_S)
        return RunError(
            f"a worker process died (exit code {self._process.exitcode}; -9 is what a system "
            "short of memory does): lower workers, the cohort, or training.cache_bytes"
        )


def _work(connection: Connection, clients: Clients, base_dtype: BaseDtype) -> None:
    """Answer batches until the coordinator closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the coordinator's to handle
    shard: Shard | None = None
    while True:
        try:
            batch: Batch = connection.recv()
        except (EOFError, OSError):
            return
        try:
            shard = shard or Shard(clients, base_dtype)
            answers: Answers | str = shard.answer(batch)
        except Exception as error:  # noqa: BLE001 - the boundary of a process: its error is told
            answers = f"{type(error).__name__}: {error}"
        connection.send(answers)
