"""A run's recipe: frozen dataclasses from TOML and `key=value`, checked before anything heavy is imported.

An unknown key is an error that names the nearest known one; a value of the wrong type or out of its range is an error that
names the key, the value and what would be right.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from fedkeel.recipe.settings import _number, _one_of


@dataclass(frozen=True)
class Model:
    """base: `keel-nano` (embedded), a local folder or a hub id. kind: what it is loaded as; `auto` reads its config."""

    base: str = "keel-nano"
    revision: str = "main"
    kind: str = _one_of("auto", "auto", "causal", "seq2seq", "classifier")
    # For an encoder: `label-text` scores a class by the similarity of the text to the label's own words (frozen);
    # `linear` trains a fresh classification head.
    head: str = _one_of("label-text", "label-text", "linear")
    device: str = "cpu"
    precision: str = _one_of("auto", "auto", "fp32", "bf16")


@dataclass(frozen=True)
class LoraConfig:
    """targets: empty means attention and feed-forward maps of the architecture. alpha / rank is the scale."""

    rank: int = _number(8, 1)
    alpha: float = _number(16.0, 0, above=True)
    rslora: bool = False
    dropout: float = _number(0.0, 0, 0.99)
    targets: tuple[str, ...] = ()
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

    def scale(self, rank: int) -> float:
        """What the product of the factors of an adapter of `rank` is multiplied by: α/r, or α/√r under rsLoRA."""
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class Data:
    """source: `pydocs` (embedded), `jsonl` (files under root) or `hub` (a Hugging Face data set id or folder)."""

    source: str = _one_of("pydocs", "pydocs", "jsonl", "hub")
    root: str = ""
    files: tuple[str, ...] = ()
    # JSON with, per task, `instruction` and `labels`; and `references` by row id
    tasks_file: str = ""
    # keep only these tasks; empty: all
    tasks: tuple[str, ...] = ()
    # leave out rows whose answer is one of these
    drop_labels: tuple[str, ...] = ()
    # column that names the site of a row, for partition.scheme = "natural"
    site_column: str = ""
    dataset: str = ""
    subset: str = ""
    instruction: str = ""
    # training rows kept a site, chosen by hash; 0: all
    rows_per_site: int = _number(0, 0)
    # shares of rows without a `split` of their own
    validation_share: float = _number(0.1, 0, 0.5)
    test_share: float = _number(0.1, 0, 0.5)
    max_length: int = _number(512, 8)
    # list the candidate answers in the prompt when there are at most this many
    list_labels: int = _number(16, 0)


@dataclass(frozen=True)
class Partition:
    """How rows become sites. `natural`: by the source's own key."""

    scheme: str = _one_of("natural", "natural", "iid", "dirichlet", "by-task", "quantity")
    sites: int = _number(4, 1)
    alpha: float = _number(0.3, 0, 1e6, above=True)
    # what a Dirichlet draw is made for
    over: str = _one_of("labels", "labels", "tasks")


@dataclass(frozen=True)
class Train:
    """One site's round. Exactly one of local_steps and local_epochs is above 0. Learning rate and warm-up span a stage."""

    lr: float = _number(3e-3, 0, above=True)
    local_steps: int = _number(10, 0)
    local_epochs: int = _number(0, 0)
    batch_size: int = _number(16, 1)  # rows an optimiser step
    micro_batch_size: int = _number(0, 0)  # rows at once; 0: batch_size
    warmup: float = _number(0.05, 0, 1)  # share of the steps
    final_lr: float = _number(0.1, 0, 1)  # share of lr at the end; linear in between
    weight_decay: float = _number(0.0, 0)
    clip_norm: float = _number(1.0, 0, above=True)
    proximal: float = _number(0.0, 0)  # FedProx: this times half the squared distance from the global adapter
    sam: float = _number(0.0, 0)  # FedSAM: radius of the ascent before each step; costs a second pass


@dataclass(frozen=True)
class Stream:
    """A task stream: each stage is a list of tasks, or of label groups, joined by `+`, and lasts federation.rounds rounds.

    Empty: one stage with everything.
    """

    stages: tuple[str, ...] = ()
    # an order of tasks that data.tasks_file names under `task_orders` or `streams`; load_recipe writes it out as `stages`
    order: str = ""
    tasks_a_stage: int = _number(1, 1)  # of `order`
    # training rows of each earlier stage that a site keeps and trains on beside new ones, chosen by hash; 0: it keeps no row
    replay: int = _number(0, 0)
    # what is served after a stage: this share of what was served after the stage before, the rest as the stage left it
    average: float = _number(0.0, 0, 0.99)


@dataclass(frozen=True)
class Distill:
    """Guidance by the global model as it stood when the round began (docs/method.md). weight = 0: none of it runs."""

    weight: float = _number(0.0, 0)
    temperature: float = _number(1.0, 0, above=True)
    # what the teacher is trusted for, position by position: on the gold answer, and on the rest of its distribution
    gold: str = _one_of("sigmoid", "sigmoid", "hard", "constant", "off")
    kappa: float = _number(1.0, 0, above=True)  # nats; how soft the gate `sigmoid` is
    rest: str = _one_of("kl", "kl", "entropy", "constant", "off")
    beta: float = _number(1.0, 0)  # of `entropy` and `constant`
    task_trust: bool = True  # others' evidence on a task against mine
    site_trust: bool = True  # the more skewed the site, the more it listens
    trust_by: str = _one_of("task", "task", "label")  # what evidence and skew are counted by; labels then travel as counts
    # hidden states: linear CKA or mean cosine at a quarter, half, three quarters and the top of the blocks
    align: str = _one_of("off", "off", "cka", "cosine")
    align_weight: float = _number(0.1, 0)
    layer_trust: bool = True  # less where the sites disagreed in the last round
    memory: float = _number(0.0, 0, 1)  # share of the teacher that is what was served after the stage before
    ramp: float = _number(0.1, 0, 1)  # share of the run over which the weight rises from 0
    every: int = _number(1, 1)  # guidance in every n-th step, at n times the weight: the teacher then costs an n-th
    cache: int = _number(64, 0)  # entries kept of a cached teacher output where a round meets rows again; 0: no cache


@dataclass(frozen=True)
class Structure:
    """Modules injected while training (docs/method.md): drop probabilities, standard deviations, or a norm; 0: not injected."""

    mode: str = _one_of("implicit", "implicit", "self", "rdrop", "anchored")
    weight: float = _number(1.0, 0)  # of the consistency term of `self` and `rdrop`
    every: int = _number(4, 1)  # `self`: every n-th step
    heads: float = _number(0.0, 0, 0.9)
    channels: float = _number(0.0, 0, 0.9)
    branch: float = _number(0.0, 0, 0.9)
    hold: bool = False  # `branch` draws once a round: what is left out is neither trained nor sent
    layers: float = _number(0.0, 0, 0.9)
    lodrop: float = _number(0.0, 0, 0.9)
    rank: float = _number(0.0, 0)
    weights: float = _number(0.0, 0)
    adversary: float = _number(0.0, 0)  # norm of the adversary's change of the weights
    ramp: float = _number(0.2, 0, 1)  # share of the run over which strength rises from 0
    anneal: float = _number(0.1, 0, 1)  # share of the run at its end over which it falls to 0


STRUCTURES = ("heads", "channels", "branch", "layers", "lodrop", "rank", "weights", "adversary")


RULES = (
    "mean", "freeze_a", "alternate", "svd", "stack", "residual", "share_a", "share_b", "median", "trimmed", "krum",
)  # fmt: skip
SHIFTING = ("stack", "residual")  # they move the frozen maps
PERSONAL = ("share_a", "share_b")  # one factor stays at the site
MIXED = ("svd", "stack", "median", "trimmed", "krum")  # sites may differ in rank and scale
STEADY = ("mean", "freeze_a", "residual", "share_a", "share_b", "krum")  # a server optimiser can wrap them
CASTS = ("fp32", "bf16", "fp16")
QUANTIZERS = ("int8", "int4")


@dataclass(frozen=True)
class Federation:
    """The round loop. quorum: share of the sampled sites that must answer well, else the run stops with their errors."""

    rounds: int = _number(10, 1)
    sites_per_round: int = _number(0, 0)  # 0: all
    rule: str = _one_of("mean", *RULES)  # of aggregation, see docs/exchange.md
    hostile: int = _number(0, 0)  # sites that may lie: what `trimmed` and `krum` are to withstand
    weighting: str = _one_of("positions", "positions", "sqrt_positions", "uniform")
    optimiser: str = _one_of("average", "average", "momentum", "adam")  # of the server, around the rule
    server_lr: float = _number(1.0, 0, above=True)
    # fp32, bf16, fp16, int8, int4, topk=SHARE, or topk=SHARE+one of the others
    codec_up: str = field(default="fp32", metadata={"codec": True})
    codec_down: str = field(default="fp32", metadata={"codec": True})
    # a site keeps what a lossy codec_up left out and adds it to its next update, where the rule keeps the factors' basis
    error_feedback: bool = True
    quorum: float = _number(1.0, 0, 1, above=True)
    deadline: float = _number(3600.0, 0, above=True)  # seconds a round
    max_update_norm: float = _number(float("inf"), 0, above=True)  # of a site's change; beyond: refused


@dataclass(frozen=True)
class Evaluation:
    """Curves come from validation rows, the final table from test rows. Rows are chosen by hash, the same for every method."""

    every: int = _number(1, 1)  # rounds between curve points
    validation_rows: int = _number(100, 0)  # a task; 0: all
    test_rows: int = _number(400, 0)  # a task; 0: all
    unseen_sites: int = _number(0, 0)  # sites, drawn by the seed, that take no part in any training; their test rows are scored
    batch_size: int = _number(32, 1)
    max_new_tokens: int = _number(48, 1)
    baselines: tuple[str, ...] = ("base", "local", "centralised")


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a run."""

    name: str = "run"
    seed: int = _number(1, 0)
    out: str = "runs"
    threads: int = _number(0, 0)  # of torch; 0: the cores this process may use, at most 2
    # beside TensorBoard's event files, which every run writes: `wandb`, `mlflow`
    track: tuple[str, ...] = field(default=(), metadata={"choices": ("wandb", "mlflow")})
    model: Model = field(default_factory=Model)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: Data = field(default_factory=Data)
    partition: Partition = field(default_factory=Partition)
    stream: Stream = field(default_factory=Stream)
    train: Train = field(default_factory=Train)
    distill: Distill = field(default_factory=Distill)
    structure: Structure = field(default_factory=Structure)
    federation: Federation = field(default_factory=Federation)
    evaluation: Evaluation = field(default_factory=Evaluation)


BASELINES = ("base", "local", "centralised")
