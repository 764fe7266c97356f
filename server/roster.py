"""Which site is behind which of Flower's nodes.

A node's id is random and changes when it is started anew, so nothing may depend on it: every
node is asked once who it is, and from then on names count.
"""

from __future__ import annotations

from flwr.app import RecordDict

from anabranch.client.flower import DESCRIBE
from anabranch.server.flower import Failure, Letter, Mailbox, Peer, read_described


class Roster:
    """The connected sites, and the nodes that cannot take part."""

    def __init__(self, mailbox: Mailbox, describe: RecordDict) -> None:
        self._mail = mailbox
        self._describe = describe
        self._asked: set[int] = set()
        self._silent: set[int] = set()  # nodes that were waited for in vain
        self._peers: dict[int, Peer] = {}
        self._names: dict[str, list[Peer]] | None = None  # all peers by name; None: to be made
        self._failures: dict[int, Failure] = {}

    def retry(self) -> None:
        """Forget refusals: a site may have been put right since."""
        self._asked -= self._failures.keys()
        self._failures.clear()

    def invite(self) -> None:
        """Ask every node that was not asked yet who it is."""
        new = sorted(self._mail.nodes() - self._asked)
        self._asked |= set(new)
        self._mail.send([(Letter(DESCRIBE, 0, node, ""), self._describe) for node in new])

    def settled(self) -> bool:
        """Whether no connected node is still to be waited for."""
        known = self._peers.keys() | self._failures.keys()
        return (self._mail.nodes() & self._asked) - self._silent <= known

    def give_up(self) -> None:
        """Wait no longer for nodes that have not answered; if they do, they are welcome."""
        self._silent = self._asked - self._peers.keys() - self._failures.keys()

    def hear(self, node: int, answer: RecordDict | Failure) -> Peer | Failure:
        """Take a node's answer to an invitation."""
        described = read_described(answer, node)
        if isinstance(described, Failure):
            self._failures[node] = described
        else:
            self._peers[node], self._names = described, None
        return described

    def available(self) -> dict[str, Peer]:
        """Return name -> site of those that are connected and have nothing left to answer.

        Ascending. Two nodes of one name are left out, both: which is meant cannot be told.
        """
        return {
            name: peers[0]
            for name, peers in self._online().items()
            if len(peers) == 1 and not self._mail.waits_for(peers[0].node)
        }

    def problems(self) -> list[str]:
        """Return one line for every connected node that cannot take part."""
        twins = [
            f"{name}: {len(peers)} nodes have this name; give every site its own"
            for name, peers in self._online().items()
            if len(peers) > 1
        ]
        refusals = [
            f"{failure.site or f'node {node}'}: {failure.reason}: {failure.message}"
            for node, failure in self._failures.items()
        ]
        silent = [f"node {node}: does not say who it is" for node in self._silent]
        return twins + refusals + silent

    def _online(self) -> dict[str, list[Peer]]:
        """Return name -> nodes of that name, ascending."""
        if self._names is None:
            self._names = {}
            for peer in sorted(self._peers.values(), key=lambda peer: (peer.name, peer.node)):
                self._names.setdefault(peer.name, []).append(peer)
        nodes = self._mail.nodes()
        if nodes.issuperset(self._peers):
            return self._names
        here = (
            (name, [peer for peer in peers if peer.node in nodes])
            for name, peers in self._names.items()
        )
        return {name: peers for name, peers in here if peers}
