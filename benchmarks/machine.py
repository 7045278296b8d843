"""What benchmarks read off the machine."""

from __future__ import annotations

from pathlib import Path


def resident() -> float:
    """MB that this process held at most. Not getrusage: its maximum begins with that of the process that started this one."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1e3
    raise SystemExit("no /proc/self/status to read the peak memory from; this needs Linux")


def shared(mark: bytes) -> int:
    """Bytes held now by all processes whose environment holds `mark`: proportional set sizes, so shared pages count once."""
    total = 0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (path / "environ").read_bytes():
                lines = (path / "smaps_rollup").read_bytes().split(b"\n")
                total += 1024 * next(int(line.split()[1]) for line in lines if line.startswith(b"Pss:"))
        except (OSError, StopIteration):
            continue  # it has ended, or is about to
    return total
