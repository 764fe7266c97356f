"""The systemd unit: what it may write, its limits, and that it comes back."""

from __future__ import annotations

from pathlib import Path

from anabranch.client.agent.unit import unit


def values(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def test_a_unit_is_hardened_and_restarts() -> None:
    found = values(unit(Path("/srv/site"), name="a", federation="b", writable=[Path("/state")]))
    assert found["NoNewPrivileges"] == "yes"
    assert (found["LimitCORE"], found["MemorySwapMax"]) == ("0", "0")  # it has secrets in memory
    assert found["ProtectSystem"] == "strict"
    assert found["PrivateTmp"] == "yes"
    assert found["Restart"] == "always"
    assert found["ReadWritePaths"] == "/srv/site /state"
    assert found["ExecStart"].endswith(" -m anabranch.cli.main site serve --folder /srv/site")
    assert found["WantedBy"] == "default.target"
    assert not {"MemoryMax", "CPUQuota"} & set(found)


def test_limits_are_those_of_the_policy() -> None:
    found = values(unit(Path("/s"), name="a", federation="b", memory_mb=4096, cores=1.5))
    assert (found["MemoryMax"], found["CPUQuota"]) == ("4096M", "150%")


def test_odd_paths_are_written_as_systemd_reads_them() -> None:
    found = values(
        unit(Path('/s/my "100%" $HOME'), name="a", federation="b", python="/opt/py thon")
    )
    assert found["WorkingDirectory"] == '/s/my "100%%" $HOME'
    assert found["ReadWritePaths"] == r'"/s/my \"100%%\" $HOME"'
    assert found["ExecStart"] == (
        r'"/opt/py thon" -m anabranch.cli.main site serve --folder "/s/my \"100%%\" $$HOME"'
    )
