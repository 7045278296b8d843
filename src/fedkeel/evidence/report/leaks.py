"""What an audit found of a run, as its report shows it."""

from __future__ import annotations

import json
import math
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


@dataclass(frozen=True)
class Exposed:
    """Of one planted secret. rank, base_rank: of the true code among `codes`, 1 the likeliest, under the federated model and
    under the base."""

    secret: str
    rank: int
    base_rank: int
    codes: int

    @property
    def exposure(self) -> float:
        """log₂ codes − log₂ rank, of Carlini et al. 2019: log₂ codes where the true one is first, 0 where it is last."""
        return math.log2(self.codes / self.rank)


@dataclass(frozen=True)
class Audited:
    """All that an audit found."""

    attacks: tuple[Found, ...] = ()
    secrets: tuple[Exposed, ...] = ()


def read_audit(run: Path) -> Audited:
    """What `audit` kept; empty where nothing was. Raises FedKeelError for a file that is none."""
    path = run / KEPT
    if not path.exists():
        return Audited()
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return Audited(tuple(Found(**one) for one in told["attacks"]), tuple(Exposed(**one) for one in told["secrets"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FedKeelError(f"{path} cannot be read: {error!r}") from error


def audit_tables(found: Audited) -> list[Table]:
    """What was found, in tables; none where nothing was looked for."""
    return [table for table in (_attacks(found.attacks), _secrets(found.secrets)) if table.lines]


def _secrets(found: Sequence[Exposed]) -> Table:
    lines = [(one.secret, f"{one.rank:,}", f"{one.exposure:.1f}", f"{one.base_rank:,}") for one in found]
    most = math.log2(found[0].codes) if found else 0.0
    notes = [
        f"Secrets planted in training; the rank of the true code among {one.codes} by likelihood, 1 the likeliest. Exposure is "
        f"log₂ codes − log₂ rank in bits, {most:.1f} at most, and 1.4 on average where the model knows nothing."
        for one in found[:1]
    ]
    return Table("Planted secrets", ("secret", "rank", "exposure, bits", "rank by the base"), tuple(lines), tuple(notes))


def _attacks(found: Sequence[Found]) -> Table:
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
