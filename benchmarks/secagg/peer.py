"""Flower's SecAgg+ in this process: its own client mod and server workflow, all clients real.

The workflow is the legacy one, the only one that Flower 1.41 has. It is given a grid that hands
every message to the mod at once and times that call, and a strategy that neither trains nor
merges. What a client trained is made outside the timed part. The workflow's quantisation is
wrapped, so that the integer sum that comes out can be compared with the sum of what went in.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common import Code, FitIns, FitRes, Status, ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.common.serde import config_record_to_proto
from flwr.compat.common import recorddict_compat
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.workflow import SecAggPlusWorkflow
from numpy.typing import NDArray

from anabranch.simulations.grid import begin_run, number, own_copy, quiet
from benchmarks.secagg.ours import HEAVIEST, Cost, examples, update

# Modules of the same name as what is in them: a plain import would give the function.
MOD: Any = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
WORKFLOW: Any = importlib.import_module(
    "flwr.server.workflow.secure_aggregation.secaggplus_workflow"
)
FIRST_ID = 1001


@dataclass(frozen=True)
class Found:
    """What a run of the peer gave."""

    costs: Sequence[Cost]  # per client
    exact: bool  # the integer sum, before it is turned into floats


class SecAggPlus:
    """One sum among `clients` of vectors with `values` values.

    A key is cut into `shares`, for a client's neighbours and itself.
    """

    def __init__(self, clients: int, values: int, *, shares: int, threshold: int) -> None:
        quiet()
        begin_run()
        logging.getLogger("flwr").setLevel(logging.CRITICAL)
        self._values, self._ids = values, range(FIRST_ID, FIRST_ID + clients)
        self._contexts = {node: _context(node) for node in self._ids}
        self._workflow = SecAggPlusWorkflow(
            1.0 if shares == clients else shares, threshold, max_weight=float(HEAVIEST)
        )
        self._costs = [Cost() for _ in self._ids]
        self._aside = 0.0  # CPU seconds of what is ours within a timed call
        self._went_in: NDArray[np.int64] | None = None
        self._came_out: NDArray[np.int64] | None = None
        self._beside: Iterator[None] = iter(())

    def run(self, beside: Iterator[None]) -> Found:
        """Run to the end; `beside` takes a turn after every message, and what is left at the end.

        Raises RuntimeError when Flower opened no sum.
        """
        self._beside = beside
        with self._watched():
            self._workflow(self, self._server())  # type: ignore[arg-type]
        for _ in beside:
            pass
        if self._went_in is None or self._came_out is None:
            raise RuntimeError("SecAgg+ opened no sum; run it again with flwr's log switched on")
        return Found(self._costs, bool(np.array_equal(self._went_in, self._came_out)))

    # What the workflow asks of a Grid

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Answer every message in its turn; an exception of the client's is not caught."""
        replies = []
        for message in messages:
            replies.append(self._answer(message))
            next(self._beside, None)
        return replies

    # What it asks of a Strategy

    def configure_fit(self, *_: object) -> list[tuple[_Proxy, FitIns]]:
        """Return whom to ask, and a model of no size: what is sent to be trained is not counted."""
        return [(_Proxy(node), FitIns(ndarrays_to_parameters([]), {})) for node in self._ids]

    def aggregate_fit(self, *_: object) -> tuple[None, dict[str, Any]]:
        """Merge nothing."""
        return None, {}

    def _answer(self, message: Message) -> Message:
        number(message)
        index = message.metadata.dst_node_id - FIRST_ID
        cost, asked = self._costs[index], message.content.config_records[RECORD_KEY_CONFIGS]
        last = asked[Key.STAGE] == Stage.COLLECT_MASKED_VECTORS
        trained = self._trained(index) if last else RecordDict()
        copy, self._aside = own_copy(message), 0.0
        context = self._contexts[message.metadata.dst_node_id]
        started = time.process_time()
        reply: Message = MOD.secaggplus_mod(
            copy, context, lambda m, _: Message(trained, reply_to=m)
        )
        spent = time.process_time() - started - self._aside
        cost.seconds[str(asked[Key.STAGE])] = spent
        cost.down += _size(asked)
        cost.up += _size(reply.content.config_records[RECORD_KEY_CONFIGS])
        number(reply)
        return reply

    def _trained(self, index: int) -> RecordDict:
        parameters = ndarrays_to_parameters([update(index, self._values)])
        result = FitRes(Status(Code.OK, ""), parameters, examples(index), {})
        return recorddict_compat.fitres_to_recorddict(result, keep_input=False)

    def _server(self) -> LegacyContext:
        context = LegacyContext(Context(1, 1, {}, RecordDict(), {}), strategy=self)  # type: ignore[arg-type]
        state, none = context.state, ndarrays_to_parameters([])
        state.config_records[WORKFLOW.MAIN_CONFIGS_RECORD] = ConfigRecord(
            {WORKFLOW.WorkflowKey.CURRENT_ROUND: 1}
        )
        state.array_records[WORKFLOW.MAIN_PARAMS_RECORD] = (
            recorddict_compat.parameters_to_arrayrecord(none, keep_input=False)
        )
        return context

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Note the integers that go into the masks, and those that come out of them."""
        combine, extract = MOD.factor_combine, WORKFLOW.factor_extract

        def combined(factor: int, arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
            whole: list[NDArray[Any]] = combine(factor, arrays)
            started = time.process_time()
            flat = np.concatenate([array.ravel().astype(np.int64) for array in whole])
            self._went_in = flat if self._went_in is None else self._went_in + flat
            self._aside = time.process_time() - started
            return whole

        def extracted(arrays: list[NDArray[Any]]) -> tuple[int, list[NDArray[Any]]]:
            self._came_out = np.concatenate([array.ravel() for array in arrays])
            found: tuple[int, list[NDArray[Any]]] = extract(arrays)
            return found

        MOD.factor_combine, WORKFLOW.factor_extract = combined, extracted
        try:
            yield
        finally:
            MOD.factor_combine, WORKFLOW.factor_extract = combine, extract


@dataclass(frozen=True)
class _Proxy:
    """What the workflow asks of a ClientProxy."""

    node_id: int


def _context(node: int) -> Context:
    return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})


def _size(record: ConfigRecord) -> int:
    """Return the bytes of a record on Flower's wire."""
    return int(config_record_to_proto(record).ByteSize())
