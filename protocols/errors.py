"""Every mistake that a user or a peer can make, as one tree.

AnabranchError           a sentence the user can act on; safe to show and to send
├── ConfigError          a run, experiment or site file is wrong
├── DataError            records break the data contract
├── ModelError           a base model or adapter folder cannot be used
├── PrivacyError         privacy cannot be established: nothing may leave
├── PolicyError          a site's owner does not allow it, or has not allowed it yet
├── RunError             a federated run cannot go on (quorum, engine, store)
├── ReleaseError         a release failed its own checks
├── BundleError          a bundle for devices cannot be trusted, opened or run
├── DeviceError          a device cannot do this now: memory, conditions, enrolment, disk
└── ProtocolError        a peer broke the protocol; drop the peer
    ├── MalformedMessage     the bytes do not follow docs/wire-format.md
    ├── IncompatibleAdapter  well-formed, but for another adapter (base, names, shapes)
    └── BadBoxes             boxes of a secure sum that their holder cannot open

Messages name the thing, the value, what was expected and the next step, and never hold
the content of a record: they are sent to the coordinator as they are.
"""

from __future__ import annotations

from typing import Any


class AnabranchError(Exception):
    """Base of all errors whose text is meant for the user."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Go to another process with all fields, whatever a subclass's __init__ takes."""
        return _again, (type(self), self.args), self.__dict__


def _again(kind: type[AnabranchError], args: tuple[Any, ...]) -> AnabranchError:
    return kind.__new__(kind, *args)


class ConfigError(AnabranchError):
    """A configuration file is wrong."""


class DataError(AnabranchError):
    """Records break the data contract, or a data file cannot be read."""


class ModelError(AnabranchError):
    """A base model or adapter folder cannot be used."""


class PrivacyError(AnabranchError):
    """Privacy cannot be established: nothing may leave."""


class PolicyError(AnabranchError):
    """A site's owner does not allow it, or has not allowed it yet."""


class RunError(AnabranchError):
    """A federated run cannot go on."""


class ReleaseError(AnabranchError):
    """A release failed its own checks."""


class BundleError(AnabranchError):
    """A bundle for devices cannot be trusted, opened or run; the message names the rule."""


class DeviceError(AnabranchError):
    """A device cannot do this now: memory, conditions, enrolment, disk."""


class ProtocolError(AnabranchError):
    """A peer broke the protocol. Safe to catch, log, and drop the peer."""


class MalformedMessage(ProtocolError):
    """The bytes do not follow docs/wire-format.md."""


class IncompatibleAdapter(ProtocolError):
    """An adapter for another base model, or with other names or shapes."""


class BadBoxes(ProtocolError):
    """Boxes of a secure sum that their holder cannot open; `senders`: whose boxes they are.

    A sender has sealed its box badly, or it was changed on the way, or the holder lies.
    """

    def __init__(self, text: str, senders: tuple[str, ...]) -> None:
        super().__init__(text)
        self.senders = senders
