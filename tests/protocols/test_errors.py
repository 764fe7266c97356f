"""Errors go from process to process with all that they say."""

from __future__ import annotations

import pickle

import pytest

from anabranch.client.agent.door import Refused
from anabranch.client.policy.rules import NotAllowed
from anabranch.protocols.errors import AnabranchError, BadBoxes, RunError
from anabranch.protocols.secagg.fixed_point import OutOfRange


class Keyword(RunError):
    """What no copy by `args` alone can make."""

    def __init__(self, *, site: str) -> None:
        super().__init__(f"{site} is away")
        self.site = site


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("error", "fields"),
    [
        (RunError("no"), {}),
        (BadBoxes("delivery: no", ("delft", "gent")), {"senders": ("delft", "gent")}),
        (OutOfRange("beyond", "value 3"), {"detail": "value 3"}),
        (NotAllowed("memory", "too much"), {"code": "memory"}),
        (Refused("revoked", "you are out"), {"code": "revoked"}),
        (Keyword(site="delft"), {"site": "delft"}),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, AnabranchError) else "",
)
def test_an_error_survives_pickle_with_its_fields(
    error: AnabranchError, fields: dict[str, object], protocol: int
) -> None:
    copy = pickle.loads(pickle.dumps(error, protocol))  # noqa: S301 - our own

    assert type(copy) is type(error)
    assert (str(copy), copy.args) == (str(error), error.args)
    assert vars(copy) == vars(error) == fields
