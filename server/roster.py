"""Which site is behind which of Flower's nodes.

A node's id is random and changes when it is started anew, so nothing may depend on it: every
node is asked once who it is, and from then on names count.

With a roster of the coordinator's (`names`: node -> name) a node is the site that its key says: one
that is not on it is asked nothing, and one that calls itself otherwise is refused. Refusals that
pass by themselves are asked again every `retry_s`: a site whose owner is to approve the run, and a
node that may be put on the roster any moment. Others are asked again every MEND_S, for somebody may
have mended what was wrong; not an owner who has rejected the run.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from flwr.app import RecordDict

from anabranch.client.flower import DESCRIBE
from anabranch.server.flower import Failure, Letter, Peer, read_described
from anabranch.server.mailbox import Mailbox

ROSTER = "roster"  # the reason of a node that is not on the roster under its name
STRANGER = Failure(ROSTER, "this node is not on the coordinator's roster: revoked, or not taken in")
FINAL = re.compile(r"\brejected this run\b")
MEND_S = 60.0
WAITS = re.compile(r"\bwait(s|ing) for\b")  # the words of client/policy/rules.py
CLOSED = re.compile(r"\boutside the hours\b")


@dataclass(frozen=True, kw_only=True)
class Invited:
    """What came of looking for new nodes."""

    asked: tuple[int, ...] = ()
    refused: tuple[tuple[int, Failure], ...] = ()  # without being asked


class Roster:
    """The connected sites, and the nodes that cannot take part.

    What is asked again and again is found out anew only when something has changed.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        describe: RecordDict,
        *,
        names: Callable[[int], str | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        retry_s: float = 5.0,
        ttl_s: float | None = None,
        unfit: Callable[[Peer], Failure | None] = lambda peer: None,
    ) -> None:
        """`unfit` says of a site that could take part why it cannot."""
        self._mail, self._unfit = mailbox, unfit
        self._describe, self._ttl_s = describe, ttl_s
        self._name_of, self._clock, self._retry_s = names, clock, retry_s
        self._retried = clock()  # when those that may pass were asked again
        self._mended = clock()  # when all were
        self._boots: dict[int, str] = {}  # of a node's process when it said who it is
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

    def retry(self, boots: Mapping[str, str] | None = None) -> None:
        """Forget refusals: a site may have been put right since.

        Sites that were started anew since they were asked are asked again who they are; `boots`:
        name -> its process.
        """
        for node, boot in list(self._boots.items()):
            if boots is not None and boots.get(self._peers[node].name, boot) != boot:
                del self._peers[node], self._boots[node]
                self._asked.discard(node)
                self._names = self._single = self._all_asked = self._all_known = None
        self._retried = self._clock()
        if self._failures:
            self._asked -= self._failures.keys()
            self._failures.clear()
            self._changed = True
            self._all_asked = self._all_known = None

    def invite(self) -> Invited:
        """Ask every node that was not asked yet who it is, and those that may have changed."""
        nodes = self._mail.nodes()
        self._reconsider(nodes)
        if nodes is self._all_asked:
            return Invited()
        new = sorted(nodes - self._asked)
        self._asked |= set(new)
        self._all_asked, self._all_known, self._changed = nodes, None, True
        strangers = [node for node in new if self._stranger(node)]
        refused = tuple((n, STRANGER) for n in strangers if self._failures.get(n) != STRANGER)
        self._failures.update(dict.fromkeys(strangers, STRANGER))
        asked = tuple(node for node in new if node not in strangers)
        letters = [(Letter(DESCRIBE, 0, node, ""), self._describe) for node in asked]
        self._mail.send(letters, ttl_s=self._ttl_s)
        return Invited(asked=asked, refused=refused)

    def _reconsider(self, nodes: frozenset[int]) -> None:
        """Let those be asked again whose refusal may have passed, every `retry_s`."""
        now = self._clock()
        if not self._failures or now < self._retried + self._retry_s:
            return
        self._retried = now
        mended = self._name_of is not None and now >= self._mended + MEND_S
        self._mended = now if mended else self._mended
        passing = {
            node
            for node, one in self._failures.items()
            if node in nodes and (passes(one) or (mended and not FINAL.search(one.message)))
        }
        if passing - self._mail.busy():
            self._asked -= passing - self._mail.busy()
            self._all_asked = None

    def _stranger(self, node: int) -> bool:
        return self._name_of is not None and self._name_of(node) is None

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

    def hear(
        self, node: int, answer: RecordDict | Failure, boots: Mapping[str, str] | None = None
    ) -> Peer | Failure:
        """Take a node's answer to an invitation."""
        described, self._changed = self._checked(node, read_described(answer, node)), True
        if isinstance(described, Failure):
            self._failures[node] = described
        else:
            self._failures.pop(node, None)
            self._peers[node], self._names = described, None
            self._single = None
            if boots is not None and described.name in boots:
                self._boots[node] = boots[described.name]
        return described

    def _checked(self, node: int, described: Peer | Failure) -> Peer | Failure:
        """Return what a node says of itself, if it is the roster's site, and fit for the run."""
        named = self._named(node, described)
        if isinstance(named, Failure):
            return named
        return self._unfit(named) or named

    def _named(self, node: int, described: Peer | Failure) -> Peer | Failure:
        if self._name_of is None:
            return described
        name = self._name_of(node)
        if name is None:
            return STRANGER
        if isinstance(described, Failure):
            return replace(described, site=name)
        if described.name != name:
            said = (
                f"it calls itself {described.name[:64]!r}, and its key is that of {name!r}: a site "
                "keeps the name that it was invited with"
            )
            return Failure(ROSTER, said, name)
        return described

    def listed(self, node: int, name: str) -> bool:
        """Whether this node may speak for this site now."""
        return self._name_of is None or self._name_of(node) == name

    def refused(self) -> list[str]:
        """Return the names of connected sites that cannot take part, where they are known."""
        nodes = self._mail.nodes()
        return [one.site for node, one in self._failures.items() if node in nodes and one.site]

    def waiting(self) -> list[str]:
        """Return the connected sites whose owner is to approve the run, ascending."""
        nodes = self._mail.nodes()
        return sorted(
            failure.site or f"node {node}"
            for node, failure in self._failures.items()
            if node in nodes and awaits_approval(failure)
        )

    def closed(self) -> list[str]:
        """Return the connected sites that are outside their hours, ascending."""
        nodes = self._mail.nodes()
        return sorted(
            failure.site or f"node {node}"
            for node, failure in self._failures.items()
            if node in nodes and failure.reason == "policy" and CLOSED.search(failure.message)
        )

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
        if self._name_of is not None:
            single = {name: peer for name, peer in single.items() if self.listed(peer.node, name)}
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


def passes(failure: Failure) -> bool:
    """Whether a refusal may pass without anybody starting the site anew."""
    return failure == STRANGER or (failure.reason == "policy" and waits(failure.message))


def waits(message: str) -> bool:
    """Whether a policy's refusal passes by itself: its owner has not answered, or the hours."""
    return WAITS.search(message) is not None or CLOSED.search(message) is not None


def awaits_approval(failure: Failure) -> bool:
    """Whether a site refused because its owner has not decided yet."""
    return failure.reason == "policy" and WAITS.search(failure.message) is not None
