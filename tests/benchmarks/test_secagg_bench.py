"""The benchmark of secure aggregation: it compares like with like, and sees a sum that is wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest

from anabranch.protocols.errors import ProtocolError
from anabranch.protocols.secagg.graph import COMPLETE_UP_TO
from anabranch.protocols.secagg.masks import CHUNK_BYTES
from anabranch.protocols.secagg.messages import STAGES, Adverts
from benchmarks import harness
from benchmarks.secagg import cost, demo, dropouts, flower, growth, keystream, run
from benchmarks.secagg.flower import Case
from benchmarks.secagg.ours import Sum
from benchmarks.secagg.peer import SecAggPlus

QUICK = {
    "client.seconds_n100_1m",
    "client.ratio_keystream",
    "server.ratio_keystream_5_drops",
    "speedup_flower.client",
    "bytes_ratio_flower",
    "flower.exact",
    "dropouts.exact",
    "dropouts.aborted",
    "growth.exact",
    "growth.client_seconds_largest",
    "growth.client_seconds_ratio",
}


def summary(seed: int, plain: float, secure: float | None) -> dict[str, Any]:
    accuracy = {"federated": plain} | ({} if secure is None else {"federated_secure": secure})
    return {"seed": seed, "num_test": 1000, "accuracy": accuracy}


def test_a_sum_is_exact_and_every_stage_of_every_member_is_timed() -> None:
    one = Sum(6, 100)

    one.run()

    assert one.exact
    assert all(list(c.seconds) == list(STAGES) for c in one.costs)
    assert all(0 < c.encode < c.seconds["mask"] for c in one.costs)
    assert all(c.up > 100 * one.ring.width and c.down > 0 for c in one.costs)


def test_a_sum_that_is_off_by_one_is_seen() -> None:
    one = Sum(4, 10)
    one.run()

    one.aggregation.sums[0].total[3] += 1

    assert not one.exact


def test_a_sum_that_was_not_opened_is_not_exact() -> None:
    one = Sum(4, 10, {"mask": range(3)})

    one.run()

    assert one.aggregation.stage == "aborted"
    assert not one.exact


def test_who_is_lost_answers_no_more() -> None:
    one = Sum(7, 10, {"mask": [2], "reveal": [0]})

    one.run()

    assert one.exact
    assert one.aggregation.dropped == {"member-00002": "mask", "member-00000": "reveal"}
    assert list(one.costs[2].seconds) == ["advertise", "share"]


@pytest.mark.parametrize("shares", [5, 7])
def test_the_peer_sums_the_same_vectors_in_turn(shares: int) -> None:
    case = Case(figure="x", members=7, values=200, shares=shares, repeats=2)

    found = flower.compare(case)

    assert found.exact == [True] * 4
    assert len(found.ours) == len(found.theirs) == 14
    assert all(len(c.seconds) == 4 for c in found.theirs)
    assert all(c.up > 200 * 8 for c in found.theirs)  # int64 on its wire
    assert flower.speedup(found).value > 0
    assert flower.size(found).value > 1


def test_members_that_are_not_timed_share_the_check_of_a_signature() -> None:
    one = Sum(6, 10, timed=[0, 3])

    one.run()

    assert one.exact
    assert len(one._checked) == 6 + 5  # adverts, and as many signatures as are needed


def test_an_advert_that_nobody_signed_is_refused_by_members_that_are_not_timed() -> None:
    one = Sum(4, 10, timed=[])
    one.run(until="share")
    request = one.aggregation.requests()["member-00001"]
    assert isinstance(request, Adverts)
    forged = msgspec.structs.replace(request.adverts[0], signature="0" * 128)
    request = msgspec.structs.replace(request, adverts=(forged, *request.adverts[1:]))

    with pytest.raises(ProtocolError, match="not signed with its key on the roster"):
        one._turn("member-00001", request)


def test_the_peer_takes_turns_with_ours_message_by_message() -> None:
    order: list[str] = []

    def beside() -> Any:
        for place in range(25):
            order.append(f"ours {place}")
            yield

    found = SecAggPlus(5, 10, shares=5, threshold=4).run(beside())

    assert found.exact
    assert order == [f"ours {place}" for place in range(25)]  # 20 in turn, and what was left


def test_a_wrong_sum_of_the_peer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.secagg import peer

    expand = peer.MOD.pseudo_rand_gen
    monkeypatch.setattr(peer.MOD, "pseudo_rand_gen", lambda *a: [x + 1 for x in expand(*a)])

    found = SecAggPlus(5, 10, shares=5, threshold=4).run(iter(()))

    assert found.exact is False


def test_the_floor_is_the_keystream_of_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Stream:
        def encryptor(self) -> Stream:
            return self

        def update_into(self, zeros: memoryview, _out: bytearray) -> None:
            made.append(len(zeros))

    monkeypatch.setattr(keystream, "cipher", lambda *_: Stream())

    keystream.seconds("chacha20", 3, 2 * CHUNK_BYTES + 5)

    assert sum(made) == 3 * (2 * CHUNK_BYTES + 5)


def test_costs_of_a_member_and_the_coordinator_are_beside_their_floors() -> None:
    found = cost.measure(12, 1000, 2, 3)

    named = {f.figure: f for f in cost.figures(found, 2)}

    assert found.exact
    assert len(found.costs) == len(found.floors) == 2  # members 4 and 8
    assert len(found.unmasking) == len(found.unmasking_floors) == 3
    assert set(named) == {
        "client.seconds_n100_1m",
        "client.ratio_keystream",
        "server.ratio_keystream_2_drops",
    }
    assert "12 members, 1,000 values" in named["client.seconds_n100_1m"].note


def test_every_number_of_dropouts_is_played_at_every_stage() -> None:
    found = dropouts.measure(range(4, 6))

    # t = 3 of 4, and 4 of 5: nobody or one lost, at five stages; then two lost, at four
    assert {stage: (t.held, t.exact) for stage, t in found.items()} == dict.fromkeys(STAGES, (4, 4))
    assert {stage: (t.short, t.aborted) for stage, t in found.items()} == {
        "advertise": (0, 0)
    } | dict.fromkeys(STAGES[1:], (2, 2))
    assert [f.value for f in dropouts.figures(found, range(4, 6))] == [1, 1]
    assert "| reveal | 4 of 4 exact | 2 of 2 aborted | " in dropouts.table(found)


def test_one_member_in_ten_is_lost_at_some_stage() -> None:
    lost = growth.dropouts(1000)

    assert len(set(chain(*lost.values()))) == sum(map(len, lost.values())) == 100
    assert all(lost.values())
    assert lost == growth.dropouts(1000)


def test_growth_is_drawn_and_written_from_sums_that_ran() -> None:
    points = [growth.measure(members, 100) for members in (8, 12)]

    drawing = ElementTree.fromstring(growth.draw(points))

    assert [p.neighbours for p in points] == [7, 11]
    assert [p.lost for p in points] == [0, 1]
    assert all(p.exact and 0 < p.vector < p.up for p in points)
    assert len(drawing.findall("{http://www.w3.org/2000/svg}svg")) == 3
    assert "| 12 | 11 | 1 |" in growth.table(points)
    assert {f.figure for f in growth.figures(points)} == {n for n in QUICK if n[:6] == "growth"}


def test_growth_passes_from_the_complete_graph_to_a_sparse_one() -> None:
    assert growth.neighbours(COMPLETE_UP_TO) == COMPLETE_UP_TO - 1
    assert growth.neighbours(10_000) < 200


def test_the_difference_of_the_demo_is_in_points() -> None:
    found = demo.figures([summary(0, 0.60, 0.602), summary(1, 0.61, 0.61)])

    assert [f.figure for f in found] == ["demo.accuracy_difference_points"]
    assert found[0].value == pytest.approx(0.1)
    assert found[0].spread == pytest.approx((0.0, 0.2))
    assert found[0].reached


def test_no_demo_no_figure() -> None:
    assert demo.figures([]) == []


def test_demos_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="no secure run in this summary"):
        demo.difference(summary(0, 0.6, None), summary(0, 0.6, None))
    with pytest.raises(ValueError, match="different demos: seed 0 and 1"):
        demo.difference(summary(0, 0.6, None), summary(1, 0.6, 0.6))


def test_the_target_against_the_peer_is_for_the_same_graph_on_both_sides() -> None:
    aimed = [case for case in (*run.FULL.cases, *run.QUICK.cases) if case.target is not None]

    assert [case.figure for case in aimed] == ["speedup_flower.client"] * 2
    assert all(case.shares == case.members for case in aimed)
    assert [run.FULL.cases[0], run.QUICK.cases[0]] == aimed  # whose bytes are reported


@pytest.mark.slow
def test_the_secagg_benchmark_writes_its_figures(tmp_path: Path) -> None:
    file, given = tmp_path / "figures.json", tmp_path / "summary.json"
    given.write_text(json.dumps(summary(0, 0.6, 0.601)))
    script = harness.ROOT / "benchmarks" / "secagg" / "run.py"
    page = (harness.ROOT / "docs" / "benchmarks" / "secagg.md").read_text()

    subprocess.run(
        [sys.executable, str(script), "--quick", "--json", str(file), "--summary", str(given)],
        check=True,
    )

    content = json.loads(file.read_text())
    found = {figure["figure"]: figure["value"] for figure in content["figures"]}
    assert set(found) == QUICK | {demo.NAME}
    assert all(math.isfinite(value) and value > 0 for value in found.values())
    assert [found[name] for name in sorted(QUICK) if "exact" in name or "aborted" in name] == [
        1
    ] * 4
    assert content["header"]["quick"] is True
    assert (
        harness.ROOT / "docs" / "benchmarks" / "secagg.md"
    ).read_text() == page  # not by --quick
