from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.page.run_log import Event, EventFile, RunLog
from anabranch.server.coordinator.page.run_view import durations, eta, seconds_per_round
from anabranch.server.coordinator.page.shown import Alert, RunView, View
from anabranch.server.coordinator.page.status_text import text
from anabranch.server.coordinator.page.view import LISTED, Watcher, seen_by, view
from anabranch.server.coordinator.state import Asked, Wait
from tests.page_cases import DAY, NOW, add_run, add_site, make, ran, report
from tests.runs import PRIVATE, table_text

CLIENT_PRIVATE = "\n[client_privacy]\nepsilon = 8.0\npopulation = 4\n"


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return make(tmp_path / "heart")


def client_private() -> str:
    return table_text(
        ("rounds = 2", 'rounds = 2\ncohort = 2\nweighting = "uniform"'), extra=CLIENT_PRIVATE
    )


def line(kind: str, at: float = 0.0, **fields: Any) -> bytes:
    when = f"2026-09-21T10:{int(at) // 60:02d}:{int(at) % 60:02d}Z"
    return json.dumps({"at": when, "kind": kind, **fields}).encode() + b"\n"


def kinds(shown: View) -> set[tuple[str, str]]:
    return {(alert.kind, alert.about) for alert in shown.alerts}


# -- events: laws ----------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    cuts=st.lists(st.integers(0, 900), max_size=8),
    torn=st.integers(0, 20),
    number=st.integers(0, 15),
)
def test_however_a_file_grows_every_line_is_read_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], torn: int, number: int
) -> None:
    whole = b"".join(line("site_late", round=n, site="a") for n in range(number))
    path = tmp_path_factory.mktemp("run") / "events.jsonl"
    reader, seen = EventFile(path), list[int]()
    for end in [*sorted(min(cut, len(whole)) for cut in cuts), len(whole)]:
        path.write_bytes(whole[:end])
        events, anew = reader.read()
        assert not anew
        seen += [event.round for event in events]
    with path.open("ab") as file:
        file.write(b"{" * torn)
    assert reader.read() == ([], False)

    assert seen == list(range(number))
    assert reader.offset == len(whole)
    assert reader.unreadable == 0


@settings(max_examples=30)
@given(
    takes=st.lists(
        st.tuples(
            st.sampled_from(
                ["round_started", "site_trained", "site_failed", "round_aggregated", "other"]
            ),
            st.integers(1, 4),
            st.sampled_from(["a", "b"]),
        ),
        max_size=25,
    )
)
def test_a_round_that_is_told_again_counts_once(takes: list[tuple[str, int, str]]) -> None:
    once, again = RunLog(), RunLog()
    events = [
        msgspec.json.decode(line(kind, round=n, site=site, sites=[site], reason="data"), type=Event)
        for kind, n, site in takes
    ]
    for event in events:
        once.take(event)
    for event in [*events, *events]:
        again.take(event)

    assert once.merged == again.merged
    for name in ("a", "b"):
        assert once.site(name).counted == again.site(name).counted
        assert once.site(name).failures() == again.site(name).failures()


def test_a_file_that_was_replaced_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    reader = EventFile(path)
    assert reader.read() == ([], False)  # no file yet
    path.write_bytes(line("site_late", round=1) + line("site_late", round=2))
    assert [event.round for event in reader.read()[0]] == [1, 2]
    path.unlink()
    path.write_bytes(line("site_late", round=3))

    events, anew = reader.read()

    assert [event.round for event in events] == [3]
    assert anew


def test_a_torn_line_in_the_middle_is_counted_and_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(line("site_late", round=1)[:-20] + b"\n" + line("site_late", round=2))
    reader = EventFile(path)

    assert [event.round for event in reader.read()[0]] == [2]
    assert reader.unreadable == 1


# -- pace and end ----------------------------------------------------------------------------------


def log_of(*rounds: tuple[float, float]) -> RunLog:
    """Return a log of rounds that began and ended at these seconds."""
    log = RunLog()
    for number, (start, end) in enumerate(rounds, 1):
        for kind, at in (("round_started", start), ("round_evaluated", end)):
            log.take(msgspec.json.decode(line(kind, at, round=number), type=Event))
    return log


def test_the_pace_is_the_median_of_the_last_five_rounds() -> None:
    log = log_of((0, 100), (100, 110), (110, 122), (122, 133), (133, 200), (200, 209))

    assert durations(log) == [100, 10, 12, 11, 67, 9]
    assert seconds_per_round(log) == 11
    assert seconds_per_round(RunLog()) is None


def test_the_end_is_as_many_rounds_of_that_pace_after_the_last_one() -> None:
    log = log_of((0, 10), (10, 22), (22, 33))
    last = log.rounds[3].ended
    assert last is not None

    assert eta(log, 5) == last + 2 * 11
    assert eta(log, 3) == last
    assert eta(log, None) is None
    assert eta(RunLog(), 5) is None


def test_a_round_that_began_before_the_last_one_ended_counts_from_there() -> None:
    assert durations(log_of((0, 10), (4, 15))) == [10, 5]


# -- a real run ------------------------------------------------------------------------------------


def only(shown: View) -> RunView:
    (run,) = shown.runs
    return run


def test_a_run_that_the_engine_carried_out_is_shown_as_it_was(federation: Federation) -> None:
    folder = ran(federation, "toy-1", rounds=3)
    written = [json.loads(one) for one in (folder.path / "events.jsonl").read_bytes().splitlines()]
    merged = [event for event in written if event["kind"] == "round_aggregated"]

    run = only(view(federation, NOW))

    assert (run.state, run.round, run.rounds) == ("finished", 3, 3)
    assert run.doing == "finished, 3 of 3 rounds"
    assert [row.round for row in run.history] == [3, 2, 1]
    assert [(row.trained, row.asked, row.failed) for row in run.history] == [(4, 4, 0)] * 3
    assert run.bytes_up == sum(event["bytes_up"] for event in merged) > 0
    assert run.bytes_down == sum(event["bytes_down"] for event in merged) > 0
    assert [row.site for row in run.sites] == ["aarhus", "bergen", "cork", "delft"]
    assert {row.rounds for row in run.sites} == {3}
    assert run.ended is not None
    assert run.started is not None
    assert run.seconds_per_round == 6  # events a second apart: four deltas, merge, evaluation
    curves = {(c.metric, c.source): c.points for c in run.curves}
    assert curves["training loss", "sites' mean"] == ((1, 0.25), (2, 0.25), (3, 0.25))


def test_a_secure_sum_is_shown_while_it_is_made_and_afterwards(federation: Federation) -> None:
    folder = ran(federation, "toy-1", rounds=2)
    federation.state.set_run(
        "toy-1", toml=table_text(("rounds = 2", "rounds = 3")), state="running"
    )
    members = ["aarhus", "bergen", "cork"]
    folder.event("round_started", round=3, sites=[*members, "delft"])
    folder.event("secure_sum_started", round=3, sites=members)
    assert only(view(federation, NOW)).doing == "round 3 of 3: secure sum of 3 sites"
    folder.event(
        "secure_dropout", round=3, site="cork", stage="mask", reason="deadline", message=""
    )
    folder.event(
        "secure_sum", round=3, attempt=1, opened=True, members=members,
        survivors=members[:2], dropped={"mask": ["cork"]},
    )  # fmt: skip
    folder.event("site_trained", round=3, site="aarhus", seconds=1.0)
    folder.event("round_aggregated", round=3, method="fedavg", sites=members[:2])

    run = only(view(federation, NOW))

    last = run.history[0]
    assert (last.members, last.survivors, last.lost) == (3, 2, {"mask": 1})
    assert (run.history[1].members, run.history[1].lost) == (None, {})
    assert "last secure sum: 2 of 3 members, lost 1 at mask" in text(view(federation, NOW))
    aarhus = next(row for row in run.sites if row.site == "aarhus")
    assert aarhus.examples is not None  # what it said before round 1: its update says none


def test_what_records_cost_is_not_shown_as_what_clients_cost(federation: Federation) -> None:
    folder = ran(federation, "toy-1", rounds=2)
    federation.state.set_run("toy-1", toml=client_private(), state="running")
    folder.event("site_trained", round=2, site="aarhus", seconds=1.0, epsilon=3.0)

    assert only(view(federation, NOW)).epsilon is None


def test_a_site_that_never_answered_has_failures_and_a_reason(federation: Federation) -> None:
    ran(federation, "toy-1", rounds=2, delays={"cork": 1e9}, extra="")

    run = only(view(federation, NOW))

    cork = next(row for row in run.sites if row.site == "cork")
    assert (cork.rounds, cork.failures) == (0, 1)  # after the first it was not asked again
    assert cork.reason.startswith("deadline: no answer within")
    assert run.history[-1].failed == 1


def test_looking_again_reads_only_what_was_added(federation: Federation) -> None:
    folder = ran(federation, "toy-1", rounds=2)
    watcher = Watcher(federation)
    before = watcher.view(NOW)
    file, _ = watcher._log("toy-1")
    path = folder.path / "events.jsonl"
    size = path.stat().st_size
    assert file.offset == size
    damaged = bytearray(path.read_bytes())
    damaged[:200] = b"#" * 200  # what was read is not looked at again
    with path.open("r+b") as there:
        there.write(damaged)
    folder.event("site_late", site="cork", round=2, asked="train")

    after = watcher.view(NOW)

    assert file.offset == path.stat().st_size > size
    assert only(before).sites[2].late == 0
    assert only(after).sites[2].late == 1
    assert only(after).history == only(before).history
    assert only(after).unreadable == 0


def test_nothing_new_is_the_same_view_whenever_it_is_looked_at(federation: Federation) -> None:
    ran(federation, "toy-1", rounds=1)
    watcher = Watcher(federation)

    assert watcher.view(NOW + 1).same(watcher.view(NOW))
    assert not watcher.view(NOW).same(None)
    add_site(federation, "aarhus")
    assert not watcher.view(NOW).same(view(make(federation.folder.parent / "other"), NOW))


def test_a_view_survives_json(federation: Federation) -> None:
    ran(federation, "toy-1", rounds=1)
    shown = view(federation, NOW)

    assert msgspec.json.decode(msgspec.json.encode(shown), type=View) == shown


# -- waits and questions ---------------------------------------------------------------------------


def test_a_wait_says_who_since_when_until_when_why_and_what_then(federation: Federation) -> None:
    add_run(federation, "toy-1", table_text(), state="running")
    wait = Wait(why="their deltas", who=("cork",), since=NOW - 9, until=NOW + 9, then="go on")
    federation.state.wait("toy-1", wait)
    asked = Asked(kind="train", round=1, since=NOW - 9, until=NOW + 9)
    federation.state.asked("toy-1", "cork", asked)

    run = only(view(federation, NOW))

    assert run.wait == wait
    (cork,) = run.sites
    assert (cork.asked, cork.round, cork.state, cork.until) == ("train", 1, "sent", NOW + 9)
    assert run.doing == "waiting for sites"


@pytest.mark.parametrize("state", ["finished", "failed", "stopped"])
def test_a_run_that_is_over_waits_for_nobody_and_has_no_end_ahead(
    federation: Federation, state: str
) -> None:
    ran(federation, "toy-1", rounds=1)
    federation.state.set_run("toy-1", state=state)
    federation.state.wait("toy-1", Wait(why="left over", since=NOW))

    run = only(view(federation, NOW))

    assert run.wait is None
    assert run.eta is None


def test_active_runs_come_first_and_old_ones_are_counted(federation: Federation) -> None:
    for number in range(LISTED + 3):
        add_run(federation, f"old-{number}", table_text(), state="finished", created=NOW + number)
    add_run(federation, "active", table_text(), state="running", created=NOW - 1)

    shown = view(federation, NOW)

    names = [run.run for run in shown.runs]
    assert names == ["active", *(f"old-{n}" for n in range(LISTED + 2, 2, -1))]
    assert shown.older_runs == 3


# -- sites -----------------------------------------------------------------------------------------


def test_a_site_says_what_it_does_since_when_and_why_it_waits(federation: Federation) -> None:
    for name in ("busy", "held", "new", "gone", "out"):
        add_site(federation, name)
    report(federation, "busy", activity="training", step=40, steps=200, round=3, since=NOW - 50)
    report(federation, "held", activity="waiting", reason="the run is to be approved")
    report(federation, "gone", at=NOW - 100, activity="training", step=1, steps=9)
    federation.state.set_site("out", status="revoked", reason="asked to")

    sites = {site.name: site for site in view(federation, NOW).sites}

    assert sites["busy"].doing == "training, step 40 of 200, round 3"
    assert (sites["busy"].state, sites["busy"].since) == ("training", NOW - 50)
    assert (sites["held"].state, sites["held"].reason) == ("waiting", "the run is to be approved")
    assert (sites["new"].state, sites["new"].heard) == ("not heard yet", None)
    assert (sites["gone"].state, sites["gone"].since) == ("silent", NOW - 100)
    assert sites["gone"].doing == "silent; it was training, step 1 of 9"
    assert (sites["out"].state, sites["out"].reason) == ("revoked", "asked to")


# -- alerts ----------------------------------------------------------------------------------------


def test_a_federation_that_is_well_has_no_alerts(federation: Federation) -> None:
    add_site(federation, "aarhus")
    report(federation, "aarhus")
    ends = view(federation, NOW).certificate_ends
    assert ends is not None
    now = ends - 25 * DAY
    add_site(federation, "bergen", expires=now + 80 * DAY)
    report(federation, "bergen", now)
    federation.state.set_site("aarhus", expires=now + 80 * DAY)
    report(federation, "aarhus", now)

    assert {kind for kind, _ in kinds(view(federation, now))} <= {"disk low"}


@pytest.mark.parametrize(
    ("expected", "report_fields", "site_fields"),
    [
        ("site silent", {"at": NOW - 31}, {}),
        ("site waits", {"activity": "waiting", "reason": "hours: 18:00 to 06:00"}, {}),
        ("site not ready", {"checks": ("memory: 2 GB, 4 are needed",)}, {}),
        ("clock skew", {"since": NOW + 7200}, {}),
        ("certificate ends", {}, {"expires": NOW + 14 * DAY}),
        ("certificate ends", {}, {"expires": NOW - 1}),
    ],
)
def test_what_is_wrong_with_a_site_is_said(
    federation: Federation,
    expected: str,
    report_fields: dict[str, Any],
    site_fields: dict[str, Any],
) -> None:
    add_site(federation, "aarhus", **site_fields)
    report(federation, "aarhus", **report_fields)

    assert (expected, "aarhus") in kinds(view(federation, NOW))
    federation.state.set_site("aarhus", status="revoked")
    assert not {kind for kind, about in kinds(view(federation, NOW)) if about == "aarhus"}


def alert_of(shown: View, kind: str) -> Alert:
    return next(alert for alert in shown.alerts if alert.kind == kind)


def test_a_refusal_by_policy_is_said_until_a_later_round_counts_the_site(
    federation: Federation,
) -> None:
    folder = ran(federation, "toy-1", rounds=1)
    federation.state.set_run("toy-1", state="running")
    said = {"site": "cork", "asked": "train", "reason": "policy", "message": "epsilon 8 is over 3"}
    folder.event("round_started", round=2, sites=["cork"])
    folder.event("site_failed", round=2, **said)
    folder.event("site_failed", round=3, **said)

    alert = alert_of(view(federation, NOW), "policy refusal")

    assert (alert.about, alert.level) == ("cork", "problem")
    assert "refused by its policy 2 times: epsilon 8 is over 3" in alert.text
    folder.event("round_aggregated", round=4, sites=["cork"])
    assert "policy refusal" not in {kind for kind, _ in kinds(view(federation, NOW))}


def test_restarts_failures_and_waits_past_their_end_are_said(federation: Federation) -> None:
    add_run(federation, "a", table_text(), state="running", restarts=2)
    add_run(federation, "b", table_text(), state="running", restarts=5)
    add_run(federation, "c", table_text(), state="failed", detail="round 1: 0 of 4 sites")
    federation.state.wait("a", Wait(why="deltas", since=NOW - 900, until=NOW - 61))

    shown = view(federation, NOW)

    levels = {(alert.kind, alert.about): alert.level for alert in shown.alerts}
    assert levels["run restarted", "a"] == "notice"
    assert levels["run restarted", "b"] == "problem"
    assert levels["wait overdue", "a"] == "problem"
    assert "round 1: 0 of 4 sites" in alert_of(shown, "run failed").text
    assert [alert.level for alert in shown.alerts] == sorted(
        (alert.level for alert in shown.alerts), reverse=True
    )


def test_epsilon_is_shown_against_its_plan_and_said_when_nearly_spent(
    federation: Federation,
) -> None:
    folder = ran(federation, "toy-1", rounds=1, extra="")
    toml = table_text(("local_epochs = 2", "local_epochs = 2\nlocal_steps = 4"), extra=PRIVATE)
    federation.state.set_run("toy-1", state="running", toml=toml)
    for number, epsilon in ((2, 4.0), (3, 7.7)):
        folder.event("site_trained", site="cork", round=number, num_examples=9, epsilon=epsilon)
        folder.event("round_aggregated", round=number, sites=["cork"], num_examples=9)

    shown = view(federation, NOW)

    run = only(shown)
    assert (run.privacy, run.epsilon, run.epsilon_ceiling) == ("record", 7.7, 8.0)
    assert [c.points for c in run.curves if c.metric == "epsilon"] == [((2, 4.0), (3, 7.7))]
    assert "ε is 7.70, and 8.00 is planned" in alert_of(shown, "epsilon").text


# -- what is not shown -----------------------------------------------------------------------------


def test_who_takes_part_in_a_client_private_run_is_not_shown(federation: Federation) -> None:
    folder = ran(federation, "toy-1", rounds=2)
    federation.state.set_run("toy-1", toml=client_private(), state="running")
    folder.event("client_noise", round=2, epsilon=1.5)
    federation.state.asked("toy-1", "cork", Asked(kind="train", since=NOW, until=NOW))

    run = only(view(federation, NOW))

    assert (run.privacy, run.epsilon, run.epsilon_ceiling) == ("client", 1.5, 8.0)
    assert (run.sites, run.bytes_up, run.bytes_down) == ((), None, None)
    for row in run.history:
        assert (row.trained, row.asked, row.failed, row.examples, row.loss) == (None,) * 5
        assert row.client == {}
    assert {curve.metric for curve in run.curves} == {"epsilon"}


def test_a_site_sees_itself_and_nothing_about_other_sites(federation: Federation) -> None:
    folder = ran(federation, "toy-1", rounds=2)
    federation.state.set_run("toy-1", state="running", detail="bergen is slow")
    for name in ("aarhus", "bergen", "cork"):
        add_site(federation, name)
        report(federation, name, NOW - 90, activity="waiting", reason=f"{name} has a reason")
    folder.event(
        "site_failed", site="bergen", round=3, asked="train", reason="policy", message="bergen no"
    )
    federation.state.wait(
        "toy-1", Wait(why="bergen and cork are slow", who=("bergen", "cork"), since=NOW)
    )
    federation.state.invite("esbjerg", "0" * 64, NOW + 99, NOW)
    whole = view(federation, NOW)
    assert b"bergen" in msgspec.json.encode(whole)

    seen = seen_by(whole, "cork")

    text = msgspec.json.encode(seen).decode()
    for other in ("aarhus", "bergen", "delft", "esbjerg"):
        assert other not in text, other
    assert [site.name for site in seen.sites] == ["cork"]
    assert [row.site for row in only(seen).sites] == ["cork"]
    wait = only(seen).wait
    assert wait is not None
    assert wait.who == ("cork", "another site")


def test_a_configuration_that_cannot_be_read_hides_rather_than_shows(
    federation: Federation,
) -> None:
    ran(federation, "toy-1", rounds=1)
    federation.state.set_run("toy-1", toml="[future]\nx = 1")

    run = only(view(federation, NOW))

    assert run.rounds is None
    assert run.sites == ()
    assert run.round == 1
