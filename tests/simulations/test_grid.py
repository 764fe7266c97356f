from __future__ import annotations

import os
import threading
from typing import cast

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from flwr.supercore import telemetry

from anabranch.simulations.grid import QUIET, InProcessGrid, quiet
from tests.simulations.rig import VirtualTime


def counting_app() -> ClientApp:
    """Adds 1 to every array, counts its own messages in its state, and spoils what it was sent."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        state = context.state.metric_records.get("state", MetricRecord({"seen": 0}))
        seen = cast(int, state["seen"]) + 1
        context.state["state"] = MetricRecord({"seen": seen})
        arrays = message.content.array_records["arrays"].to_numpy_ndarrays()
        del message.content["arrays"]
        message.content["spoiled"] = ConfigRecord({"by": str(context.node_config["site"])})
        content = RecordDict(
            {
                "arrays": ArrayRecord([a + 1 for a in arrays]),
                "metrics": MetricRecord({"num-examples": 10, "seen": seen}),
            }
        )
        return Message(content, reply_to=message)

    return app


def message(node: int, content: RecordDict | None = None) -> Message:
    arrays = ArrayRecord([np.zeros((3, 5), np.float32)])
    return Message(content or RecordDict({"arrays": arrays}), node, "train")


def test_a_strategy_of_flower_runs_on_it_unchanged() -> None:
    with InProcessGrid(counting_app(), ["a", "b", "c"], workers=2) as grid:
        strategy = FedAvg(fraction_evaluate=0.0)
        result = strategy.start(
            grid, ArrayRecord([np.zeros((3, 5), np.float32)]), num_rounds=4, timeout=60
        )

    np.testing.assert_array_equal(result.arrays.to_numpy_ndarrays()[0], np.full((3, 5), 4.0))
    assert result.train_metrics_clientapp[4]["seen"] == 4


def test_every_client_gets_records_of_its_own() -> None:
    shared = message(0).content
    with InProcessGrid(counting_app(), ["a", "b"]) as grid:
        replies = grid.send_and_receive(
            [message(node, shared) for node in grid.get_node_ids()], timeout=30
        )

    assert all(reply.has_content() for reply in replies)
    assert set(shared) == {"arrays"}


def test_replies_carry_the_id_of_what_they_answer_and_come_once() -> None:
    with InProcessGrid(counting_app(), ["a", "b"]) as grid:
        ids = grid.push_messages([message(node) for node in grid.get_node_ids()])
        grid.wait(ids)
        replies = grid.pull_messages(ids)

        assert [reply.metadata.reply_to_message_id for reply in replies] == ids
        assert [reply.metadata.src_node_id for reply in replies] == grid.get_node_ids()
        assert grid.pull_messages(ids) == []


def test_nodes_know_their_site_and_their_partition() -> None:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        config = ConfigRecord(dict(context.node_config.items()))
        return Message(RecordDict({"config": config}), reply_to=message)

    with InProcessGrid(app, ["a", "b"], node_ids=[90, 80]) as grid:
        replies = grid.send_and_receive([Message(RecordDict(), 80, "query")], timeout=30)

    assert dict(replies[0].content.config_records["config"]) == {
        "site": "b",
        "partition-id": 1,
        "num-partitions": 2,
    }


def test_an_exception_in_a_client_is_an_error_reply() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise ValueError("broken")

    with InProcessGrid(app, ["a"]) as grid:
        (reply,) = grid.send_and_receive([message(1001)], timeout=30)

    assert reply.has_error()
    assert reply.error.code == 2
    assert reply.error.reason == "<class 'ValueError'>:<'broken'>"


def test_a_message_to_a_node_that_is_not_there_is_an_error_reply() -> None:
    with InProcessGrid(counting_app(), ["a"]) as grid:
        (reply,) = grid.send_and_receive([message(7)], timeout=30)

    assert reply.has_error()


def test_a_client_that_never_answers_holds_up_nobody_else() -> None:
    release = threading.Event()
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config["site"] == "a":
            release.wait()
        return Message(RecordDict(), reply_to=message)

    with InProcessGrid(app, ["a", "b"], workers=2) as grid:
        hung, well = grid.push_messages([message(1001), message(1002)])
        grid.wait([well])

        assert len(grid.pull_messages([hung, well])) == 1
        assert grid.send_and_receive([], timeout=0) == []
        release.set()
        grid.wait([hung])
        assert len(grid.pull_messages([hung])) == 1


def test_as_many_clients_work_at_a_time_as_there_are_workers() -> None:
    together = threading.Barrier(3)
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        together.wait(timeout=30)
        return Message(RecordDict(), reply_to=message)

    with InProcessGrid(app, ["a", "b", "c"], workers=3) as grid:
        replies = grid.send_and_receive([message(n) for n in grid.get_node_ids()], timeout=30)

    assert all(reply.has_content() for reply in replies)


def test_a_grid_needs_sites_and_workers() -> None:
    with pytest.raises(ValueError, match="expected sites and workers, got 0 and 1"):
        InProcessGrid(counting_app(), [])


def test_nothing_is_sent_to_flower_or_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in QUIET:
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(telemetry, "FLWR_TELEMETRY_ENABLED", "1")

    quiet()

    assert telemetry.FLWR_TELEMETRY_ENABLED == "0"
    assert os.environ["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_virtual_time_passes_only_in_sleep() -> None:
    time = VirtualTime()
    time.sleep(2.5)

    assert time.clock() == 2.5
