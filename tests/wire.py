"""A link between two network namespaces that loses packets and can be cut: two TUN devices and a thread that carries between.

It takes the place of the kernel's `netem`, which not every machine has.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import select
import struct
import threading

TUNSETIFF, IFF_TUN, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 0x0001, 0x1000, 0x40000000


def _enter(path: str) -> None:
    """Move this thread, and no other, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.open(path, os.O_RDONLY)
    try:
        if libc.setns(handle, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {path}")
    finally:
        os.close(handle)


class Wire(threading.Thread):
    """Carries packets between a device called `name` in namespace `a` and one in `b`; of every packet, `loss` is the
    probability that it is dropped. While `cut` is set nothing passes."""

    def __init__(self, a: str, b: str, name: str, loss: float, seed: int) -> None:
        super().__init__(daemon=True)
        self._ends, self._name, self._loss, self._random = (a, b), name, loss, random.Random(seed)
        self._ready, self._over = threading.Event(), threading.Event()
        self.cut = threading.Event()
        self.carried = self.dropped = 0
        self.start()
        if not self._ready.wait(10):
            raise OSError("no TUN device could be made")

    def run(self) -> None:
        devices = []
        for end in self._ends:
            _enter(f"/run/netns/{end}")
            device = os.open("/dev/net/tun", os.O_RDWR)  # it belongs to the namespace that the thread is in
            fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", self._name.encode(), IFF_TUN | IFF_NO_PI))
            devices.append(device)
        self._ready.set()
        over = dict(zip(devices, reversed(devices), strict=True))
        while not self._over.is_set():
            for device in select.select(devices, [], [], 0.2)[0]:
                packet = os.read(device, 65536)
                if self.cut.is_set() or self._random.random() < self._loss:
                    self.dropped += 1
                    continue
                with contextlib.suppress(OSError):  # the other end is down, or full
                    os.write(over[device], packet)
                    self.carried += 1
        for device in devices:
            os.close(device)

    def close(self) -> None:
        """Take the link away."""
        self._over.set()
        self.join(5)
