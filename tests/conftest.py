"""What all tests share: no network, no time limits on generated examples, and real data."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.runs import write_site, write_table

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A busy machine is not a wrong answer: pytest's own timeout ends what hangs.
settings.register_profile("anabranch", deadline=None)
settings.load_profile("anabranch")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give the sites of the tests a state folder of their own, never the user's."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of public data sets; a missing one is a failure, never a skip."""
    folder = Path(os.environ.get("ANABRANCH_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "README.md").is_file():
        pytest.fail(f"{folder} holds no data sets: set ANABRANCH_DATA to the folder that does")
    return folder.resolve()


@pytest.fixture
def table_sites(tmp_path: Path) -> dict[str, Path]:
    """Return name -> folder of two sites with tables of unlike size."""
    sites = {}
    for seed, (name, rows) in enumerate({"cardiology": 40, "oncology": 24}.items()):
        data = write_table(tmp_path / f"{name}.csv", n=rows, seed=seed)
        sites[name] = write_site(tmp_path / name, name, data)
    return sites


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Count a skipped test as a failure in CI: what was not run has not passed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or exitstatus != 0 or not os.environ.get("CI"):
        return
    skipped = reporter.stats.get("skipped", [])
    if skipped:
        for report in skipped:
            reporter.write_line(f"skipped, which CI does not accept: {report.nodeid}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
