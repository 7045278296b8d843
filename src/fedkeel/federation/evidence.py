"""What a site's loss goes by beside its rows' own answers: which labels its rows of this stage hold, and what the analytic
anchor says of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch

from fedkeel import tables
from fedkeel.data.batches import Batch
from fedkeel.data.format import Example
from fedkeel.method.objective import anchor
from fedkeel.method.objective.calibrate import along
from fedkeel.model.bases import ModelError
from fedkeel.model.features import STEP, Features, chances
from fedkeel.model.lora import Model
from fedkeel.recipe.schema import Evidence
from fedkeel.types import Head, Offsets, Soft, Sums


def calibration_of(examples: Sequence[Example], config: Evidence) -> Calibration | None:
    """The recipe's, of a site with these training rows in this stage; None for plain cross-entropy."""
    return Calibration(examples, config) if tables.CALIBRATIONS[config.task].code else None


def _first(batch: Batch, rows: int) -> list[int]:
    """Of each row, its first position; the others stand behind it."""
    return torch.searchsorted(batch.rows, torch.arange(rows)).tolist()


class Calibration:
    """Offsets on the logits of a site's rows by the recipe's `evidence.task`; free text and chats have none.

    examples: all training rows of the site in this stage.
    """

    def __init__(self, examples: Sequence[Example], config: Evidence) -> None:
        self._config, self._offset = config, tables.CALIBRATIONS[config.task].load()
        self._counts = Counter((e.task, e.label) for e in examples if e.label)
        self._known: dict[tuple[str, tuple[str, ...], tuple[int, ...]], list[tuple[int, int, float]]] = {}

    def __call__(self, batch: Batch, examples: Sequence[Example]) -> Offsets | None:
        """Of a batch's positions; None where nothing is changed, so that the loss is then the plain one to the bit."""
        first = _first(batch, len(examples))
        places, tokens, values = [], [], []
        for row, example in enumerate(examples):
            for place, token, value in self._of(example):
                places.append(first[row] + place)
                tokens.append(token)
                values.append(value)
        if not places:
            return None
        return Offsets(torch.tensor(places), torch.tensor(tokens), torch.tensor(values))

    def _of(self, example: Example) -> list[tuple[int, int, float]]:
        if len(example.options) < 2:
            return []
        key = (example.task, example.labels, example.answer)
        if key not in self._known:
            counts = [self._counts[example.task, label] for label in example.labels]
            self._known[key] = along(example.answer, example.options, counts, self._offset, self._config)
        return self._known[key]


Listed = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...], tuple[float, ...]]


class Anchor:
    """The analytic classifiers as a teacher of rows: what they give to each next token on the way of the right answer.

    A position counts what the classifier's trust in the right label is (`evidence.trust`), and, within a label's text, what the
    classifier gives to the labels that are still possible there.
    """

    def __init__(self, features: Features, heads: Mapping[str, Head], config: Evidence) -> None:
        """heads: as they came down, by task."""
        self._features, self._heads, self._trusts = features, heads, config.trust
        self._known: dict[str, Listed] = {}  # of a row

    def __call__(self, batch: Batch, examples: Sequence[Example]) -> Soft | None:
        """Of a batch's positions, in the order of its rows; None where nothing is known of any."""
        taught = [n for n, e in enumerate(examples) if e.task in self._heads and len(e.options) > 1]
        self._ask([examples[n] for n in taught if examples[n].record not in self._known])
        first = _first(batch, len(examples))
        place: list[int] = []
        token: list[int] = []
        value: list[float] = []
        weight = torch.zeros(len(batch.targets))
        for row in taught:
            at, tokens, chances, weights = self._known[examples[row].record]
            place += [first[row] + p for p in at]
            token += tokens
            value += chances
            weight[[first[row] + p for p in at]] = torch.tensor(weights)
        return Soft(torch.tensor(place), torch.tensor(token), torch.tensor(value), weight) if place else None

    def _ask(self, examples: Sequence[Example]) -> None:
        alike: dict[tuple[str, tuple[str, ...]], list[Example]] = defaultdict(list)
        for example in examples:
            alike[example.task, example.labels].append(example)
        for (task, labels), rows in alike.items():
            head = self._heads[task]
            told = chances(head, self._features([e.prompt for e in rows]), labels).double()
            trust = dict(zip(head.labels, head.trust.tolist(), strict=True)) if self._trusts else {}
            for example, chance in zip(rows, told.tolist(), strict=True):
                own = trust.get(example.label, 0.0) if self._trusts else 1.0
                listed = anchor.along(example.answer, example.options, chance)
                at, tokens, values, masses = zip(*listed, strict=True) if listed else ((), (), (), ())
                self._known[example.record] = (at, tokens, values, tuple(own * mass for mass in masses))


def check_pooled(model: Model) -> None:
    """Raise ModelError for a model whose states of rows are not pooled as the features are."""
    if model.kind != "classifier" or model.linear_head:
        raise ModelError(
            f"evidence.prototype: the states of {model.config.base!r} are not pooled, as an encoder's are whose classes are "
            f"scored by words or by an analytic head; leave it out"
        )


class Prototypes:
    """What the states of rows are pulled to: the mean features of each label over all sites' rows, in the frozen base.

    Source: FedProto, arXiv:2105.00243; see `method.objective.prototype`.
    """

    def __init__(self, heads: Mapping[str, Head]) -> None:
        """heads: as they came down, by task."""
        self._means = {
            (task, label): STEP * mean[:-1]  # without the intercept
            for task, head in heads.items()
            if head.mean is not None
            for label, mean in zip(head.labels, head.mean, strict=True)
        }

    def __call__(self, pooled: torch.Tensor, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(states of the rows whose label has a prototype, these); None where no row has. pooled: (rows, d)."""
        rows = [n for n, e in enumerate(examples) if (e.task, e.label) in self._means]
        if not rows:
            return None
        return pooled[rows], torch.stack([self._means[examples[n].task, examples[n].label] for n in rows])


def known_sums(features: Features, examples: Sequence[Example], stage: int) -> dict[str, Sums]:
    """What a site's rows of a stage say of each task with labels."""
    return {t: anchor.sums_of(features([e.prompt for e in rows]), [e.label for e in rows], stage) for t, rows in _of(examples)}


def tried(
    features: Features, examples: Sequence[Example], heads: Mapping[str, Head], inverses: Mapping[str, torch.Tensor]
) -> dict[str, tuple[dict[str, int], list[float]]]:
    """How well the classifiers foretell a site's rows, each as if it had not been in their sums: `anchor.foretold` by task."""
    found = {}
    for task, rows in _of(examples):
        head, labels = heads[task], [e.label for e in rows]
        scores = anchor.left_out(features([e.prompt for e in rows]), labels, head.labels, head.weight, inverses[task])
        found[task] = anchor.foretold(scores, labels, head.labels)
    return found


def _of(examples: Sequence[Example]) -> list[tuple[str, list[Example]]]:
    tasks: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        if example.label:
            tasks[example.task].append(example)
    return sorted(tasks.items())
