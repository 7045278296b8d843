"""A run's recipe: frozen dataclasses. What a value may be stands beside it; what values demand of each other in `checks`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from fedkeel import tables
from fedkeel.recipe.settings import ConfigError, Frozen, checked, meant, named_by, number, numbers, one_of, own_of

LAYERS = re.compile(r"\d+(-\d+)?")


@dataclass(frozen=True)
class Model:
    """The frozen base model."""

    base: str = meant(
        "keel-nano", "`keel-nano` (embedded), `smollm2` (once fetched), a folder, a GGUF file or an id of the hub"
    )
    revision: str = meant("main", "of a base from the hub")
    kind: str = one_of(
        "auto", ("auto", "causal", "seq2seq", "classifier"), "what it is loaded as; `auto` reads its config.json"
    )
    head: str = one_of(
        "label-text",
        ("label-text", "analytic", "linear"),
        "of an encoder: `label-text` scores a class by how similar the text is to the label's own words, frozen; `analytic` by "
        "the ridge classifier of sums over all sites and stages, frozen for a stage; `linear` trains a fresh classification "
        "head",
    )
    feature_depths: tuple[float, ...] = numbers(
        0,
        "shares of the depth whose states the analytic anchor sees, side by side, such as 0.5, 1; empty: below the first block "
        "that is trained, or the last ones",
        1,
        above=True,
    )
    chat_template: str = meant(
        "", "`none`, one of several that the tokenizer has, or a Jinja file, whose text a run keeps; empty: the tokenizer's own"
    )
    device: str = meant("cpu", "as torch names it: `cpu`, `cuda`, `cuda:1`")
    precision: str = one_of(
        "auto", ("auto", "fp32", "bf16"), "of the passes; `auto` is bf16 where the device has it and it is faster"
    )
    cache_memory: int = number(
        1024, 0, about="hidden states kept in memory below the first block of lora.layers; no bit depends on it", unit="MiB"
    )
    cache_disk: int = number(8192, 0, about="what does not fit there, in an unnamed temporary file", unit="MiB")


def _layers(spec: tuple[str, ...]) -> str:
    if spec in ((), ("upper-half",)) or all(LAYERS.fullmatch(part) for part in spec):
        return ""
    return "'upper-half' or a list of blocks from 0, such as [20, 21] or ['15-29'], belongs here"


@dataclass(frozen=True)
class LoraConfig:
    """The adapter: W = W₀ + scale · B A."""

    rank: int = number(8, 1, about="r, of the global adapter")
    alpha: float = number(16.0, 0, about="scale · r, or scale · √r with rslora", above=True)
    rslora: bool = meant(False, "scale alpha / √r in place of alpha / r (Kalajdzievski 2023)")
    dropout: float = number(0.0, 0, 0.99, "of what enters A, while training", unit="probability")
    targets: tuple[str, ...] = meant((), "names of linear maps; empty: attention and feed-forward maps of the architecture")
    layers: tuple[str, ...] = checked(
        (),
        _layers,
        'blocks that get an adapter: `upper-half`, or numbers from 0, `[20, 21]` or `["15-29"]`; empty: all',
        whole=True,
    )
    site_ranks: tuple[int, ...] = meant(
        (), "ranks of the sites, gone through in the order of their names, none over `rank`; empty: `rank` everywhere"
    )

    @property
    def one_rank(self) -> bool:
        """Whether the adapters of all sites are of `rank`."""
        return set(self.site_ranks) <= {self.rank}

    def ranks(self, sites: Iterable[str]) -> dict[str, int]:
        """site -> rank of its adapter, `site_ranks` gone through in the order of the names; empty where all are of `rank`."""
        if self.one_rank:
            return {}
        return {name: self.site_ranks[n % len(self.site_ranks)] for n, name in enumerate(sorted(sites))}

    def blocks(self, count: int) -> list[int]:
        """The blocks, of `count`, that get an adapter; empty: all. Raises ConfigError for one that the base does not have."""
        if self.layers == ("upper-half",):
            return list(range(count // 2, count))
        ends = [part.split("-") for part in self.layers]
        found = sorted({block for low, *high in ends for block in range(int(low), int(high[0] if high else low) + 1)})
        if found and found[-1] >= count:
            raise ConfigError(f"lora.layers = {list(self.layers)}: the base has blocks 0 to {count - 1}")
        return found

    def scale(self, rank: int) -> float:
        """What the product of the factors of an adapter of `rank` is multiplied by: α/r, or α/√r under rsLoRA."""
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class Data:
    """Rows of text, and how much of them is used."""

    source: str = one_of(
        "pydocs",
        tables.SOURCES,
        "`pydocs` (docstrings of your own Python), `files` (JSON Lines, CSV, TSV, Parquet below root), `hub` (a data set of "
        "the Hugging Face hub, or a folder of one), `rows` (given from Python)",
    )
    root: str = meant("", "the folder that `files` and `tasks_file` are relative to")
    files: tuple[str, ...] = meant((), 'names or patterns, such as `["wards/*.csv"]`')
    tasks_file: str = meant("", "JSON with each task's `instruction` and `labels`, `references` by row id, and orders of tasks")
    tasks: tuple[str, ...] = meant((), "keep only these; empty: all")
    drop_labels: tuple[str, ...] = meant((), "leave out rows whose answer is one of these")
    site_from: str = one_of(
        "column", ("column", "file", "folder"), 'what names the site of a row for partition.scheme = "natural"'
    )
    site_column: str = meant("", "the column, or key, that names the site of a row")
    dataset: str = meant("", "for `hub`: an id, or a folder")
    subset: str = meant("", "for `hub`: the configuration of a data set that has several")
    instruction: str = meant("", "stands before every row that has none of its own")
    rows_per_site: int = number(0, 0, about="training rows kept a site, chosen by hash; 0: all", unit="rows")
    validation_share: float = number(0.1, 0, 0.5, "of the rows without a `split`, held out for validation", unit="share")
    test_share: float = number(0.1, 0, 0.5, "of the same rows, held out for test", unit="share")
    max_length: int = number(
        512, 8, about="of a row, its prompt and its answer; longer texts are cut and counted", unit="tokens"
    )
    list_labels: int = number(16, 0, about="name the labels in the prompt where a task has at most so many", unit="labels")


@dataclass(frozen=True)
class Partition:
    """How rows become sites."""

    scheme: str = one_of("natural", tables.PARTITIONS, "`natural`: by the source's own key, see data.site_from")
    sites: int = number(4, 1, about="to deal to; `natural` has its own", unit="sites")
    alpha: float = number(0.3, 0, 1e6, "of the Dirichlet draw; small is skewed", above=True)
    over: str = one_of("labels", ("labels", "tasks"), "what a Dirichlet draw is made for")


@dataclass(frozen=True)
class Train:
    """One site's round. Exactly one of local_steps and local_epochs is above 0. Learning rate and warm-up span a stage."""

    lr: float = number(
        3e-3, 0, about="learning rate of AdamW at its height; as a rule 3 to 10 times that of full training", above=True
    )
    local_steps: int = number(10, 0, about="of a site in a round; 0 where local_epochs is set", unit="optimiser steps")
    local_epochs: int = number(0, 0, about="of a site in a round, in place of local_steps", unit="epochs")
    batch_size: int = number(16, 1, about="of an optimiser step", unit="rows")
    micro_batch_size: int = number(0, 0, about="at once, for less memory; 0: batch_size", unit="rows")
    warmup: float = number(0.05, 0, 1, "of a stage's steps, over which the rate rises from 0", unit="share")
    final_lr: float = number(0.1, 0, 1, "of lr at the stage's end; it falls in a line", unit="share")
    weight_decay: float = number(0.0, 0, about="of AdamW")
    clip_norm: float = number(1.0, 0, about="largest norm of a gradient; a longer one is scaled down", above=True)
    proximal: float = number(0.0, 0, about="FedProx: this times half the squared distance from the global adapter")
    sam: float = number(0.0, 0, about="FedSAM: radius of the ascent before each step; costs a second pass")

    @property
    def at_once(self) -> int:
        """Most rows that one pass takes."""
        return self.micro_batch_size or self.batch_size


@dataclass(frozen=True)
class Stream:
    """A task stream: each stage is tasks, labels or groups of labels, joined by `+`, and lasts federation.rounds rounds.

    Empty: one stage with everything.
    """

    stages: tuple[str, ...] = meant(
        (), "tasks, labels or label groups of each, joined by `+`; empty: one stage with everything"
    )
    order: str = meant("", "a named order of tasks of data.tasks_file, in place of stages; a run keeps it written out")
    tasks_a_stage: int = number(1, 1, about="of `order`, in a stage", unit="tasks")
    replay: int = number(
        0,
        0,
        about="of each earlier stage that a site keeps and trains on beside new ones, chosen by hash; 0: it keeps no row",
        unit="rows",
    )
    average: float = number(
        0.0, 0, 0.99, "of what was served after the stage before, in what is served after this one", unit="share"
    )
    average_from: tuple[float, ...] = numbers(
        0,
        "in place of average: after each stage but the first, the one of these with which validation rows score best",
        high=0.99,
    )
    slices: bool = meant(
        False, "each stage trains its own share of the ranks, and those of the others stay as they are (O-LoRA)"
    )

    @property
    def averages(self) -> bool:
        """Whether what is served after a stage has a share of what was served before it."""
        return bool(self.average or self.average_from)


@dataclass(frozen=True)
class Evidence:
    """What a site's loss may ask for by the rows that it holds (docs/method.md)."""

    task: str = one_of(
        "plain",
        tables.CALIBRATIONS,
        "cross-entropy over all labels, `restricted` to those that the site holds (FedRS), or shifted by the log of their "
        "shares (`prior`: FedLC, logit adjustment)",
    )
    kappa: float = number(1.0, 0, about="of `prior`: how far")
    epsilon: float = number(0.1, 0, about="of `prior`: added to each label's count", above=True, unit="rows")
    anchor: float = number(
        0.0, 0, about="λ_a, of the KL from the analytic anchor, a ridge classifier of sums over all sites and stages; 0: none"
    )
    trust: bool = meant(True, "the anchor counts for a label by the share of its rows that the others foretell")
    ridge: float = number(
        0.0, 0, about="λ of the anchor, of the mean diagonal of its Gram matrix; 0: by generalised cross-validation"
    )
    serve: float = number(
        0.0, 0, about="of the anchor's log chances, added to the model's own wherever labels are scored; 0: not served"
    )
    serve_from: tuple[float, ...] = numbers(
        0, "in place of serve: after each stage, the one of these weights with which validation rows score best"
    )

    prototype: float = number(
        0.0,
        0,
        about="λ_p, of the distance of an encoder's states to the mean that all sites' rows of a label have in the frozen "
        "base (as FedProto); 0: none",
    )

    @property
    def asked(self) -> bool:
        """Whether something here is made of sums over rows."""
        return bool(self.anchor or self.prototype or self.served)

    @property
    def served(self) -> bool:
        """Whether the anchor scores labels beside the adapter."""
        return bool(self.serve or self.serve_from)


@dataclass(frozen=True)
class Distill:
    """Guidance by the global model as it stood when the round began (docs/method.md). weight = 0: no such guidance."""

    weight: float = number(0.0, 0, about="λ_d, of the whole term; 0: none of it runs")
    temperature: float = number(1.0, 0, about="τ, that softens both distributions", above=True)
    gold: str = one_of(
        "sigmoid", ("sigmoid", "hard", "constant", "off"), "trust in the teacher on the right answer, token by token"
    )
    kappa: float = number(1.0, 0, about="how soft the gate `sigmoid` is", above=True, unit="nats")
    rest: str = one_of("kl", ("kl", "entropy", "constant", "off"), "trust in it on the rest of its distribution")
    beta: float = number(1.0, 0, about="height of `entropy` and `constant`")
    task_trust: bool = meant(True, "more where the others hold more of a task than the site itself")
    site_trust: bool = meant(True, "the more skewed a site, the more it listens: a factor from ¼ to 1")
    trust_by: str = one_of("task", ("task", "label"), "what both are counted by; `label` sends label names and counts")
    align: str = one_of(
        "off", ("off", "cka", "cosine"), "hidden states too, at a quarter, half, three quarters and all of the blocks"
    )
    align_weight: float = number(0.1, 0, about="η, of `align`'s loss")
    layer_trust: bool = meant(True, "align less where the sites disagreed in the last round")
    memory: float = number(0.0, 0, 1, "of the teacher that is what was served after the stage before", unit="share")
    ramp: float = number(0.1, 0, 1, "of the run, over which the weight rises from 0", unit="share")
    every: int = number(1, 1, about="guidance in every n-th step, at n times the weight", unit="steps")
    cache: int = number(
        64, 0, about="kept of a teacher's distribution where a round meets rows again; 0: no cache", unit="entries"
    )


class _Modes(Iterable[str]):
    """What structure.mode may be: how structures enter the loss."""

    def __iter__(self) -> Any:
        return iter(("implicit", "anchored", *(entry.mode for entry in tables.TERMS.values() if entry.mode)))


def _amount(entry: tables.Structure) -> Mapping[str, Any]:
    return {"low": 0, "high": 0.9 if entry.chance else math.inf, "above": False, "infinite": False}


@dataclass(frozen=True)
class Structure:
    """Modules injected while training (docs/method.md). amounts: structure -> drop probability, standard deviation or norm,
    under its own name (`structure.heads = 0.1`); 0: not injected."""

    mode: str = one_of(
        "implicit",
        _Modes(),
        "how they enter the loss: alone (`implicit`), against a clean pass (`self`), against a second draw (`rdrop`), or "
        "through the clean teacher (`anchored`)",
    )
    weight: float = number(1.0, 0, about="λ_s, of the consistency term of `self` and `rdrop`")
    every: int = number(4, 1, about="`self` compares in every n-th step", unit="steps")
    amounts: Frozen[float] = field(default_factory=Frozen, metadata=named_by(tables.STRUCTURES, _amount))
    hold: bool = meant(
        False, "`branch` and `skip` draw once a round: branches and whole blocks that are left out are neither trained nor sent"
    )
    ramp: float = number(0.2, 0, 1, "of the run, over which strength rises from 0", unit="share")
    anneal: float = number(0.1, 0, 1, "of the run, at its end, over which it falls to 0", unit="share")

    def amount(self, name: str) -> float:
        """Of a structure; 0 where it is not injected."""
        return self.amounts.get(name, 0.0)


@dataclass(frozen=True)
class Exit:
    """An early exit in the loss: what the model would say if it ended at a block drawn for each step (docs/method.md)."""

    weight: float = number(0.0, 0, about="λ_e, of the loss at that block; 0: no exit")
    least: float = number(0.5, 0, 1, "of the depth, from which blocks are drawn", unit="share")
    teach: str = one_of(
        "labels",
        ("labels", "self", "both"),
        "what an exit learns from: answers, the full depth of the same pass, or half of each",
    )
    deepen: float = number(0.0, 0, 1, "of the run, over which exits spread from the top down to `least`", unit="share")


def _codec(spec: str) -> str:
    try:
        tables.codec_parts(spec)
    except ValueError:
        return tables.codec_grammar()
    return ""


@dataclass(frozen=True)
class Federation:
    """The round loop. quorum: share of the sampled sites that must answer well, else the run stops with their errors."""

    rounds: int = number(10, 1, about="of each stage", unit="rounds")
    patience: int = number(
        0,
        0,
        about="after which a stage ends, if none was above the best; 0: it lasts all its rounds",
        unit="points of the curve",
    )
    keep: str = one_of("last", ("last", "best"), "what a stage ends in: its last round, or its best by validation rows")
    sites_per_round: int = number(0, 0, about="drawn anew each round; 0: all", unit="sites")
    rule: str = one_of("mean", tables.RULES, "of aggregation, see docs/exchange.md")
    hostile: int = number(0, 0, about="that may lie: what `trimmed` and `krum` are to withstand", unit="sites")
    weighting: str = one_of(
        "positions", tables.WEIGHTINGS, "what a site counts by: its supervised tokens, their root, or nothing"
    )
    optimiser: str = one_of("average", tables.OPTIMISERS, "of the server, around the rule")
    server_lr: float = number(1.0, 0, about="of that optimiser", above=True)
    codec_up: str = checked(
        "fp32", _codec, "how updates travel: `fp32`, `bf16`, `fp16`, `int8`, `int4`, `topk=0.1`, `topk=0.1+int4`, …"
    )
    codec_down: str = checked("fp32", _codec, "how the global adapter travels")
    error_feedback: bool = meant(
        True, "a site adds what a lossy codec_up left out to its next update, where the rule keeps the factors' basis"
    )
    quorum: float = number(1.0, 0, 1, "of the asked sites that must answer well, else the run stops", above=True, unit="share")
    deadline: float = number(3600.0, 0, about="of a round", above=True, unit="seconds")
    max_update_norm: float = number(math.inf, 0, about="of a site's change; beyond, it is refused", above=True, infinite=True)


@dataclass(frozen=True)
class Privacy:
    """Differential privacy of a site's whole contribution, or of each of its training rows (docs/privacy.md)."""

    unit: str = one_of(
        "none", ("none", "site", "row"), "whose presence is hidden: nobody's, all that a site contributes, or a training row"
    )
    clip: float = number(
        1.0, 0, about="C, most that a site's change of a round, or a row's gradient, may be long, Euclidean", above=True
    )
    quantile: float = number(
        0.0,
        0,
        1,
        "γ, of the sites' changes that are to be no longer than C, which then moves from `clip` on; 0: it stays",
        unit="share",
    )
    clip_rate: float = number(
        0.2, 0, about="η, the step of that: C becomes C · exp(−η (share − γ)) after each round", above=True
    )
    count_noise: float = number(
        0.0,
        0,
        about="σ_b, deviation of the noise in the count of those; 0: a twentieth of the sites, and at least z",
        unit="sites",
    )
    noise: float = number(0.0, 0, about="z: the sum over sites, or over a step's rows, has Gaussian noise of deviation z · C")
    noise_at: str = one_of(
        "sites",
        ("sites", "coordinator"),
        "who adds it: each site before it sends, or the coordinator, who then sees updates without",
    )
    together: int = number(
        1, 1, about="sites whose noise together is the whole; 1: each update is private by itself", unit="sites"
    )
    masks: bool = meant(False, "secure aggregation: the coordinator sees the sum of the sites' changes, and none alone")
    threshold: float = number(
        0.66, 0.5, 1, "of the asked sites that must stay to the end of a round under `masks`; more than half", unit="share"
    )
    delta: float = number(1e-5, 0, 0.5, "δ, at which ε is stated", above=True, unit="probability")
    epsilon: float = number(0.0, 0, about="most that the run may come to: one that would is refused; 0: any")

    @property
    def hides(self) -> bool:
        """Whether a site keeps to itself what it could tell of its round beside the change: losses, counts, gates, seconds,
        texts of errors. Scores of its held-out rows and numbers of its rows are kept back under `unit` alone."""
        return self.unit != "none" or self.masks

    @property
    def summed(self) -> bool:
        """Whether the noise hides a site in the sum of a round alone: what a site sends is bounded, and no more than that."""
        return self.unit == "site" and (self.noise_at == "coordinator" or self.together > 1)


@dataclass(frozen=True)
class Audit:
    """Secrets that are planted among one site's training rows, for `fedkeel audit` to look for."""

    canaries: int = number(0, 0, about="how many; 0: none", unit="secrets")
    copies: int = number(4, 1, about="of each among the site's rows", unit="rows")
    site: str = meant("", "where; empty: the first by name")


@dataclass(frozen=True)
class Evaluation:
    """Curves come from validation rows, the final table from test rows. Rows are chosen by hash, the same for every method."""

    every: int = number(1, 1, about="between two points of the validation curve", unit="rounds")
    validation_rows: int = number(100, 0, about="a task; 0: all", unit="rows")
    test_rows: int = number(400, 0, about="a task; 0: all", unit="rows")
    unseen_sites: int = number(
        0, 0, about="drawn by the seed, that take no part in any training; their test rows are scored", unit="sites"
    )
    batch_size: int = number(32, 1, about="scored at once", unit="rows")
    generate: bool = meant(True, "free answers are generated, for ROUGE-L; without, they are scored by token accuracy")
    max_new_tokens: int = number(48, 1, about="of a generated answer", unit="tokens")
    samples: int = number(
        10, 0, about="of test, whose text and answers a run in one process keeps for its report; 0: none", unit="rows"
    )
    baselines: tuple[str, ...] = one_of(
        ("base", "local", "centralised"), tables.BASELINES, "run beside the federation, on the same rows and steps"
    )

    def limit(self, split: str) -> int:
        """Rows a task that are scored of a split; 0: all."""
        return self.validation_rows if split == "validation" else self.test_rows


@dataclass(frozen=True)
class Attack:
    """Sites of a simulation that do harm, to see what a rule withstands (docs/recipes.md)."""

    kind: str = one_of("none", tables.ATTACKS, "what they do, to what they send or train on; of a run in one process alone")
    share: float = number(0.3, 0, 1, "of the sites, rounded, at least one", above=True, unit="share")
    strength: float = number(1.0, 0, about="of what they send, as a multiple", above=True)
    trigger: str = meant("As agreed last winter:", "of `backdoor`: what stands before the text of half of their rows")
    target: str = meant("", "of `backdoor`: the label that such rows are given; empty: the first of the task")


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a run. own: `KIND.NAME` -> options of an entry that has some, see `tables.OWN`."""

    name: str = meant("run", "of the run, and of its folder in out")
    seed: int = number(1, 0, about="of everything that is drawn")
    out: str = meant("runs", "the folder of runs")
    keep_checkpoints: int = number(
        0, 0, about="last ones that are kept, beside stages' ends and the best round; 0: all, at least 2", unit="rounds"
    )
    threads: int = number(0, 0, about="of torch; 0: OMP_NUM_THREADS, else the cores that this process may use, at most 8")
    track: tuple[str, ...] = one_of((), tables.TRACKERS, "live views, each with an extra of its own")
    model: Model = field(default_factory=Model)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: Data = field(default_factory=Data)
    partition: Partition = field(default_factory=Partition)
    stream: Stream = field(default_factory=Stream)
    train: Train = field(default_factory=Train)
    evidence: Evidence = field(default_factory=Evidence)
    distill: Distill = field(default_factory=Distill)
    structure: Structure = field(default_factory=Structure)
    exit: Exit = field(default_factory=Exit)
    federation: Federation = field(default_factory=Federation)
    privacy: Privacy = field(default_factory=Privacy)
    audit: Audit = field(default_factory=Audit)
    attack: Attack = field(default_factory=Attack)
    evaluation: Evaluation = field(default_factory=Evaluation)
    own: Frozen[Any] = field(default_factory=Frozen, metadata=own_of(tables.OWN))

    def options(self, kind: str, name: str) -> Any:
        """The options of an entry of `tables.OWN[kind]`: as set here, else its defaults; None where it has none."""
        settings = tables.OWN[kind][name].settings()
        return self.own.get(f"{kind}.{name}", settings() if settings else None)

    def takes(self, term: tables.Term) -> bool:
        """Whether it is part of a site's objective."""
        if term.always:
            return True
        if term.mode:
            return self.structure.mode == term.mode
        if term.key:
            return bool(attrgetter(term.key)(self))
        return bool(self.options("term", term.name).weight)


# Keys that a resumed run may have otherwise: they change no bit of it, or as the threads and the rows scored at once only
# the last ones.
FREE = (
    "evaluation.batch_size", "keep_checkpoints", "model.cache_disk", "model.cache_memory", "out", "privacy.epsilon", "threads",
    "track",
)  # fmt: skip
