"""The folder of one device: what it is enrolled as, its bundles, adapters, ledger and spool.

device.key  device.pem  ca.pem  gateway.json      who it is, whom it talks to
trusted.json                                      public keys whose bundles it opens
versions.json                                     highest version seen of each bundle
peer.key  sums.json                               signs in secure sums; what it has given to them
cache/<sha256>                                    downloaded files, also half of one
bundles/<name>/<version>/                         verified bundles
adapters/<name>/                                  personalised adapters, with the one before
training/<name>/                                  state of a training that was interrupted
ledger.sqlite                                     privacy spent on the device's records
spool/                                            deltas that wait to be sent
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Home:
    """Paths below a device's folder. Nothing is made before it is written."""

    folder: Path

    @classmethod
    def default(cls) -> Home:
        """Return the folder of this user: $XDG_STATE_HOME/anabranch/edge."""
        state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
        return cls(Path(state) / "anabranch" / "edge")

    @property
    def device_key(self) -> Path:
        """Private key of the device's certificate, mode 0600."""
        return self.folder / "device.key"

    @property
    def certificate(self) -> Path:
        """The certificate that the gateway issued."""
        return self.folder / "device.pem"

    @property
    def authority(self) -> Path:
        """The gateway's own certificate authority."""
        return self.folder / "ca.pem"

    @property
    def gateway(self) -> Path:
        """Address and name of the gateway."""
        return self.folder / "gateway.json"

    @property
    def trusted(self) -> Path:
        """Public keys whose bundles are opened."""
        return self.folder / "trusted.json"

    @property
    def versions(self) -> Path:
        """The highest version seen of each bundle."""
        return self.folder / "versions.json"

    @property
    def peer_key(self) -> Path:
        """Private key that signs in secure sums, mode 0600."""
        return self.folder / "peer.key"

    @property
    def sums(self) -> Path:
        """The secure sums that this device helped to open."""
        return self.folder / "sums.json"

    @property
    def cache(self) -> Path:
        """Downloaded files by SHA-256."""
        return self.folder / "cache"

    @property
    def ledger(self) -> Path:
        """Privacy spent on the device's records."""
        return self.folder / "ledger.sqlite"

    @property
    def spool(self) -> Path:
        """Deltas that wait to be sent."""
        return self.folder / "spool"

    def bundle(self, name: str, version: int) -> Path:
        """Where a verified bundle lies."""
        return self.folder / "bundles" / name / str(version)

    def adapters(self, name: str) -> Path:
        """Personalised adapters for a bundle."""
        return self.folder / "adapters" / name

    def training(self, name: str) -> Path:
        """State of an interrupted training."""
        return self.folder / "training" / name
