"""What all settings share: fields with their choices and bounds, and their error."""

from __future__ import annotations

import os
from dataclasses import field
from typing import Any

from fedkeel.types import FedKeelError


class ConfigError(FedKeelError):
    """A recipe that cannot be run as written."""


def _one_of(default: str, *choices: str) -> Any:
    return field(default=default, metadata={"choices": choices})


def _number(default: float, low: float, high: float = float("inf"), *, above: bool = False) -> Any:
    """A number in [low, high], or in (low, high] with `above`."""
    return field(default=default, metadata={"low": low, "high": high, "above": above})


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
