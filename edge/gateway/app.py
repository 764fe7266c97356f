"""The ClientApp of a gateway: `clientapp = "anabranch.edge.gateway.app:app"`.

The SuperNode is started with `--node-config 'gateway="/path/to/the/gateway"'`, beside
`anabranch edge gateway serve` on the same folder.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from flwr.app import Context

from anabranch.client.flower import SiteLike, client_app
from anabranch.edge.gateway.upstream import GatewaySite
from anabranch.protocols.errors import ConfigError


@cache  # bundles are verified once per process
def open_gateway(folder: Path) -> SiteLike:
    """Return the gateway in `folder`."""
    return GatewaySite(folder)


def gateway_of(context: Context) -> SiteLike:
    """Return the gateway that this node was started for."""
    folder = context.node_config.get("gateway")
    if not isinstance(folder, str) or not folder:
        raise ConfigError(
            "this SuperNode has no gateway: start it with --node-config "
            "'gateway=\"/path/to/the/gateway\"'"
        )
    return open_gateway(Path(folder))


app = client_app(gateway_of)
