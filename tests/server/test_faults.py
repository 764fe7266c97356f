"""What sites may do wrong in a round, and what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from anabranch.client.flower import DESCRIBE, client_app
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import DataError, PrivacyError, RunError
from anabranch.protocols.messages import Assignment, Trained
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec
from anabranch.server.aggregation.fedavg import fedavg
from anabranch.server.result import Result
from tests.simulations.federation import NAMES, POLL_S, Federation, arrays_of, value
from tests.simulations.rig import (
    NEVER,
    SIZES,
    SPEC,
    ToySite,
    adapter,
    app_of,
    config,
    replace_frame,
    rewrite,
    with_value,
)


def only_failure(result: Result, site: str = "bergen") -> tuple[str, str]:
    """Return reason and message of the one failure of a run of one round."""
    (report,) = result.history
    assert set(report.failed) == {site}
    assert set(report.trained) == set(report.asked) - {site}
    return report.failed[site].reason, report.failed[site].message


# Connecting


def test_too_few_sites_end_the_run_with_their_names_after_connect_s() -> None:
    federation = Federation(run=config(quorum=3), connect_s=90.0)
    federation.grid.offline = {"bergen", "cork"}

    with pytest.raises(
        RunError,
        match=r"round 1: 3 sites are needed, after 90 s there are 2 \(aarhus, delft\); start",
    ):
        federation.run()
    assert federation.time.now == 90.0


def test_the_first_round_waits_for_the_whole_cohort() -> None:
    federation = Federation(run=config(rounds=1, cohort=4))
    federation.grid.offline = {"delft"}
    wake = federation.time.sleep

    def sleep(seconds: float) -> None:
        wake(seconds)
        if federation.time.now >= 30:
            federation.grid.offline = set()

    federation.engine._exchange._sleep = sleep

    assert federation.run().history[0].asked == tuple(NAMES)
    assert 30 <= federation.time.now < 60


def test_a_site_that_joins_later_takes_part_from_then_on() -> None:
    federation = Federation(run=config(rounds=2))
    federation.grid.offline = {"delft"}
    federation.engine._checkpoint = lambda number, adapter: federation.grid.offline.clear()

    assert [r.asked for r in federation.run().history] == [tuple(NAMES[:3]), tuple(NAMES)]


def test_two_nodes_of_one_name_are_both_left_out() -> None:
    sites = [ToySite("a"), ToySite("b")]
    federation = Federation(sites, run=config(rounds=1), order=["a", "b", "a"])

    assert federation.run().history[0].asked == ("b",)

    federation = Federation([ToySite("a")], run=config(rounds=1), order=["a", "a"])
    with pytest.raises(RunError, match="a: 2 nodes have this name; give every site its own"):
        federation.run()


def test_a_site_whose_records_break_the_contract_does_not_take_part() -> None:
    class Empty(ToySite):
        def sizes(self, config: RunConfig) -> Any:
            raise DataError("records.csv: 0 rows, at least 1 needed")

    federation = Federation([ToySite("a"), Empty("b")], run=config(rounds=1))

    assert federation.run().history[0].asked == ("a",)
    (refused,) = federation.events.of("node_refused")
    assert (refused["reason"], refused["message"]) == (
        "data",
        "records.csv: 0 rows, at least 1 needed",
    )
    federation = Federation([ToySite("a"), Empty("b")], run=config(quorum=2))
    with pytest.raises(RunError, match=r"b: data: records\.csv: 0 rows"):
        federation.run()


def test_a_node_that_does_not_say_who_it_is_costs_one_wait_in_the_whole_run() -> None:
    federation = Federation(
        run=config(rounds=3), delays={"cork": NEVER}, slow=DESCRIBE, connect_s=90.0
    )
    result = federation.run()

    assert [r.asked for r in result.history] == [("aarhus", "bergen", "delft")] * 3
    assert federation.time.now == 90.0

    alone = Federation(
        [ToySite("a")], run=config(rounds=1), delays={"a": NEVER}, slow=DESCRIBE, connect_s=90.0
    )
    with pytest.raises(RunError, match="node 1001: does not say who it is"):
        alone.run()


# Silence and lateness


def test_a_client_that_never_answers_misses_the_deadline_and_no_more() -> None:
    federation = Federation(run=config(rounds=2), delays={"bergen": NEVER})
    result = federation.run()

    first, second = result.history
    assert first.failed["bergen"].reason == "deadline"
    assert first.failed["bergen"].message == "no answer within 60 s"
    assert second.asked == ("aarhus", "cork", "delft")  # it still has that to answer
    assert federation.time.now == POLL_S + 60.0  # one look to meet the sites, one deadline
    assert result.sites["bergen"].failures == 1


def test_a_late_reply_is_recorded_and_dropped_and_its_site_asked_again() -> None:
    sites = [ToySite("a", 10, step=1.0), ToySite("b", 10, step=100.0)]
    federation = Federation(
        sites, run=config(rounds=3), delays={"a": [0.0, 30.0, 0.0], "b": [70.0, 0.0]}
    )
    result = federation.run()

    assert [sorted(r.trained) for r in result.history] == [["a"], ["a"], ["a", "b"]]
    assert value(result) == 1.0 + 1.0 + 50.5
    assert federation.events.of("site_late") == [
        {"kind": "site_late", "site": "b", "round": 1, "asked": "train"}
    ]
    assert (result.sites["b"].late, result.sites["b"].failures, result.sites["b"].rounds) == (
        1,
        1,
        1,
    )


def test_what_comes_after_its_turn_was_missed_is_late_and_not_half_counted() -> None:
    sites = [ToySite("a", step=100.0), ToySite("b", step=1.0), ToySite("c", step=3.0)]
    mean = fedavg()

    def slowly(deltas: Iterable[Delta]) -> Iterator[Delta]:
        for delta in deltas:
            federation.time.now += 1.0  # the first delta that comes is b's: a has missed its turn
            yield delta

    rule = dataclasses.replace(
        mean, merge=lambda state, sent, deltas: mean.merge(state, sent, slowly(deltas))
    )
    federation = Federation(sites, run=config(rounds=1), delays={"a": 60.5}, rule=rule)
    result = federation.run()

    assert value(result) == 2.0
    assert set(result.history[0].trained) == {"b", "c"}
    assert result.history[0].failed["a"].reason == "deadline"
    assert (result.sites["a"].rounds, result.sites["a"].late) == (0, 1)


def test_a_round_below_its_quorum_lists_every_site_and_its_reason() -> None:
    class Broken(ToySite):
        def train(self, assignment: Assignment, before: Adapter) -> tuple[Trained, bytes]:
            raise PrivacyError("epsilon 8 is spent")

    sites = [ToySite("a"), Broken("b"), ToySite("c")]
    federation = Federation(sites, run=config(quorum=2), delays={"c": NEVER})

    with pytest.raises(
        RunError,
        match=r"(?s)round 1: 1 of 3 sites sent a delta that counts \(a\), 2 are needed\n"
        r"  b: privacy: epsilon 8 is spent\n  c: deadline: no answer within 60 s",
    ):
        federation.run()
    assert federation.events.of("round_aggregated") == []


# What sites may do wrong


def test_the_text_of_an_unforeseen_error_never_reaches_the_coordinator() -> None:
    class Crashing(ToySite):
        def train(self, assignment: Assignment, before: Adapter) -> tuple[Trained, bytes]:
            raise KeyError("patient John Doe")

    federation = Federation([ToySite("a"), Crashing("bergen")], run=config(rounds=1))

    assert only_failure(federation.run()) == (
        "internal",
        "KeyError in training: see the site's log",
    )
    assert b"John" not in msgspec.json.encode(federation.events.all)


def test_an_error_reply_of_flower_is_matched_and_its_text_dropped() -> None:
    good = app_of([ToySite("a"), ToySite("bergen")])
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config["site"] == "bergen":
            raise ValueError("patient John Doe")
        return good(message, context)

    app.evaluate()(good)
    app.query("describe")(good)
    federation = Federation([ToySite("a"), ToySite("bergen")], run=config(rounds=1), app=app)

    assert only_failure(federation.run()) == (
        "flower",
        "Flower error 2: the ClientApp raised an exception",
    )
    assert b"John" not in msgspec.json.encode(federation.events.all)


def frame_of(content: RecordDict) -> bytes:
    return bytes(content.array_records["frame"]["frame"].data)


def flip_a_bit(content: RecordDict) -> None:
    frame = bytearray(frame_of(content))
    frame[-40] ^= 1
    replace_frame(content, bytes(frame))


def send_nan(content: RecordDict) -> None:
    replace_frame(content, with_value(frame_of(content), float("nan")))


def other_spec(content: RecordDict, **fields: Any) -> None:
    spec: AdapterSpec = msgspec.structs.replace(SPEC, **fields)
    delta = Delta(spec, adapter(0.5, spec).arrays, SIZES["bergen"], steps=3)
    replace_frame(content, wire.encode(delta))


def send_the_adapter(content: RecordDict) -> None:
    replace_frame(content, wire.encode(adapter(0.5)))


def drop_the_frame(content: RecordDict) -> None:
    del content["frame"]


def other_count(content: RecordDict) -> None:
    delta = wire.decode_delta(frame_of(content), SPEC)
    replace_frame(content, wire.encode(Delta(SPEC, delta.arrays, 9, steps=3)))


def other_steps(content: RecordDict) -> None:
    delta = wire.decode_delta(frame_of(content), SPEC)
    replace_frame(content, wire.encode(Delta(SPEC, delta.arrays, delta.num_examples, steps=9)))


def half_a_delta(content: RecordDict) -> None:
    delta = wire.decode_delta(frame_of(content), SPEC)
    part = Part(factors="B")
    arrays = part.take(SPEC, delta.arrays)
    half = Delta(SPEC, arrays, delta.num_examples, part=part, steps=delta.steps)
    replace_frame(content, wire.encode(half))


def other_codec(content: RecordDict) -> None:
    delta = wire.decode_delta(frame_of(content), SPEC)
    replace_frame(content, wire.encode(delta, codec="fp16"))


def no_steps(content: RecordDict) -> None:
    delta = wire.decode_delta(frame_of(content), SPEC)
    replace_frame(content, wire.encode(Delta(SPEC, delta.arrays, delta.num_examples, steps=0)))
    rewrite(content, steps=0)


def test_a_delta_of_no_steps_is_refused_where_steps_are_divided_by() -> None:
    app = app_of([ToySite("a"), ToySite("bergen")], {"bergen": no_steps})
    sites = [ToySite("a"), ToySite("bergen")]
    result = Federation(sites, run=config(rounds=1, normalize_steps=True), app=app).run()

    assert only_failure(result) == (
        "rejected",
        "steps: 0, and federation.normalize_steps divides by them",
    )
    assert sorted(result.history[0].trained) == ["a"]


ATTACKS: dict[str, tuple[Callable[[RecordDict], None], str]] = {
    "a damaged frame": (flip_a_bit, "SHA-256 does not match: the frame was damaged or cut"),
    "NaN": (send_nan, "layer.lora_B.weight: 1 of 6 values are NaN or infinite"),
    "another base": (
        lambda c: other_spec(c, base="1" * 64),
        "delta is of adapter ",
    ),
    "another shape": (
        lambda c: other_spec(c, tensors=(("head.weight", (5, 3)), *SPEC.tensors[1:])),
        "load the same base and [lora] on both sides",
    ),
    "an adapter for a delta": (send_the_adapter, "expected kind 'delta', got 'adapter'"),
    "a weight of 1e12": (
        lambda c: rewrite(c, num_examples=10**12),
        "num_examples: expected 1 to 10, the training records that the site described, "
        "got 1000000000000",
    ),
    "a weight of -3": (
        lambda c: rewrite(c, num_examples=-3),
        "Trained: Expected `int` >= 0 - at `$.num_examples`",
    ),
    "no examples": (lambda c: rewrite(c, num_examples=0), "num_examples: expected 1 to 10"),
    "two weights": (other_count, "num_examples: 9 in the frame, 10 in the message"),
    "two step counts": (other_steps, "steps: 9 in the frame, 3 in the message"),
    "another part": (half_a_delta, "delta is of "),
    "another codec": (other_codec, "delta is in fp16, expected fp32"),
    "another name": (lambda c: rewrite(c, site="cork"), "site: expected 'bergen', got 'cork'"),
    "an unknown field": (lambda c: rewrite(c, extra=1), "unknown field `extra`"),
    "no frame": (drop_the_frame, "trained: expected records"),
}


@pytest.mark.parametrize("attack", sorted(ATTACKS))
def test_a_bad_reply_is_rejected_by_name_and_changes_nothing(attack: str) -> None:
    tamper, message = ATTACKS[attack]
    others = [ToySite(name, n) for name, n in SIZES.items() if name != "bergen"]
    expected = Federation(others, run=config(rounds=1)).run()

    result = Federation(run=config(rounds=1), tamper={"bergen": tamper}).run()

    reason, text = only_failure(result)
    assert reason == "rejected"
    assert message in text
    assert arrays_of(result) == arrays_of(expected)


def test_a_client_cannot_answer_for_another_run_of_the_engine() -> None:
    """A ClientApp of a site that is not the one described is refused by name."""
    impostor = client_app(lambda context: ToySite("cork", 10))
    federation = Federation([ToySite("a")], run=config(rounds=1), app=impostor)

    assert federation.run().history[0].asked == ("cork",)
