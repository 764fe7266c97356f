"""What an agent says with nothing to do: what its owner has to do, and what it refused."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from anabranch.client.agent import work
from anabranch.client.agent.work import Doing, Told
from anabranch.client.policy.rules import NotAllowed
from anabranch.protocols.errors import AnabranchError, DataError
from tests.simulations.rig import ToySite, config

WAITS = NotAllowed("pending", "waiting for the owner: `anabranch site policy approve 0123456789ab`")
RULE = NotAllowed("privacy", "privacy.epsilon = 20, and this site's policy allows 8")


class Refusing(ToySite):
    """Refuses a run for as long as `why` is there."""

    why: AnabranchError | None = None

    def admit(self, *_: Any) -> None:
        if self.why is not None:
            raise self.why


def told(why: AnabranchError | None) -> Told:
    site = Refusing("cork")
    site.why = why
    return Told(site, Doing("1"))


def asks(one: Told, run: str) -> str:
    """Let a run ask; return what the agent says then."""
    with contextlib.suppress(AnabranchError):
        one.admit(run, config(), None)
    one.rest()
    return f"{one.doing.report.activity}: {one.doing.report.reason}"


def test_a_run_that_waits_for_the_owner_is_said_until_it_is_admitted() -> None:
    one = told(WAITS)
    assert asks(one, "r1") == f"waiting: {WAITS}"
    one.site.why = None  # type: ignore[attr-defined]
    assert asks(one, "r1") == "idle: "


@pytest.mark.parametrize("why", [RULE, DataError("the records do not keep the contract")])
def test_a_refusal_that_does_not_pass_is_no_waiting(why: AnabranchError) -> None:
    assert asks(told(why), "r1") == f"idle: refused run r1: {why}"


def test_what_the_owner_has_to_do_comes_before_what_was_refused() -> None:
    one = told(RULE)
    asks(one, "r1")
    one.site.why = WAITS  # type: ignore[attr-defined]
    assert asks(one, "r2") == f"waiting: {WAITS}"


def test_a_run_that_asks_no_more_is_waited_for_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "WAIT_S", 0.0)
    assert asks(told(WAITS), "r1") == "idle: "
