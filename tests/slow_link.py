"""Two network namespaces with a bad link between them: rate, loss and delay, packet by packet.

    far (10.90.0.1)  ── tun ── this process ── tun ──  near (10.90.0.2)

A packet in each direction waits for its turn at `rate`, is lost with chance `loss`, and arrives
`delay_s` later: what tc's netem does, without its kernel module. Nothing else can be reached from
the namespaces. Needs root, `ip` and /dev/net/tun.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
FAR, NEAR = "10.90.0.1", "10.90.0.2"
MTU, QUEUE_S = 1500, 1.0  # a packet that would wait longer for its turn is dropped


class NotPermitted(Exception):
    """Namespaces or tun devices cannot be made here."""


class SlowLink:
    """A context manager; `far` and `near` are command prefixes."""

    def __init__(self, *, bits_per_s: float, loss: float, delay_s: float) -> None:
        self.bits_per_s, self.loss, self.delay_s = bits_per_s, loss, delay_s
        self.carried = self.lost = 0
        self._names = [f"anabranch{os.getpid()}{side}" for side in "fn"]
        self.far, self.near = (["ip", "netns", "exec", name] for name in self._names)
        self._tuns: list[int] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._carry, daemon=True)

    def __enter__(self) -> SlowLink:
        if shutil.which("ip") is None:
            raise NotPermitted("no `ip` here: install iproute2")
        try:
            for side, (name, address) in enumerate(zip(self._names, (FAR, NEAR), strict=True)):
                self._tuns.append(self._end(f"ab{os.getpid()}{side}", name, address))
        except (OSError, NotPermitted) as error:
            self.__exit__()
            raise NotPermitted(f"namespaces or tun devices: {error}") from None
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(10)
        for tun in self._tuns:
            os.close(tun)
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def _end(self, device: str, namespace: str, address: str) -> int:
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

    def _carry(self) -> None:
        rng, number = random.Random(0), 0
        free = [0.0, 0.0]  # when each direction can take the next packet
        waiting: list[tuple[float, int, int, bytes]] = []
        while not self._over.is_set():
            now = time.monotonic()
            left = waiting[0][0] - now if waiting else 0.1
            ready, _, _ = select.select(self._tuns, [], [], min(max(left, 0.0), 0.1))
            now = time.monotonic()
            for tun in ready:
                side, packet = self._tuns.index(tun), os.read(tun, 65536)
                number += 1
                if rng.random() < self.loss or free[side] - now > QUEUE_S:
                    self.lost += 1
                    continue
                free[side] = max(now, free[side]) + 8 * len(packet) / self.bits_per_s
                heapq.heappush(waiting, (free[side] + self.delay_s, number, 1 - side, packet))
            while waiting and waiting[0][0] <= now:
                _, _, side, packet = heapq.heappop(waiting)
                os.write(self._tuns[side], packet)
                self.carried += len(packet)


def _ip(*words: str) -> None:
    found = subprocess.run(["ip", *words], capture_output=True, text=True)
    if found.returncode:
        raise NotPermitted(f"ip {' '.join(words)}: {found.stderr.strip()}")
