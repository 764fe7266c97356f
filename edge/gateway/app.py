"""The ClientApp of a gateway, and of a site: `clientapp = "anabranch.edge.gateway.app:app"`.

One run has one ClientApp on all of its SuperNodes. What a node is, it says itself:

    --node-config 'gateway="/path/to/the/gateway"'    beside `anabranch edge gateway serve`
    --node-config 'site="/path/to/the/site"'          client/app.py

A site imports nothing of the gateway.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from flwr.app import Context

from anabranch.client.app import begin, site_of
from anabranch.client.flower import SiteLike, client_app
from anabranch.protocols.errors import ConfigError


@cache  # bundles are verified once per process
def open_gateway(folder: Path) -> SiteLike:
    """Return the gateway in `folder`."""
    from anabranch.edge.gateway.upstream import GatewaySite

    return GatewaySite(folder)


def gateway_or_site(context: Context) -> SiteLike:
    """Return what this node was started for; ConfigError unless it is one of the two."""
    folder, site = (context.node_config.get(key) for key in ("gateway", "site"))
    if not folder and site:
        return site_of(context)
    if site or not isinstance(folder, str) or not folder:
        raise ConfigError(
            "this SuperNode needs one of the two: start it with --node-config "
            "'gateway=\"/path/to/the/gateway\"' or 'site=\"/path/to/the/site\"'"
        )
    begin()
    return open_gateway(Path(folder))


app = client_app(gateway_or_site)
