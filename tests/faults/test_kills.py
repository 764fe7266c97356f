"""Every process of a federation, killed by SIGKILL at every step: the run goes on by itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from anabranch.client import ledger_report
from anabranch.client.chain import State
from anabranch.client.privacy import epsilon_of
from anabranch.client.site_file import ledger_of, read_site
from tests.faults.killing import END, OTHERS, RUN, SITE, Kill, Storm, storm, undisturbed
from tests.faults.rig import Rig
from tests.runs import PRIVATE, table_text, write_table

pytestmark = pytest.mark.slow

SITES = ("east", "north", "south")


def records(folder: Path) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    return {
        name: write_table(folder / f"{name}.csv", seed=i, n=40 + 8 * i)
        for i, name in enumerate(SITES)
    }


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("kills")
    data = records(folder / "records")
    rig = Rig(folder / "rig", SITES)
    try:
        rig.gather(lambda name: data[name])
        yield rig
    finally:
        rig.close()


def toml(rounds: int, *replacements: tuple[str, str], extra: str = "") -> str:
    federation = f"rounds = {rounds}\nquorum = {len(SITES)}\ndeadline_s = 300.0"
    return table_text(("rounds = 2", federation), *replacements, extra=extra)


def survived(rig: Rig, tmp_path: Path, kills: tuple[Kill, ...], rounds: int) -> Storm:
    """Run through these kills; return what came of it, which is nothing but time."""
    text = toml(rounds)
    expected = undisturbed(tmp_path / "undisturbed", text, records(rig.folder / "records"))
    result = storm(rig, rig.begin(text), kills, seed=7, undisturbed=expected)
    assert (result.lost, result.doubled, result.equal) == (0, 0, True)
    assert result.kills == len(kills)
    return result


@pytest.mark.parametrize(
    ("kills", "rounds"),
    [
        pytest.param(RUN + END, 40, id="the process of the run"),
        pytest.param(SITE, 32, id="a site"),
        pytest.param(OTHERS, 32, id="all others"),
    ],
)
@pytest.mark.timeout(900)
def test_a_run_goes_on_after_every_kill(
    rig: Rig, tmp_path: Path, kills: tuple[Kill, ...], rounds: int
) -> None:
    survived(rig, tmp_path, kills, rounds)


def books(site: Path) -> State:
    """Return what a site's ledger adds up to."""
    state = ledger_of(site, read_site(site)).state()
    assert state is not None
    return state


PRIVATE_KILLS = (
    Kill("site", "renamed *.begun"),
    Kill("site", "call Steps.after"),
    Kill("site", "called Steps.after", 3),
    Kill("run", "called Exchange._take"),
    Kill("site", "rename *answers/*"),
    Kill("site", "renamed *answers/*"),
    Kill("site", "rename *report.json"),
    Kill("superlink", "event site_trained"),
    Kill("site", "call Fleet._push", 2),
    Kill("everything", "event site_trained"),
)


@pytest.mark.timeout(600)
def test_the_books_on_privacy_are_right_after_kills(rig: Rig) -> None:
    rounds = 18
    private = PRIVATE + "delta = 1e-5\n"  # the most that a site's policy takes
    run = rig.begin(toml(rounds, ("local_epochs = 2", "local_steps = 5"), extra=private))

    result = storm(rig, run, PRIVATE_KILLS, seed=8)

    assert (result.kills, result.lost, result.doubled) == (len(PRIVATE_KILLS), 0, 0)
    summary = json.loads((rig.federation / "runs" / run / "summary.json").read_text())
    for name in SITES:
        said = rig.do("site", "ledger", "--verify", "--folder", str(rig.site(name)), "--json")
        assert json.loads(said)["ok"]
        (spent,) = ledger_report.report(rig.site(name)).sets
        assert spent.runs == (run,)
        # A round that was cut off is begun again with the reserve that it has: none is made twice.
        assert (spent.rounds, spent.open) == (rounds, 0)
        told, state = summary["sites"][name], books(rig.site(name))
        assert told["epsilon"] == pytest.approx(epsilon_of(state.spends(), told["delta"]))
