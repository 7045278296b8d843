"""A run's recipe: frozen dataclasses from TOML and `key=value`, checked before anything heavy is imported.

An unknown key is an error that names the nearest known one; a value of the wrong type or out of its range is an error that
names the key, the value and what would be right.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedkeel.types import FedKeelError


class ConfigError(FedKeelError):
    """A recipe that cannot be run as written."""


def _one_of(default: str, *choices: str) -> Any:
    return field(default=default, metadata={"choices": choices})


def _number(default: float, low: float, high: float = float("inf"), *, above: bool = False) -> Any:
    """A number in [low, high], or in (low, high] with `above`."""
    return field(default=default, metadata={"low": low, "high": high, "above": above})


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


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fields(cls: Any) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    return [(f, hints[f.name]) for f in dataclasses.fields(cls)]


def known_keys(cls: Any = Recipe, prefix: str = "") -> dict[str, Any]:
    """Every settable key, dotted, and the type of its value."""
    keys: dict[str, Any] = {}
    for f, hint in _fields(cls):
        keys |= known_keys(hint, f"{prefix}{f.name}.") if dataclasses.is_dataclass(hint) else {prefix + f.name: hint}
    return keys


def _check_choice(key: str, value: Any, choices: Sequence[str] | None) -> None:
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{key} = {value!r}: one of {', '.join(choices)} belongs here{hint}")


def _check(key: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    """`value` as the type of its field, or a ConfigError."""
    if hint == tuple[int, ...]:
        if isinstance(value, str):
            value = [int(v) if v.isdecimal() else v for v in value.split(",") if v]
        if isinstance(value, int) and not isinstance(value, bool):
            value = [value]
        if not isinstance(value, list | tuple) or not all(type(v) is int and v >= 1 for v in value):
            raise ConfigError(f"{key} = {value!r}: a list of whole numbers from 1 belongs here")
        return tuple(value)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str):
            value = [v for v in value.split(",") if v]
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise ConfigError(f"{key} = {value!r}: a list of strings belongs here")
        for one in value:
            _check_choice(key, one, metadata.get("choices"))
        return tuple(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:
        raise ConfigError(f"{key} = {value!r}: {hint.__name__} belongs here, not {type(value).__name__}")
    _check_choice(key, value, metadata.get("choices"))
    if metadata.get("codec"):
        _check_codec(key, value)
    if "low" in metadata:
        low, high, above = metadata["low"], metadata["high"], metadata["above"]
        if not (low < value if above else low <= value) or value > high:
            bound = f"above {low}" if above else f"at least {low}"
            raise ConfigError(f"{key} = {value!r}: must be {bound}" + (f" and at most {high}" if high < float("inf") else ""))
    return value


def _check_codec(key: str, spec: str) -> None:
    """Raise ConfigError unless `codecs.make_codec` would take `spec`; here too, as that one needs torch."""
    first, plus, second = spec.partition("+")
    fine = not plus and first in (*CASTS, *QUANTIZERS)
    if first.startswith("topk=") and (not plus or second in (*CASTS, *QUANTIZERS)):
        try:
            fine = 0.0 < float(first.removeprefix("topk=")) < 1.0
        except ValueError:
            fine = False
    if not fine:
        known = ", ".join((*CASTS, *QUANTIZERS))
        raise ConfigError(f"{key} = {spec!r}: one of {known}, or topk=SHARE with 0 < SHARE < 1, as in topk=0.1+int8")


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    fields = {f.name: (f, hint) for f, hint in _fields(cls)}
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            key = prefix + name
            # a slip within this table comes first
            here = difflib.get_close_matches(name, fields, 1, cutoff=0.75) if prefix else []
            same = [k for k in known_keys() if k.rpartition(".")[2] == name]
            near = difflib.get_close_matches(key, known_keys(), 1, cutoff=0.4)
            best = prefix + here[0] if here else next(iter([*same, *near]), None)
            raise ConfigError(f"unknown key {key!r}" + (f"; did you mean {best!r}?" if best else ""))
        f, hint = fields[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{prefix}{name} is a table of keys, not {value!r}; write {prefix}{name}.KEY=VALUE")
            arguments[name] = _build(typing.cast(type, hint), value, f"{prefix}{name}.")
        else:
            arguments[name] = _check(prefix + name, value, hint, f.metadata)
    return cls(**arguments)


def _parse_value(text: str) -> Any:
    """A TOML value, or the text itself where it is not one (a bare word, a path)."""
    try:
        parsed = tomllib.loads(f"v = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["v"] if len(parsed) == 1 else text


def _assign(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{override!r} is neither a recipe file nor key=value")
    *parents, leaf = key.strip().split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{key.strip()}: {parent!r} is a value, not a table")
    value = _parse_value(text.strip())
    # `name=7` or `data.root=2024`: a field of text takes the text as it was written
    is_text = known_keys().get(key.strip()) is str
    node[leaf] = text.strip() if is_text and not isinstance(value, str) else value


ORDERS = ("task_orders", "streams")  # where data.tasks_file keeps orders of tasks: name -> tasks


def _orders(path: Path) -> dict[str, list[str]]:
    """The orders of tasks that `path` names. Raises ConfigError naming the file, and the order where one is malformed."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} (data.tasks_file, for stream.order) cannot be read: {error}") from error
    found: dict[str, list[str]] = {}
    for key in ORDERS:
        named = about.get(key, {}) if isinstance(about, dict) else {}
        if not isinstance(named, dict):
            raise ConfigError(f"{path}: under {key!r} belongs an object that holds, by name, a list of tasks")
        for name, tasks in named.items():
            if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
                raise ConfigError(f"{path}: {key}.{name} is not a list of tasks")
            if name in found:
                raise ConfigError(f"{path} names the order {name!r} twice, under each of {' and '.join(ORDERS)}")
            found[name] = tasks
    return found


def _with_order(recipe: Recipe) -> Recipe:
    """The recipe with stream.order written out as stream.stages, as it is again when such a recipe is read back.

    Raises ConfigError if there is no such order, nothing of it is among data.tasks, or stream.stages says something else.
    """
    stream, data = recipe.stream, recipe.data
    if not stream.order:
        if stream.tasks_a_stage != 1:
            raise ConfigError(
                f"stream.tasks_a_stage = {stream.tasks_a_stage} groups the tasks of stream.order, which is not set"
            )
        return recipe
    if not data.tasks_file:
        raise ConfigError(f"stream.order = {stream.order!r} is looked up in data.tasks_file, which is not set")
    path = Path(data.root) / data.tasks_file
    orders = _orders(path)
    if stream.order not in orders:
        near = difflib.get_close_matches(stream.order, orders, 1)
        known = f"known: {', '.join(orders)}" if orders else f"it has none, under any of {', '.join(ORDERS)}"
        raise ConfigError(
            f"stream.order = {stream.order!r} is not in {path}; " + (f"did you mean {near[0]!r}? " if near else "") + known
        )
    tasks = [task for task in orders[stream.order] if not data.tasks or task in data.tasks]
    if not tasks:
        raise ConfigError(f"stream.order = {stream.order!r} of {path} has none of data.tasks = {list(data.tasks)}")
    size = stream.tasks_a_stage
    stages = tuple(" + ".join(tasks[at : at + size]) for at in range(0, len(tasks), size))
    if stream.stages and stream.stages != stages:
        raise ConfigError(
            f"stream.order = {stream.order!r}, stream.tasks_a_stage = {size} means stages {list(stages)}, and stream.stages is "
            f"{list(stream.stages)}: set one of stream.order and stream.stages, and the other to nothing"
        )
    return dataclasses.replace(recipe, stream=dataclasses.replace(stream, stages=stages))


def _check_data(recipe: Recipe) -> None:
    """Raise ConfigError unless the files or the data set are named, and the files are there."""
    data = recipe.data
    if data.source == "jsonl":
        if not data.root:
            raise ConfigError("data.root is not set: name the folder that holds the data, as in data.root=/path/to/data")
        if not data.files:
            raise ConfigError("data.files is empty: list the JSON Lines files, relative to data.root")
        for name in (*data.files, *([data.tasks_file] if data.tasks_file else [])):
            if not (Path(data.root) / name).is_file():
                raise ConfigError(f"data file not found: {Path(data.root) / name} (data.root = {data.root!r})")
    if data.source == "hub" and not data.dataset:
        raise ConfigError("data.dataset is not set: name a Hugging Face data set id or a local folder")


def _cross_check(recipe: Recipe) -> None:
    train = recipe.train
    if (train.local_steps > 0) == (train.local_epochs > 0):
        raise ConfigError(
            f"train.local_steps = {train.local_steps} and train.local_epochs = {train.local_epochs}: set exactly one above 0, "
            f"and the other to 0"
        )
    if train.micro_batch_size > train.batch_size:
        raise ConfigError(f"train.micro_batch_size = {train.micro_batch_size} is over train.batch_size = {train.batch_size}")
    distill, structure = recipe.distill, recipe.structure
    if structure.mode == "anchored" and not distill.weight:
        raise ConfigError(
            "structure.mode = 'anchored' takes its consistency from the distillation term: set distill.weight above 0, or "
            "structure.mode = 'implicit'"
        )
    if structure.mode == "self" and not any(getattr(structure, name) for name in STRUCTURES):
        raise ConfigError(
            "structure.mode = 'self' compares a disturbed pass with a clean one, and no structure is asked for: set one above 0"
        )
    if train.sam and structure.adversary:
        raise ConfigError(
            "train.sam and structure.adversary both ascend before a step, and the adversary would mix the gradients of two "
            "points: set one of them to 0"
        )
    if distill.weight and distill.align == "cka" and 0 < train.micro_batch_size < train.batch_size:
        raise ConfigError(
            "distill.align = 'cka' compares the positions of a whole batch, so train.micro_batch_size would change what is "
            "minimised: set it to 0, or distill.align = 'cosine'"
        )
    _check_stream(recipe)
    _check_exchange(recipe)
    for baseline in recipe.evaluation.baselines:
        if baseline not in BASELINES:
            raise ConfigError(f"evaluation.baselines: {baseline!r} is not one of {', '.join(BASELINES)}")
    if not recipe.name or recipe.name != Path(recipe.name).name or recipe.name.startswith("."):
        raise ConfigError(f"name = {recipe.name!r}: a plain folder name belongs here")


def _check_stream(recipe: Recipe) -> None:
    if recipe.stream.replay and not recipe.stream.stages:
        raise ConfigError(
            f"stream.replay = {recipe.stream.replay} keeps rows of earlier stages, and there is one stage: set "
            f"stream.stages or stream.order, or stream.replay = 0"
        )


def _check_exchange(recipe: Recipe) -> None:
    """What a rule cannot do is an error before the first round, not in the seventh."""
    federation, stream, lora, structure = recipe.federation, recipe.stream, recipe.lora, recipe.structure
    rule = federation.rule
    if rule in SHIFTING and (stream.average or (recipe.distill.weight and recipe.distill.memory)):
        raise ConfigError(
            f"federation.rule = {rule!r} moves the base itself, so what was served before is no adapter of today's base: set "
            f"stream.average = 0 and distill.memory = 0, or a rule such as 'mean'"
        )
    if stream.average and not (rule in STEADY and lora.one_rank):
        raise ConfigError(
            f"stream.average = {stream.average:g} averages factors of several rounds, and rule {rule!r} finds them anew each "
            f"round, in another basis: set it to 0, or use rule 'mean', 'freeze_a' or 'krum' with one rank for all sites"
        )
    if (federation.optimiser != "average" or federation.server_lr != 1.0) and not (rule in STEADY and lora.one_rank):
        raise ConfigError(
            f"federation.optimiser = {federation.optimiser!r}, server_lr = {federation.server_lr:g}: rule {rule!r} finds its "
            f"factors anew each round, so their difference is no step to carry on; set 'average' and 1, or one of the rules "
            f"{', '.join(STEADY)}"
        )
    if rule in PERSONAL and (stream.stages or recipe.distill.weight):
        raise ConfigError(
            f"federation.rule = {rule!r} leaves a factor at each site, so there is no one global model to learn from or to "
            f"follow over stages: set distill.weight = 0 and no stream, or another rule"
        )
    if lora.site_ranks:
        if max(lora.site_ranks) > lora.rank:
            raise ConfigError(f"lora.site_ranks = {list(lora.site_ranks)}: none may be over lora.rank = {lora.rank}")
        if rule not in MIXED and not lora.one_rank:
            raise ConfigError(
                f"lora.site_ranks = {list(lora.site_ranks)}: federation.rule = {rule!r} averages factors, which must be of one "
                f"rank and scale; rules that take several: {', '.join(MIXED)}"
            )
    if federation.hostile and rule not in ("trimmed", "krum"):
        raise ConfigError(
            f"federation.hostile = {federation.hostile} says nothing to rule {rule!r}; only to 'trimmed' and 'krum'"
        )
    if structure.hold and not structure.branch:
        raise ConfigError("structure.hold = true holds what structure.branch draws: set structure.branch above 0")
    if structure.hold and rule in (*PERSONAL, *SHIFTING, "median", "trimmed", "krum"):
        raise ConfigError(f"structure.hold = true leaves modules out of a round; federation.rule = {rule!r} needs them all")
    others = any(getattr(structure, name) for name in STRUCTURES if name != "branch")
    if structure.hold and structure.mode in ("self", "rdrop") and not others:
        raise ConfigError(
            f"structure.mode = {structure.mode!r} compares two draws, and what is held for a round is drawn once: set another "
            f"structure above 0, or structure.mode = 'implicit'"
        )


def check_one_model(recipe: Recipe, adapters: Path) -> None:
    """Raise ConfigError where a federation ends in no one model that could be loaded. adapters: the folder that they are in."""
    if recipe.federation.rule in PERSONAL:
        raise ConfigError(
            f"federation.rule = {recipe.federation.rule!r} leaves one adapter a site, in {adapters}/SITE; there is no one "
            f"model to load"
        )


def load_recipe(path: Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in `path` (TOML; None: all defaults) with `key=value` overrides applied on top.

    Raises ConfigError on a missing or malformed file, an unknown key, or a value that cannot be right.
    """
    return make_recipe(read_tree(path, overrides))


def read_tree(path: Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The keys of a recipe as its file and `key=value` overrides give them, unchecked. Raises ConfigError on a file that is
    missing or malformed."""
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], 1)
            raise ConfigError(f"recipe not found: {path}" + (f"; did you mean {near[0]}?" if near else "")) from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from error
    for override in overrides:
        _assign(tree, override)
    return tree


def make_recipe(tree: Mapping[str, Any], data: bool = True) -> Recipe:
    """The recipe that a mapping of keys, as TOML is read, means. Raises ConfigError on what cannot be right.

    data: whether the files of data must be there; a coordinator holds none.
    """
    recipe: Recipe = _build(Recipe, tree, "")
    if data:
        _check_data(recipe)
        recipe = _with_order(recipe)
    _cross_check(recipe)
    return recipe


def toml_value(value: Any) -> str:
    """A value of a recipe as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):  # a JSON string is a TOML string, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    return repr(value)


def to_toml(recipe: Recipe) -> str:
    """The whole recipe as TOML, every default written out; `load_recipe` reads it back to an equal Recipe."""
    lines, tables = [], []
    for f in dataclasses.fields(recipe):
        value = getattr(recipe, f.name)
        if dataclasses.is_dataclass(value):
            inner = [f"{g.name} = {toml_value(getattr(value, g.name))}" for g in dataclasses.fields(value)]
            tables.append("\n".join([f"[{f.name}]", *inner]))
        else:
            lines.append(f"{f.name} = {toml_value(value)}")
    return "\n\n".join(["\n".join(lines), *tables]) + "\n"
