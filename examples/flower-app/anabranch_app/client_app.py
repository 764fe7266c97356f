"""The site or the gateway, as installed on the SuperNode's machine."""

from anabranch.edge.gateway.app import app

__all__ = ["app"]
