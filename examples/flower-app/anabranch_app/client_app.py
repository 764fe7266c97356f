"""The site, as installed on the SuperNode's machine."""

from anabranch.client.app import app

__all__ = ["app"]
