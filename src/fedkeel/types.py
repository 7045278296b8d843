"""The nouns of FedKeel: shapes and units are stated here, once.

Nothing here imports torch at run time, so that reading a recipe or a results file stays fast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class FedKeelError(Exception):
    """An error that the user can act on. Its text names the file, key or site, and what would be right."""


@dataclass(frozen=True)
class Lora:
    """A low-rank change of one linear map: W = W0 + scale · b @ a.

    a: (r, d_in). b: (d_out, r). scale: α/r, or α/√r under rsLoRA; a mathematical object carries its scale.
    """

    a: Tensor
    b: Tensor
    scale: float

    def dense(self) -> Tensor:
        """scale · b @ a, (d_out, d_in), in the factors' own precision."""
        return self.scale * (self.b @ self.a)


@dataclass(frozen=True)
class Adapter:
    """All that training changes: low-rank factors by module path, and whole tensors by parameter path.

    lora: module path in the base model (`model.layers.0.self_attn.q_proj`) -> Lora.
    dense: parameter path (`classifier.weight`) -> tensor trained in full, such as a fresh classification head.
    """

    lora: Mapping[str, Lora]
    dense: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under a flat name: `<path>.a`, `<path>.b`, and dense parameters by their own path."""
        flat: dict[str, Tensor] = {}
        for path, factors in self.lora.items():
            flat[f"{path}.a"], flat[f"{path}.b"] = factors.a, factors.b
        return flat | dict(self.dense)

    def with_tensors(self, flat: Mapping[str, Tensor]) -> Adapter:
        """The same structure and scales around other tensors, named as `tensors` names them."""
        lora = {p: Lora(flat[f"{p}.a"], flat[f"{p}.b"], m.scale) for p, m in self.lora.items()}
        return Adapter(lora, {p: flat[p] for p in self.dense})


@dataclass(frozen=True)
class Sums:
    """What the rows of one task say through features h of the frozen base, whole numbers (see `method.objective.anchor`).

    gram: Σ h hᵀ over all rows, (d, d) int64. moments: label -> Σ h over its rows, (d,) int64. rows: label -> how many. hits:
    label -> those that the others, of the same stage and all before, foretell; nats: of their labels so foretold, in total, at
    each of `anchor.SCALES`; both as they stood when the row came, empty before they are counted. stage: of the stream, from 0,
    in which rows last came.
    """

    gram: Tensor
    moments: Mapping[str, Tensor]
    rows: Mapping[str, int]
    hits: Mapping[str, int] = field(default_factory=dict)
    nats: Sequence[float] = ()
    stage: int = 0


@dataclass(frozen=True)
class Head:
    """The analytic classifier of one task: the score of label l on features h is weight[l] · h.

    labels: those that any site has had a row of, sorted. weight: (labels, d) float32. scale: a of softmax(a · scores). trust:
    (labels,) float32 in [0, 1], the share of a label's rows that the others foretell. stage: of the stream, from 0, in which
    rows of the task last came. mean: (labels, d) float32, of a label's features, where a term asks for it.
    """

    labels: tuple[str, ...]
    weight: Tensor
    scale: float
    trust: Tensor
    stage: int = 0
    mean: Tensor | None = None


# What one round adds to frozen maps: module path -> (left (d_out, R), right (R, d_in)); left @ right is added.
Shift = Mapping[str, "tuple[Tensor, Tensor]"]


@dataclass(frozen=True)
class Update:
    """What one site gives back for one round, decoded: its adapter after training.

    positions: supervised positions trained on in this round, > 0. stats: further numbers by name (mean loss in nats per
    position under `loss`, wall-clock seconds under `seconds`). tasks: supervised positions that the site holds, by task.
    held: entries of the log of base shifts that its base holds. side: of the clipping bound, see `exchange.quantile`.
    """

    site: str
    adapter: Adapter
    positions: int
    stats: Mapping[str, float] = field(default_factory=dict)
    tasks: Mapping[str, int] = field(default_factory=dict)
    held: int = 0
    side: float = 0.0


@dataclass(frozen=True)
class Global:
    """The state of a federation after `round` rounds (0: before the first).

    memory: what was served after the previous stage of a task stream; None before the second stage. counts: supervised
    positions that each site holds of each task, as the sites last reported them: site -> task -> positions. drift: how far
    the sites disagreed in the last round, by block of the model, see `aggregate.drift`; empty before the first. shifts: the
    log of base shifts, one entry a round under the rules that make them. held: entries of it that each site held when it
    last answered. optimiser: what the server's optimiser keeps, by name. heads: the analytic classifiers so far, by task.
    serve: their weight beside the adapter, and average: the share of what was served before the last stage that ended, each
    where validation rows have chosen one.
    clip: C of the next round where it follows a quantile, see `exchange.quantile`; 0: the recipe's. reach: of the rows of each
    tensor in the next round, where changes add up in few bits, see `exchange.summands`.
    """

    round: int
    adapter: Adapter
    memory: Adapter | None = None
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    drift: Mapping[str, float] = field(default_factory=dict)
    shifts: Sequence[Shift] = ()
    held: Mapping[str, int] = field(default_factory=dict)
    optimiser: Mapping[str, Tensor] = field(default_factory=dict)
    heads: Mapping[str, Head] = field(default_factory=dict)
    serve: float | None = None
    average: float | None = None
    clip: float = 0.0
    reach: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Soft:
    """Distributions over some entries of some positions: entry `token[m]` of position `place[m]` has probability `value[m]`,
    each (M,), those of a position adding up to 1. weight: (N,) ≥ 0, what each position's counts; 0 where there is none."""

    place: Tensor
    token: Tensor
    value: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Teacher:
    """What the global model says at the N positions of a `Forward`, and what it is trusted for. No gradient reaches it.

    logits: (N, V); where a class is not allowed, −inf as in the student's. states: (N, d) a tapped layer, as the student's.
    gold_trust, rest_trust: (N,) ≥ 0, the weight w of the gold part and of the rest (task and site, method.md §2): over a site's
    rows about u on average, in [¼, 1]. layer_trust: one number a tapped layer, π, ≥ 0 with sum 1; empty where none is.
    """

    logits: Tensor
    gold_trust: Tensor
    rest_trust: Tensor
    states: Sequence[Tensor] = ()
    layer_trust: Sequence[float] = ()


@dataclass(frozen=True)
class Offsets:
    """What is added to some logits before the task loss: `value[m]` to entry `token[m]` of position `place[m]`, each (M,)."""

    place: Tensor
    token: Tensor
    value: Tensor


@dataclass(frozen=True)
class Forward:
    """Everything a loss term may look at, at the N supervised positions of a micro-batch.

    logits: (N, V) of the student. targets: (N,) int64 in [0, V). rows: (N,) int64, the row of the micro-batch that a
    position belongs to. states: (N, d) hidden states of each tapped layer, from the lowest to the highest; empty where
    nothing is tapped. teacher: None where nothing is distilled. again, clean: (N, V) logits of a second disturbed pass, and of
    an undisturbed one without gradient; None where no term asked for them. offsets: what the site's evidence on labels changes
    of the task loss; None for nothing. anchor: what the analytic classifier says; None where no term asked, or it says nothing.
    exit: (N, V) logits at an earlier block; None where no term asked for them. pooled: (rows, d) of an encoder, what it makes
    of whole rows, as `features.standardised`; prototypes: of the rows of a label that has one, that (M, d), and the label's
    prototype (M, d) without gradient; None where no term asked, or there is none.
    """

    logits: Tensor
    targets: Tensor
    rows: Tensor
    states: Sequence[Tensor] = ()
    teacher: Teacher | None = None
    again: Tensor | None = None
    clean: Tensor | None = None
    offsets: Offsets | None = None
    anchor: Soft | None = None
    exit: Tensor | None = None
    pooled: Tensor | None = None
    prototypes: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Parameters:
    """What a term of weights may look at: the trained tensors now, and as they were when the round began, in one order.

    downs: of each branch A, (r, d_in), as it is now. ranks: those that are trained, of `stream.slices`; else all.
    """

    now: Sequence[Tensor]
    start: Sequence[Tensor]
    downs: Sequence[Tensor] = ()
    ranks: range = range(0)


@dataclass(frozen=True)
class Loss:
    """What a term may return instead of a scalar. value: with gradient. told: what is logged of it; None: the value.

    gates: (N,) numbers by name, without gradient, whose mean and quartiles are logged.
    """

    value: Tensor
    told: Tensor | None = None
    gates: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """One row of text with its answer, as read from a source and before any tokenizer.

    id: stable and derived from the content, so that file order means nothing. task: its name. split: `train`,
    `validation` or `test`. site: the natural key (department, author, library area), empty where the source has none.
    instruction, input: the prompt's two parts, either may be empty. output: the answer to train on, never empty.
    references: all accepted answers for scoring (default: only `output`). labels: the candidate answers of a
    classification row, in a fixed order and with `output` among them; empty for free generation.
    messages: (role, text) turns of a chat row, which then replaces instruction, input and output in the prompt; the last
    turn is the assistant's and equals `output`. unlearnt: which of its answers are read and not learnt. ignored: keys of the
    row that nothing was made of. group: the group of its answer among the task's labels (CLINC150's
    domains), empty where the source names none; a stage of a task stream may be made of groups.
    """

    id: str
    task: str
    split: str
    output: str
    instruction: str = ""
    input: str = ""
    site: str = ""
    references: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    messages: tuple[tuple[str, str], ...] = ()
    group: str = ""
    unlearnt: tuple[int, ...] = ()
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One measured number; a run is a file of them, and reports read nothing else.

    run: the run's name. method: which leg of it (`base`, `local`, `centralised`, `federated`). round: rounds finished
    when it was read. site, task: empty means all of them. stage: index in a task stream, 0 outside one. name: what was
    measured. unit: of `value` (`share`, `nats`, `bytes`, `seconds`, `rows`, ...). split: which rows, where it applies.
    """

    run: str
    method: str
    seed: int
    round: int
    name: str
    value: float
    unit: str
    site: str = ""
    stage: int = 0
    task: str = ""
    split: str = ""

    def as_json(self) -> dict[str, Any]:
        """A JSON object; NaN and infinity, which JSON cannot hold, become null."""
        row = asdict(self)
        row["value"] = self.value if math.isfinite(self.value) else None
        return row

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Row:
        """The Row of an object that `as_json` made; null becomes NaN. Raises TypeError on other keys, and looks at no type."""
        row: dict[str, Any] = {**told}
        if row.get("value", 0.0) is None:
            row["value"] = math.nan
        return cls(**row)


@dataclass(frozen=True)
class Request:
    """What goes down to one site: a sealed message."""

    site: str
    payload: bytes


@dataclass(frozen=True)
class Reply:
    """What came back from one site: a sealed message, or the text of what went wrong there (its traceback)."""

    site: str
    payload: bytes = b""
    error: str = ""


class Transport(Protocol):
    """Carries messages between the round loop and the sites; algorithms know no more of an engine than this."""

    def exchange(self, requests: Sequence[Request], deadline: float) -> Sequence[Reply]:
        """One reply for every request, in any order. A site without an answer after `deadline` seconds gets an error."""
        ...
