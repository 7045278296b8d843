"""What is measured: metrics, families of damage, and the parts of `fedkeel measure`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedkeel.tables.entry import Entry, Table, imported


@dataclass(frozen=True)
class Metric(Entry):
    """A score of an answer: (prediction, references) -> a share. title: of its column. of: `labels`, chosen; `text`, generated;
    or `given`, of a given free text: then it is (nats, tokens found the likeliest, tokens) -> value. counts: of its kind, it is
    the score, of several the first. by_token: its mean over rows is weighted by their tokens, and it is no share but in nats.
    """

    title: str = ""
    of: str = "text"
    counts: bool = False
    by_token: bool = False

    @property
    def unit(self) -> str:
        """Of its rows."""
        return "nats" if self.by_token else "share"


METRICS = Table(
    "metric",
    {
        "accuracy": Metric("fedkeel.scores.metrics:same", title="accuracy", of="labels", counts=True),
        "rouge_l": Metric("fedkeel.scores.metrics:rouge_l", title="ROUGE-L", counts=True),
        "exact_match": Metric("fedkeel.scores.metrics:exact_match", title="exact match"),
        "token_accuracy": Metric("fedkeel.scores.metrics:token_accuracy", title="token accuracy", of="given", counts=True),
        "nats": Metric("fedkeel.scores.metrics:nats_a_token", title="loss, nats a token", of="given", by_token=True),
    },
)


def by_token(name: str) -> bool:
    """Whether a number of this name is a metric in nats a token, and not a share of a row."""
    return name in METRICS and METRICS[name].by_token


@dataclass(frozen=True)
class Damage(Entry):
    """A family of damage: (model, strength, seed, undo) damages a model, see `scores.damage`.

    axis: what a strength is. none: the strength that is no damage, a number or a word. strengths: those that are measured, from
    the least damage to the most. distance: (strength) -> how far it is from none; empty: their difference. random: another seed
    is other damage. branches: only maps with an adapter branch are damaged. trained_by: structures that disturb the same while
    training. exits: early exits do too.
    """

    axis: str = "strength"
    none: float | str = 0.0
    strengths: tuple[float, ...] = ()
    distance: str | Callable[[float], float] = ""
    random: bool = True
    branches: bool = False
    trained_by: tuple[str, ...] = ()
    exits: bool = False

    def apart(self, strength: float) -> float:
        """How far `strength` is from no damage, which is 0."""
        if self.distance:
            return float(imported(self.distance, self.name)(strength))
        return abs(strength - self.none) if isinstance(self.none, int | float) else float(strength)


_DAMAGE = "fedkeel.scores.damage"
_SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)
DAMAGES = Table(
    "family of damage",
    {
        "heads": Damage(f"{_DAMAGE}:heads", axis="share of attention heads silenced", strengths=_SHARES, trained_by=("heads",)),
        "channels": Damage(
            f"{_DAMAGE}:channels", axis="share of feed-forward channels silenced", strengths=_SHARES, trained_by=("channels",)
        ),
        "skip": Damage(f"{_DAMAGE}:skip", axis="blocks skipped", strengths=(1.0,), trained_by=("layers", "skip")),
        "depth": Damage(
            f"{_DAMAGE}:depth",
            axis="share of blocks cut off the top",
            strengths=(0.1, 0.2, 0.3),
            random=False,
            trained_by=("layers", "skip"),
            exits=True,
        ),
        "modules": Damage(
            f"{_DAMAGE}:modules",
            axis="share of adapter modules dropped",
            strengths=(0.1, 0.25, 0.5),
            branches=True,
            trained_by=("branch", "lodrop"),
        ),
        "scale": Damage(
            f"{_DAMAGE}:scale",
            axis="factor on the adapter",
            none=1.0,
            strengths=(0.5, 0.75, 1.25, 1.5),
            random=False,
            branches=True,
            trained_by=("rank",),
        ),
        "noise": Damage(
            f"{_DAMAGE}:noise", axis="weight noise σ", strengths=(0.05, 0.1, 0.2), branches=True, trained_by=("weights",)
        ),
        "bits": Damage(
            f"{_DAMAGE}:bits",
            axis="bits of a weight",
            none="none",
            strengths=(8.0, 4.0),
            distance=f"{_DAMAGE}:step_of",
            random=False,
            branches=True,
        ),
        "base": Damage(
            f"{_DAMAGE}:base",
            axis="bits of a number of the base",
            none="none",
            strengths=(8.0, 4.0),
            distance=f"{_DAMAGE}:step_of",
            random=False,
        ),
    },
)


@dataclass(frozen=True)
class Column:
    """A column of the table of measures: the mean of the rows whose name begins with `rows`. percent: in points of 100."""

    title: str
    rows: str
    method: str = "federated"
    split: str = ""
    percent: bool = False
    last_stage: bool = True


@dataclass(frozen=True)
class Measure(Entry):
    """A part of `fedkeel measure`: (run) -> Rows, see `evidence.measure`. about: (settings) -> all that decides its outcome
    beside the run, as JSON has it, or None where it is not asked for; empty: always asked for, and nothing decides. one_model:
    it says nothing where factors stay at the sites. columns: of the table of measures.
    """

    about: str | Callable[..., Any] = ""
    one_model: bool = True
    columns: tuple[Column, ...] = ()

    def asked(self, settings: Any) -> Any:
        """What `about` says."""
        return imported(self.about, self.name)(settings) if self.about else {}


_MEASURE = "fedkeel.evidence.measure"
MEASURES = Table(
    "measure",
    {
        "size": Measure(f"{_MEASURE}.size:size", one_model=False),
        "damage": Measure(
            f"{_MEASURE}.damage:undamaged",
            about=f"{_MEASURE}.damage:about",
            columns=(Column("undamaged", "damage/clean", percent=True),),
        ),
        "general": Measure(
            f"{_MEASURE}.general:general",
            about=f"{_MEASURE}.general:about",
            columns=(Column("KL to base", "kl_to_base"), Column("perplexity ratio", "perplexity_ratio")),
        ),
        "unseen": Measure(
            f"{_MEASURE}.unseen:unseen",
            about=f"{_MEASURE}.unseen:about",
            columns=(
                Column("unseen tasks", "score", split="unseen", percent=True),
                Column("unseen tasks: base", "score", method="base", split="unseen", percent=True),
            ),
        ),
        "states": Measure(
            f"{_MEASURE}.states:states",
            about=f"{_MEASURE}.states:about",
            columns=(Column("CKA: earlier stages", "state_cka/", last_stage=False), Column("CKA: sites", "site_cka/")),
        ),
        "blocks": Measure(
            f"{_MEASURE}.blocks:blocks",
            about=f"{_MEASURE}.blocks:about",
            columns=(Column("without the least fifth of blocks", "blocks/0.2/score", percent=True),),
        ),
        "speculation": Measure(
            f"{_MEASURE}.speculation:speculation",
            about=f"{_MEASURE}.speculation:about",
            columns=(Column("foretold by half the blocks", "speculation/0.5/acceptance", percent=True),),
        ),
    },
)
