"""Which site is behind which of Flower's nodes.

A node's id is random and changes when it is started anew, so nothing may depend on it: every
node is asked once who it is, and from then on names count.
"""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import RecordDict

from anabranch.client.flower import DESCRIBE
from anabranch.server.flower import Failure, Letter, Mailbox, Peer, read_described


class Roster:
    """The connected sites, and the nodes that cannot take part.

    What is asked again and again is found out anew only when something has changed.
    """

    def __init__(self, mailbox: Mailbox, describe: RecordDict) -> None:
        self._mail = mailbox
        self._describe = describe
        self._asked: set[int] = set()
        self._silent: set[int] = set()  # nodes that were waited for in vain
        self._peers: dict[int, Peer] = {}
        self._names: dict[str, list[Peer]] | None = None  # all peers by name; None: to be made
        self._failures: dict[int, Failure] = {}
        self._changed = False  # whether somebody was asked or heard since `give_up`
        # The nodes that were connected when something was found to hold; None: find out.
        self._all_asked: frozenset[int] | None = None
        self._all_known: frozenset[int] | None = None
        self._single: tuple[frozenset[int], dict[str, Peer]] | None = None

    def retry(self) -> None:
        """Forget refusals: a site may have been put right since."""
        if self._failures:
            self._asked -= self._failures.keys()
            self._failures.clear()
            self._changed = True
            self._all_asked = self._all_known = None

    def invite(self) -> None:
        """Ask every node that was not asked yet who it is."""
        nodes = self._mail.nodes()
        if nodes is self._all_asked:
            return
        new = sorted(nodes - self._asked)
        self._asked |= set(new)
        self._mail.send([(Letter(DESCRIBE, 0, node, ""), self._describe) for node in new])
        self._all_asked, self._all_known, self._changed = nodes, None, True

    def settled(self) -> bool:
        """Whether no connected node is still to be waited for."""
        nodes = self._mail.nodes()
        if nodes is not self._all_known:
            known = self._peers.keys() | self._failures.keys()
            if not (nodes & self._asked) - self._silent <= known:
                return False
            self._all_known = nodes
        return True

    def give_up(self) -> None:
        """Wait no longer for nodes that have not answered; if they do, they are welcome."""
        if self._changed:
            self._silent = self._asked - self._peers.keys() - self._failures.keys()
            self._changed = False

    def hear(self, node: int, answer: RecordDict | Failure) -> Peer | Failure:
        """Take a node's answer to an invitation."""
        described, self._changed = read_described(answer, node), True
        if isinstance(described, Failure):
            self._failures[node] = described
        else:
            self._peers[node], self._names = described, None
            self._single = None
        return described

    def available(self) -> Mapping[str, Peer]:
        """Return name -> site of those that are connected and have nothing left to answer.

        Ascending, and not to be changed. Two nodes of one name are left out, both: which is
        meant cannot be told.
        """
        nodes, busy = self._mail.nodes(), self._mail.busy()
        if self._single is None or self._single[0] is not nodes:
            online = self._online().items()
            self._single = nodes, {name: one[0] for name, one in online if len(one) == 1}
        single = self._single[1]
        if not busy:
            return single
        return {name: peer for name, peer in single.items() if peer.node not in busy}

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
