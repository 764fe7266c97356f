"""The coordinator, as installed on the SuperLink's machine."""

from anabranch.server.app import app

__all__ = ["app"]
