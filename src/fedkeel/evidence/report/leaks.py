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
class Told:
    """Of one attack on updates of `steps` steps of `rows` rows in `round` (from 1), behind a guard. what: `words` of the rows
    or their `answers`. epsilon: of one such update; None where nothing is promised. there: how many words, or answers, were to
    be found, over all `updates`. found, usual: share of them among as many best guesses of the attack, and of a baseline that
    goes by how common a word or an answer is and looks at no update. auc, usual_auc: of both, against those of other rows; low,
    high: 95 % by bootstrap."""

    what: str
    guard: str
    epsilon: float | None
    round: int
    rows: int
    steps: int
    updates: int
    there: int
    found: float
    usual: float
    auc: float
    low: float
    high: float
    usual_auc: float


@dataclass(frozen=True)
class Audited:
    """All that an audit found."""

    attacks: tuple[Found, ...] = ()
    secrets: tuple[Exposed, ...] = ()
    updates: tuple[Told, ...] = ()


def read_audit(run: Path) -> Audited:
    """What `audit` kept; empty where nothing was. Raises FedKeelError for a file that is none."""
    path = run / KEPT
    if not path.exists():
        return Audited()
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        updates = tuple(Told(**one) for one in told.get("updates", ()))  # of an audit from before there was this, none
        return Audited(
            tuple(Found(**one) for one in told["attacks"]), tuple(Exposed(**one) for one in told["secrets"]), updates
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise FedKeelError(f"{path} cannot be read: {error!r}") from error


def audit_tables(found: Audited) -> list[Table]:
    """What was found, in tables; none where nothing was looked for."""
    tables = _attacks(found.attacks), _secrets(found.secrets), told_table(found.updates)
    return [table for table in tables if table.lines]


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


def told_table(found: Sequence[Told]) -> Table:
    """A line an attack on updates."""
    lines = [
        (
            one.what,
            f"{one.rows} × {one.steps}",
            str(one.round),
            one.guard,
            "–" if one.epsilon is None else f"{one.epsilon:.1f}",
            f"{100 * one.found:.0f} %",
            f"{100 * one.usual:.0f} %",
            f"{one.auc:.2f} ({one.low:.2f} to {one.high:.2f})",
            f"{one.usual_auc:.2f}",
        )
        for one in found
    ]
    header = ("what", "rows × steps", "round", "guard", "ε", "found", "by how common", "AUC", "by how common, AUC")
    notes = [
        f"Updates of {one.updates} sites, made anew from the run's checkpoints and attacked by a coordinator that has the test "
        f"rows. Found: of the words (tokens but those of nearly every row) or answers behind an update, those among "
        f"as many best guesses; beside it a baseline that never sees the update. AUC: against those of other rows. ε: of one "
        f"such update, of a row or of the site, at δ = 1e-5, the run's own at its δ. A stronger attack may find more."
        for one in found[:1]
    ]
    return Table("What one update tells", header, tuple(lines), tuple(notes))
