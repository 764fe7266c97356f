"""Machines with addresses of their own on one machine: network namespaces, joined by this process.

    coordinator 10.90.0.1 ─ tun ┐                    ┌ tun ─ site 10.90.0.2
                                ├─ this process ─────┤
                                      (router)       └ tun ─ site 10.90.0.3 …

Every machine has one link, which has a rate, loss and delay in each direction and can be cut and
changed at any time. A packet waits for its turn on both links, is lost with either's chance, and
arrives after both delays: what tc's netem does, without its kernel module. Nothing else can be
reached from the namespaces. Needs root, `ip` and /dev/net/tun.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import threading
import time
from dataclasses import dataclass

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MTU, QUEUE_S = 1500, 1.0  # a packet that would wait longer for its turn is dropped


class NotPermitted(Exception):
    """Namespaces or tun devices cannot be made here."""


@dataclass
class Link:
    """One machine's link; may be changed while it is used."""

    bits_per_s: float = 1e9
    loss: float = 0.0
    delay_s: float = 0.0
    up: bool = True


@dataclass(eq=False)
class Machine:
    """A namespace. `prefix` runs a command in it."""

    name: str
    address: str
    tun: int
    link: Link
    free_out: float = 0.0  # when its link can take the next packet
    free_in: float = 0.0

    @property
    def prefix(self) -> list[str]:
        """What a command is to begin with to run on this machine."""
        return ["ip", "netns", "exec", self.name]


class Network:
    """A context manager; `machine` adds a machine."""

    def __init__(self) -> None:
        self.machines: dict[bytes, Machine] = {}  # by address
        self.carried = self.lost = 0  # bytes; packets
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._carry, daemon=True)

    def __enter__(self) -> Network:
        if shutil.which("ip") is None:
            raise NotPermitted("no `ip` here: install iproute2")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10)
        for machine in self.machines.values():
            os.close(machine.tun)
            subprocess.run(["ip", "netns", "delete", machine.name], capture_output=True)

    def machine(self, link: Link | None = None) -> Machine:
        """Return a new machine at the next address."""
        number = len(self.machines) + 1
        address = f"10.90.0.{number}"
        name, device = f"anabranch{os.getpid()}n{number}", f"ab{os.getpid()}n{number}"
        try:
            tun = _end(device, name, address)
        except (OSError, NotPermitted) as error:
            raise NotPermitted(f"namespaces or tun devices: {error}") from None
        made = Machine(name, address, tun, link or Link())
        self.machines = {**self.machines, socket.inet_aton(address): made}
        return made

    def _carry(self) -> None:
        rng, number = random.Random(0), 0
        waiting: list[tuple[float, int, Machine, bytes]] = []
        while not self._over.is_set():
            machines = {one.tun: one for one in self.machines.values()}
            left = waiting[0][0] - time.monotonic() if waiting else 0.1
            ready, _, _ = select.select(list(machines), [], [], min(max(left, 0.0), 0.1))
            for tun in ready:
                packet = os.read(tun, 65536)
                number += 1
                self._take(machines[tun], packet, number, rng, waiting)
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                _, _, to, packet = heapq.heappop(waiting)
                if to.link.up:
                    os.write(to.tun, packet)
                    self.carried += len(packet)

    def _take(
        self,
        source: Machine,
        packet: bytes,
        number: int,
        rng: random.Random,
        waiting: list[tuple[float, int, Machine, bytes]],
    ) -> None:
        """Plan when a packet arrives, or lose it."""
        to = self.machines.get(packet[16:20]) if packet[:1] and packet[0] >> 4 == 4 else None
        if to is None:
            return
        now, out, inward = time.monotonic(), source.link, to.link
        lost = rng.random() < out.loss or rng.random() < inward.loss
        full = source.free_out - now > QUEUE_S or to.free_in - now > QUEUE_S
        if lost or full or not (out.up and inward.up):
            self.lost += 1
            return
        bits = 8 * len(packet)
        source.free_out = max(now, source.free_out) + bits / out.bits_per_s
        to.free_in = max(source.free_out, to.free_in) + bits / inward.bits_per_s
        due = to.free_in + out.delay_s + inward.delay_s
        heapq.heappush(waiting, (due, number, to, packet))


def _end(device: str, namespace: str, address: str) -> int:
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH", device.encode(), IFF_TUN | IFF_NO_PI))
        _ip("netns", "add", namespace)
        _ip("link", "set", device, "netns", namespace)
        _ip("-n", namespace, "address", "add", f"{address}/24", "dev", device)
        _ip("-n", namespace, "link", "set", device, "mtu", str(MTU), "up")
        _ip("-n", namespace, "link", "set", "lo", "up")
    except BaseException:
        os.close(tun)
        raise
    return tun


def _ip(*words: str) -> None:
    found = subprocess.run(["ip", *words], capture_output=True, text=True)
    if found.returncode:
        raise NotPermitted(f"ip {' '.join(words)}: {found.stderr.strip()}")
