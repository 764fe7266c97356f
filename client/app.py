"""The ClientApp of a deployed site: `clientapp = "anabranch.client.app:app"`.

The SuperNode is started with `--node-config 'site="/path/to/the/site"'`; the folder is
described in client/site.py. It starts a process for each message: between two stages of a secure
sum, what the site needs is in memory beside them (client/sums/between.py). This is for a Flower
deployment of one's own: there is no policy and no enrolment on this way (docs/joining.md is the
other), and a site that has joined does not go it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from flwr.app import Context

from anabranch.client.agent.identity import joined
from anabranch.client.flower import SiteLike, client_app
from anabranch.client.sums.between import sweep
from anabranch.protocols.errors import ConfigError
from anabranch.storage.dumps import forbid_dumps


@cache  # a site keeps its model and its prefix activations between the messages of a process
def open_site(folder: Path, process_per_message: bool = False) -> SiteLike:
    """Return the site in `folder`; torch is imported here, when there is something to do."""
    from anabranch.client.site import Site

    return Site(folder, process_per_message=process_per_message)


def begin() -> None:
    """Begin a process for one message of any kind: no dumps, and nothing of sums that are over."""
    forbid_dumps()
    sweep()


def site_of(context: Context) -> SiteLike:
    """Return the site that this node was started for."""
    begin()
    folder = context.node_config.get("site")
    if not isinstance(folder, str) or not folder:
        raise ConfigError(
            "this SuperNode has no site: start it with --node-config 'site=\"/path/to/the/site\"'"
        )
    if joined(Path(folder)):
        raise ConfigError(
            "this site has joined a federation, whose runs its policy decides on: take part with "
            "`anabranch site serve`, not with a SuperNode"
        )
    return open_site(Path(folder), process_per_message=True)


app = client_app(site_of)
