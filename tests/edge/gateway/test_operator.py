from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from anabranch.cli.edge_gateway import app
from anabranch.edge.gateway.config import GatewayFolder, read_gateway
from anabranch.edge.gateway.operator import gateway_file, invite, make_gateway
from anabranch.edge.runtime.enrol import Invitation
from anabranch.protocols.errors import AnabranchError, ConfigError


def run(*words: str) -> Any:
    result = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_init_token_devices_status_and_revoke(tmp_path: Path) -> None:
    folder = str(tmp_path / "g")
    made = run("init", folder, "--name", "north", "--host", "gateway.example.org")
    for path in (tmp_path / "g", tmp_path / "g" / "authority"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    (text,) = run("token", folder, "--label", "board 7")["tokens"]
    invitation = Invitation.parse(text)
    assert invitation.address == "gateway.example.org:8444"
    assert invitation.authority == made["authority"]
    assert invitation.secret.encode() not in (tmp_path / "g" / "state.sqlite").read_bytes()
    assert run("devices", folder) == {"devices": []}
    assert run("status", folder)["devices"] == 0
    with pytest.raises(ConfigError, match="d-1: no such device"):
        run("revoke", folder, "d-1")


def test_a_folder_is_not_made_twice(tmp_path: Path) -> None:
    file = gateway_file("north", ["localhost"])
    make_gateway(tmp_path / "g", file)
    assert GatewayFolder(tmp_path / "g").read() == file
    with pytest.raises(ConfigError, match="exists"):
        make_gateway(tmp_path / "g", file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "North"', "name"),
        ('name = "n"\nhosts = []', "hosts"),
        ('name = "n"\nhosts = ["h"]\nport = 0', "port"),
        ('name = "n"\nhosts = ["h"]\ncohort = 3\nmin_cohort = 4', "above cohort"),
        ('name = "n"\nhosts = ["h"]\nmin_cohrt = 4', "min_cohrt"),
        (
            'name = "n"\nhosts = ["h"]\n[client_privacy]\nepsilon = 1\nnoise_multiplier = 1\n'
            "clipping_norm = 1\npopulation = 10",
            "below min_cohort = 20",
        ),
        (
            'name = "n"\nhosts = ["h"]\n[client_privacy]\nepsilon = 1\nnoise_multiplier = 1\n'
            "clipping_norm = 1\npopulation = 50\ndelta = 0.02",
            "not below 1/population",
        ),
        (
            'name = "n"\nhosts = ["h"]\nclipping_norm = 1\n[client_privacy]\nepsilon = 1\n'
            "noise_multiplier = 1\nclipping_norm = 1\npopulation = 50",
            "leave it out",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_its_field(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "gateway.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_gateway(tmp_path)


@pytest.mark.parametrize(("how", "message"), [({"count": 0}, "count"), ({"hours": 0}, "hours")])
def test_impossible_invitations_are_refused(tmp_path: Path, how: Any, message: str) -> None:
    make_gateway(tmp_path / "g", gateway_file("north", ["localhost"]))
    with pytest.raises(AnabranchError, match=message):
        invite(tmp_path / "g", **how)
