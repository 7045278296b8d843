"""A run's recipe: frozen dataclasses. What a value may be stands beside it; what values demand of each other in `checks`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedkeel import tables
from fedkeel.recipe.settings import ConfigError, Frozen, checked, named_by, number, one_of, own_of, some_of

LAYERS = re.compile(r"\d+(-\d+)?")


@dataclass(frozen=True)
class Model:
    """base: `keel-nano` (embedded), `smollm2` (fetched), a folder, a GGUF file or a hub id. kind: what it is loaded as; `auto`
    reads its config."""

    base: str = "keel-nano"
    revision: str = "main"
    kind: str = one_of("auto", ("auto", "causal", "seq2seq", "classifier"))
    # For an encoder: `label-text` scores a class by the similarity of the text to the label's own words (frozen);
    # `linear` trains a fresh classification head.
    head: str = one_of("label-text", ("label-text", "linear"))
    # `none`, one of several that the tokenizer has, or a Jinja file, whose text a run keeps; empty: the tokenizer's own
    chat_template: str = ""
    device: str = "cpu"
    precision: str = one_of("auto", ("auto", "fp32", "bf16"))
    # MiB of hidden states kept below the first block of lora.layers: in memory, then in an unnamed file. No bit depends on it
    cache_memory: int = number(1024, 0)
    cache_disk: int = number(8192, 0)


def _layers(spec: tuple[str, ...]) -> str:
    if spec in ((), ("upper-half",)) or all(LAYERS.fullmatch(part) for part in spec):
        return ""
    return "'upper-half' or a list of blocks from 0, such as [20, 21] or ['15-29'], belongs here"


@dataclass(frozen=True)
class LoraConfig:
    """targets: empty means attention and feed-forward maps of the architecture. alpha / rank is the scale."""

    rank: int = number(8, 1)
    alpha: float = number(16.0, 0, above=True)
    rslora: bool = False
    dropout: float = number(0.0, 0, 0.99)
    targets: tuple[str, ...] = ()
    # blocks that get an adapter: `upper-half`, or their numbers from 0, such as [20, 21] or ["15-29"]; empty: all
    layers: tuple[str, ...] = field(default=(), metadata={"check": _layers, "whole": True})
    # ranks of the sites, gone through in the order of their names, none over `rank`; empty: `rank` everywhere
    site_ranks: tuple[int, ...] = ()

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
    """source: `pydocs` (embedded), `files` (JSON Lines, CSV, TSV, Parquet under root), `hub` (a Hugging Face data set id or
    folder) or `rows` (given from Python)."""

    source: str = one_of("pydocs", tables.SOURCES)
    root: str = ""
    files: tuple[str, ...] = ()
    # JSON with, per task, `instruction` and `labels`; and `references` by row id
    tasks_file: str = ""
    # keep only these tasks; empty: all
    tasks: tuple[str, ...] = ()
    # leave out rows whose answer is one of these
    drop_labels: tuple[str, ...] = ()
    # what names the site of a row, for partition.scheme = "natural": the column, its file, or the folder that its file is in
    site_from: str = one_of("column", ("column", "file", "folder"))
    site_column: str = ""
    dataset: str = ""
    subset: str = ""
    instruction: str = ""
    # training rows kept a site, chosen by hash; 0: all
    rows_per_site: int = number(0, 0)
    # shares of rows without a `split` of their own
    validation_share: float = number(0.1, 0, 0.5)
    test_share: float = number(0.1, 0, 0.5)
    max_length: int = number(512, 8)
    # list the candidate answers in the prompt when there are at most this many
    list_labels: int = number(16, 0)


@dataclass(frozen=True)
class Partition:
    """How rows become sites. `natural`: by the source's own key."""

    scheme: str = one_of("natural", tables.PARTITIONS)
    sites: int = number(4, 1)
    alpha: float = number(0.3, 0, 1e6, above=True)
    # what a Dirichlet draw is made for
    over: str = one_of("labels", ("labels", "tasks"))


@dataclass(frozen=True)
class Train:
    """One site's round. Exactly one of local_steps and local_epochs is above 0. Learning rate and warm-up span a stage."""

    lr: float = number(3e-3, 0, above=True)
    local_steps: int = number(10, 0)
    local_epochs: int = number(0, 0)
    batch_size: int = number(16, 1)  # rows an optimiser step
    micro_batch_size: int = number(0, 0)  # rows at once; 0: batch_size
    warmup: float = number(0.05, 0, 1)  # share of the steps
    final_lr: float = number(0.1, 0, 1)  # share of lr at the end; linear in between
    weight_decay: float = number(0.0, 0)
    clip_norm: float = number(1.0, 0, above=True)
    proximal: float = number(0.0, 0)  # FedProx: this times half the squared distance from the global adapter
    sam: float = number(0.0, 0)  # FedSAM: radius of the ascent before each step; costs a second pass


@dataclass(frozen=True)
class Stream:
    """A task stream: each stage is a list of tasks, or of label groups, joined by `+`, and lasts federation.rounds rounds.

    Empty: one stage with everything.
    """

    stages: tuple[str, ...] = ()
    # an order of tasks that data.tasks_file names under `task_orders` or `streams`; load_recipe writes it out as `stages`
    order: str = ""
    tasks_a_stage: int = number(1, 1)  # of `order`
    # training rows of each earlier stage that a site keeps and trains on beside new ones, chosen by hash; 0: it keeps no row
    replay: int = number(0, 0)
    # what is served after a stage: this share of what was served after the stage before, the rest as the stage left it
    average: float = number(0.0, 0, 0.99)


@dataclass(frozen=True)
class Evidence:
    """What a site's loss may ask for by the rows that it holds (docs/method.md)."""

    task: str = one_of("plain", tables.CALIBRATIONS)  # cross-entropy over which labels, or shifted by their shares
    kappa: float = number(1.0, 0)  # of `prior`: how far
    epsilon: float = number(0.1, 0, above=True)  # of `prior`: added to each label's rows


@dataclass(frozen=True)
class Distill:
    """Guidance by the global model as it stood when the round began (docs/method.md). weight = 0: none of it runs."""

    weight: float = number(0.0, 0)
    temperature: float = number(1.0, 0, above=True)
    # what the teacher is trusted for, position by position: on the gold answer, and on the rest of its distribution
    gold: str = one_of("sigmoid", ("sigmoid", "hard", "constant", "off"))
    kappa: float = number(1.0, 0, above=True)  # nats; how soft the gate `sigmoid` is
    rest: str = one_of("kl", ("kl", "entropy", "constant", "off"))
    beta: float = number(1.0, 0)  # of `entropy` and `constant`
    task_trust: bool = True  # others' evidence on a task against mine
    site_trust: bool = True  # the more skewed the site, the more it listens
    trust_by: str = one_of("task", ("task", "label"))  # what evidence and skew are counted by; labels then travel as counts
    # hidden states: linear CKA or mean cosine at a quarter, half, three quarters and the top of the blocks
    align: str = one_of("off", ("off", "cka", "cosine"))
    align_weight: float = number(0.1, 0)
    layer_trust: bool = True  # less where the sites disagreed in the last round
    memory: float = number(0.0, 0, 1)  # share of the teacher that is what was served after the stage before
    ramp: float = number(0.1, 0, 1)  # share of the run over which the weight rises from 0
    every: int = number(1, 1)  # guidance in every n-th step, at n times the weight: the teacher then costs an n-th
    cache: int = number(64, 0)  # entries kept of a cached teacher output where a round meets rows again; 0: no cache


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

    mode: str = one_of("implicit", _Modes())
    weight: float = number(1.0, 0)  # of the consistency term of `self` and `rdrop`
    every: int = number(4, 1)  # `self`: every n-th step
    amounts: Frozen[float] = field(default_factory=Frozen, metadata=named_by(tables.STRUCTURES, _amount))
    hold: bool = False  # `branch` draws once a round: what is left out is neither trained nor sent
    ramp: float = number(0.2, 0, 1)  # share of the run over which strength rises from 0
    anneal: float = number(0.1, 0, 1)  # share of the run at its end over which it falls to 0

    def amount(self, name: str) -> float:
        """Of a structure; 0 where it is not injected."""
        return self.amounts.get(name, 0.0)


def _codec(spec: str) -> str:
    try:
        tables.codec_parts(spec)
    except ValueError:
        return tables.codec_grammar()
    return ""


@dataclass(frozen=True)
class Federation:
    """The round loop. quorum: share of the sampled sites that must answer well, else the run stops with their errors."""

    rounds: int = number(10, 1)
    # points of the validation curve (evaluation.every) in a row that are no better than the best one, after which a stage
    # ends; 0: it lasts all its rounds
    patience: int = number(0, 0)
    keep: str = one_of("last", ("last", "best"))  # what a stage ends in: its last round, or its best by validation rows
    sites_per_round: int = number(0, 0)  # 0: all
    rule: str = one_of("mean", tables.RULES)  # of aggregation, see docs/exchange.md
    hostile: int = number(0, 0)  # sites that may lie: what `trimmed` and `krum` are to withstand
    weighting: str = one_of("positions", tables.WEIGHTINGS)
    optimiser: str = one_of("average", tables.OPTIMISERS)  # of the server, around the rule
    server_lr: float = number(1.0, 0, above=True)
    codec_up: str = checked("fp32", _codec)
    codec_down: str = checked("fp32", _codec)
    # a site keeps what a lossy codec_up left out and adds it to its next update, where the rule keeps the factors' basis
    error_feedback: bool = True
    quorum: float = number(1.0, 0, 1, above=True)
    deadline: float = number(3600.0, 0, above=True)  # seconds a round
    max_update_norm: float = number(math.inf, 0, above=True, infinite=True)  # of a site's change; beyond: refused


@dataclass(frozen=True)
class Evaluation:
    """Curves come from validation rows, the final table from test rows. Rows are chosen by hash, the same for every method."""

    every: int = number(1, 1)  # rounds between curve points
    validation_rows: int = number(100, 0)  # a task; 0: all
    test_rows: int = number(400, 0)  # a task; 0: all
    unseen_sites: int = number(0, 0)  # sites, drawn by the seed, that take no part in any training; their test rows are scored
    batch_size: int = number(32, 1)
    generate: bool = True  # free answers, for ROUGE-L; without, by their token accuracy
    max_new_tokens: int = number(48, 1)
    samples: int = number(10, 0)  # test rows whose text and answers a run in one process keeps for its report; 0: none
    baselines: tuple[str, ...] = some_of(("base", "local", "centralised"), tables.BASELINES)


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a run. own: `KIND.NAME` -> options of an entry that has some, see `tables.OWN`."""

    name: str = "run"
    seed: int = number(1, 0)
    out: str = "runs"
    threads: int = number(0, 0)  # of torch; 0: OMP_NUM_THREADS, else the cores this process may use, at most 8
    track: tuple[str, ...] = some_of((), tables.TRACKERS)  # live views, each with an extra of its own
    model: Model = field(default_factory=Model)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: Data = field(default_factory=Data)
    partition: Partition = field(default_factory=Partition)
    stream: Stream = field(default_factory=Stream)
    train: Train = field(default_factory=Train)
    evidence: Evidence = field(default_factory=Evidence)
    distill: Distill = field(default_factory=Distill)
    structure: Structure = field(default_factory=Structure)
    federation: Federation = field(default_factory=Federation)
    evaluation: Evaluation = field(default_factory=Evaluation)
    own: Frozen[Any] = field(default_factory=Frozen, metadata=own_of(tables.OWN))

    def options(self, kind: str, name: str) -> Any:
        """The options of an entry of `tables.OWN[kind]`: as set here, else its defaults; None where it has none."""
        settings = tables.OWN[kind][name].settings()
        return self.own.get(f"{kind}.{name}", settings() if settings else None)
