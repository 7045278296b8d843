"""What an audit found of a run, as its report shows it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedkeel.evidence.report.tables import Table
from fedkeel.types import FedKeelError

KEPT = "audit.json"

FALSE_ALARMS = 0.01  # share of others that are taken for members, at which hits are told

ATTACKS = {
    "loss": "the lower the loss, the likelier (Yeom et al. 2018)",
    "reference": "the more the loss fell below the base model's (Carlini et al. 2021)",
}


@dataclass(frozen=True)
class Found:
    """Of one attack. low, high: 95 % of the AUC by bootstrap over rows. hits: share of members found at FALSE_ALARMS."""

    attack: str
    auc: float
    low: float
    high: float
    hits: float
    members: int
    others: int


def read_audit(run: Path) -> list[Found]:
    """What `audit` kept; empty where nothing was. Raises FedKeelError for a file that is none."""
    path = run / KEPT
    try:
        return [Found(**told) for told in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []
    except (OSError, ValueError, TypeError) as error:
        raise FedKeelError(f"{path} cannot be read: {error!r}") from error


def audit_table(found: Sequence[Found]) -> Table:
    """A line an attack."""
    lines = [
        (one.attack, ATTACKS[one.attack], f"{one.auc:.3f}", f"{one.low:.3f} to {one.high:.3f}", f"{100 * one.hits:.1f} %")
        for one in found
    ]
    header = ("attack", "what it goes by", "AUC", "95 % interval", f"members found at {FALSE_ALARMS:.0%} false alarms")
    notes = [
        f"{one.members} training rows against {one.others} test rows of the same tasks. AUC 0.5: the model tells this attack "
        f"nothing of membership; stronger ones may find more. The interval is a bootstrap over rows."
        for one in found[:1]
    ]
    return Table("Who was trained on", header, tuple(lines), tuple(notes))
