"""What benchmarks read off the machine."""

from __future__ import annotations

from pathlib import Path


def resident() -> float:
    """MB that this process held at most. Not getrusage: its maximum begins with that of the process that started this one."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1e3
    raise SystemExit("no /proc/self/status to read the peak memory from; this needs Linux")
