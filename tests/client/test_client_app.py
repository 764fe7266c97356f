"""The ClientApp: what a site answers, and what never leaves it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from anabranch.client.app import app as deployed_app
from anabranch.client.app import site_of
from anabranch.client.flower import (
    DESCRIBE,
    Describe,
    Described,
    SiteLike,
    client_app,
    pack_assignment,
    pack_describe,
    unpack_described,
    unpack_evaluated,
    unpack_trained,
)
from anabranch.protocols import errors, wire
from anabranch.protocols.adapter import WHOLE, Adapter, Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError, DataError
from anabranch.protocols.messages import Assignment, Evaluated, Refused, Trained
from anabranch.protocols.tables import Uplink
from anabranch.simulations.grid import InProcessGrid
from tests.simulations.rig import SPEC, ToySite, adapter, config


def unpack(content: RecordDict) -> tuple[Trained, Delta] | Refused:
    return unpack_trained(content, SPEC, WHOLE, Uplink())


def ask(app: ClientApp, kind: str, content: RecordDict, site: str = "a") -> RecordDict:
    """Return the content of an app's reply to one message."""
    with InProcessGrid(app, [site]) as grid:
        (node,) = grid.get_node_ids()
        (reply,) = grid.send_and_receive([Message(content, node, kind)], timeout=30)
    return reply.content


def request() -> RecordDict:
    assignment = Assignment(run="toy-1", round=3, config=config())
    return pack_assignment(assignment, wire.encode(adapter()))


def test_a_site_describes_trains_and_evaluates() -> None:
    app = client_app(lambda context: ToySite("a", 12, step=2.0, max_rank=2))

    described = unpack_described(
        ask(app, DESCRIBE, pack_describe(Describe(run="toy-1", config=config())))
    )
    assert described == Described(site="a", num_examples=12, held_out=4, max_rank=2)
    got = unpack(ask(app, "train", request()))
    assert not isinstance(got, Refused)
    assert (got[1].arrays["head.weight"] == 2.0).all()
    evaluated = unpack_evaluated(ask(app, "evaluate", request()))
    assert isinstance(evaluated, Evaluated)
    assert evaluated.num_examples == 4


def test_a_site_says_in_its_own_words_why_it_refuses() -> None:
    class Unfit(ToySite):
        def sizes(self, config: RunConfig) -> Any:
            raise DataError("records.csv: 0 rows, at least 1 needed")

    app = client_app(lambda context: Unfit("a"))
    content = ask(app, DESCRIBE, pack_describe(Describe(run="toy-1", config=config())))

    assert unpack_described(content) == Refused(
        site="a", reason="data", message="records.csv: 0 rows, at least 1 needed"
    )


def test_the_text_of_an_unforeseen_error_stays_in_the_sites_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Crashing(ToySite):
        def train(self, assignment: Assignment, before: Adapter) -> tuple[Trained, bytes]:
            raise KeyError("patient John Doe")

    with caplog.at_level(logging.ERROR):
        content = ask(client_app(lambda context: Crashing("a")), "train", request())

    assert unpack(content) == Refused(
        site="a", reason="internal", message="KeyError in training: see the site's log"
    )
    assert "patient John Doe" in caplog.text
    assert "Traceback" in caplog.text


def test_a_message_that_breaks_the_protocol_is_refused_by_the_site() -> None:
    content = request()
    array = content.array_records["frame"]["frame"]
    array.data = b"x" * len(array.data)
    app = client_app(lambda context: ToySite("a"))

    refused = unpack(ask(app, "train", content))

    assert isinstance(refused, Refused)
    assert refused.reason == "protocol"
    assert refused.message.startswith("expected magic b'ABA1'")


def test_a_site_that_cannot_be_opened_refuses_under_its_nodes_name() -> None:
    def closed(context: Context) -> SiteLike:
        raise errors.ConfigError("site.toml: no such file")

    refused = unpack(ask(client_app(closed), "train", request()))

    assert isinstance(refused, Refused)
    assert refused.site.startswith("node-")
    assert (refused.reason, refused.message) == ("config", "site.toml: no such file")


def test_a_node_without_a_site_says_how_to_start_it() -> None:
    refused = unpack(ask(deployed_app, "train", request(), site=""))

    assert isinstance(refused, Refused)
    assert refused.reason == "config"
    assert "start it with --node-config 'site=" in refused.message


def test_a_site_that_has_joined_is_not_served_without_its_policy(tmp_path: Path) -> None:
    (tmp_path / "identity").mkdir()
    (tmp_path / "identity" / "coordinator.json").write_text("{}")
    context = Context(
        run_id=1,
        node_id=1,
        node_config={"site": str(tmp_path)},
        state=RecordDict(),
        run_config={},
    )

    with pytest.raises(ConfigError, match="whose runs its policy decides on"):
        site_of(context)
