"""Run configurations that tests of data start from."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from anabranch.protocols.config import RunConfig

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
    """Return a function from a task's kind, its columns and its labels to a RunConfig."""

    def make(
        kind: str, columns: dict[str, Any], labels: tuple[str, ...] = ("no", "yes"), **data: Any
    ) -> RunConfig:
        model = data.pop("model", {"base": "logistic"})
        contract = {"columns": columns, **data}
        return msgspec.convert(
            {
                "name": "test",
                "task": {"kind": f"{kind}-classification", "labels": labels},
                "data": contract,
                "model": model,
                "federation": {"rounds": 1},
            },
            RunConfig,
        )

    return make
