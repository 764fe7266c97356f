"""coordinator.toml: what may stand in it, and what a mistake is told."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.errors import ConfigError
from anabranch.server.coordinator import settings
from anabranch.server.coordinator.settings import (
    Limits,
    Runs,
    Settings,
    Tracking,
    join_address,
    parse_settings,
    read_settings,
    settings_text,
    split_address,
)

LEAST = 'name = "heart"\naddress = "fl.example.org:8443"\nhosts = ["fl.example.org"]\n'
HOSTS = st.one_of(
    st.just("fl.example.org"), st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(str)
)


@given(HOSTS, st.integers(1, 65535))
def test_an_address_is_taken_apart_as_it_was_put_together(host: str, port: int) -> None:
    text = join_address(host, port)
    assert split_address(text) == (host, port)
    assert (":" in host) == text.startswith("[")


@given(HOSTS, st.integers(1, 65535))
def test_the_file_that_init_writes_is_one_that_serve_reads(host: str, port: int) -> None:
    made = parse_settings(settings_text("heart", [host, "localhost"], port), "x")
    assert split_address(made.address) == (host, port)
    assert made.hosts == (host, "localhost")
    assert split_address(made.bind)[1] == port
    assert split_address(made.page)[1] != port
    assert ipaddress.ip_address(split_address(made.page)[0]).is_loopback


def test_the_file_that_init_writes_has_every_field_at_its_default() -> None:
    text = settings_text("heart", ["fl.example.org"], 8443)
    assert parse_settings(text, "x") == parse_settings(LEAST, "x")
    for table in (Settings, Limits, Runs, Tracking):
        for name in table.__struct_fields__:
            assert re.search(rf"^(\[|# )?{name}\b", text, re.MULTILINE), name


def test_every_field_is_documented_with_its_default() -> None:
    assert settings.__doc__ is not None
    text = re.sub(r"^([a-z_]+ = \S.*?)  +.*$", r"\1", settings.__doc__, flags=re.MULTILINE)
    lines = [line for line in text.splitlines() if re.match(r"[a-z_]+ = |\[", line)]
    documented = msgspec.toml.decode("\n".join(lines))
    assert set(documented["tracking"]) == set(Tracking.__struct_fields__)
    del documented["tracking"]["mlflow"]  # absent unless there is one
    assert msgspec.convert(documented, Settings) == parse_settings(LEAST, "x")
    assert set(documented) == set(Settings.__struct_fields__)
    assert set(documented["limits"]) == set(Limits.__struct_fields__)
    assert set(documented["runs"]) == set(Runs.__struct_fields__)


REFUSED = {
    "a field that is none": ("colour = 1\n", "unknown field `colour`"),
    "a name with a space": ('name = "he art"\n', r"\$\.name"),
    "another host": ('address = "x.org:1"\n', "address: 'x.org' is not one of hosts"),
    "no port": ('address = "fl.example.org"\n', r"\$\.address"),
    "port 0": ('address = "fl.example.org:0"\n', r"\$\.address"),
    "port 65536": ('address = "fl.example.org:65536"\n', r"\$\.address"),
    "no hosts": ("hosts = []\n", r"\$\.hosts"),
    "a host with a slash": ('hosts = ["fl.example.org/x"]\n', r"\$\.hosts"),
    "bind without a port": ('bind = "0.0.0.0"\n', r"\$\.bind"),
    "a page without a host": ('page = ":8444"\n', r"\$\.page"),
    "no days": ("site_days = 0\n", r"\$\.site_days"),
    "too many days": ("server_days = 826\n", r"\$\.server_days"),
    "a limit that is none": ("[limits]\nspeed = 1\n", r"unknown field `speed`.*limits"),
    "no sites": ("[limits]\nmax_sites = 0\n", r"limits\.max_sites"),
    "huge messages": ("[limits]\nmax_message_mb = 2049\n", r"limits\.max_message_mb"),
    "no requests": ("[limits]\nrequests_per_second = 0\n", r"limits\.requests_per_second"),
    "no joins": ("[limits]\njoins_per_minute = 0\n", r"limits\.joins_per_minute"),
    "no waiting": ("[runs]\nconnect_s = 0\n", r"runs\.connect_s"),
    "negative restarts": ("[runs]\nrestarts = -1\n", r"runs\.restarts"),
    "no TOML": ("name = \n", "coordinator.toml"),
    "5000 digits": ("site_days = " + "9" * 5000 + "\n", "coordinator.toml"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_refused_by_the_name_of_its_field(case: str, tmp_path: Path) -> None:
    line, match = REFUSED[case]
    kept = [one for one in LEAST.splitlines() if one.split(" = ")[0] != line.split(" = ")[0]]
    text = line + "\n".join(kept) if not line.startswith("[") else "\n".join(kept) + "\n" + line
    (tmp_path / "coordinator.toml").write_text(text)
    with pytest.raises(ConfigError, match=match) as refused:
        read_settings(tmp_path)
    assert str(tmp_path / "coordinator.toml") in str(refused.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "coordinator.toml").write_bytes(b"name = \xff")
    with pytest.raises(ConfigError, match=r"coordinator\.toml"):
        read_settings(tmp_path)


def test_a_folder_without_settings_is_told_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"anabranch coordinator init.*--folder"):
        read_settings(tmp_path)


def test_init_needs_a_host() -> None:
    with pytest.raises(ConfigError, match="hosts: expected at least one"):
        settings_text("heart", [], 8443)
