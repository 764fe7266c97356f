"""run.toml, read."""

from __future__ import annotations

from pathlib import Path

from anabranch.protocols.config import RunConfig, parse
from anabranch.protocols.errors import ConfigError


def read_run(path: Path) -> RunConfig:
    """Return the run configuration in `path`; raise ConfigError naming file and field."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror or error}; give the path of a run.toml"
        ) from None
    return parse(data, source=str(path))
