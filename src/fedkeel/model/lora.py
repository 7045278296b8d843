"""One frozen base model with a LoRA adapter: run, read and write.

Logits are computed at supervised positions only: a hook in front of the output projection gathers the hidden states of
those positions, so a (batch, time, V) tensor never exists, whatever the architecture does after the projection.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.pytorch_utils import Conv1D

from fedkeel import tables
from fedkeel.data.batches import Batch
from fedkeel.model.attention import train_in_float32
from fedkeel.model.bases import ModelError
from fedkeel.model.depth import states_of, whole, without
from fedkeel.model.features import Beside, ByHead, Features
from fedkeel.model.half import hold_in_bf16
from fedkeel.model.load import Base, device_of, heads_of, kind_of, load_config, load_tokenizer, uses_bf16
from fedkeel.model.lower import Lower, States
from fedkeel.model.places import Places, find_places
from fedkeel.model.quiet import quiet
from fedkeel.model.targets import targets_in, without_branch
from fedkeel.recipe.schema import LoraConfig
from fedkeel.recipe.schema import Model as ModelConfig
from fedkeel.rng import seed_torch
from fedkeel.types import Adapter, Forward, Head, Lora, Shift

PREFIX = "base_model.model."  # before a path in the base model, in PEFT's names


@dataclass(frozen=True)
class LabelText:
    """Class scores of an encoder: 20 · cos(mean-pooled text, frozen mean-pooled label text), as CLIP and
    sentence-transformers scale a cosine into logits."""

    embeddings: Tensor  # (V, d), unit rows
    scale: float = 20.0

    def __call__(self, pooled: Tensor) -> Tensor:
        return self.scale * nn.functional.normalize(pooled.float(), dim=-1) @ self.embeddings.T


def _pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of a row's hidden states over its real tokens, (rows, d)."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def _folded(module: Any, x: Tensor) -> Tensor:
    """(W0 + scale · B A) x + bias: the map of a LoRA layer with its branch folded in for this call alone.

    The sum costs r multiplications a weight, whatever the number of tokens, and one matrix of the map's size at a time; the
    branch costs four passes over activations.
    """
    base = module.get_base_layer()
    a, b, scale = module.lora_A["default"].weight, module.lora_B["default"].weight, module.scaling["default"]
    if isinstance(base, Conv1D):  # holds its weight as (d_in, d_out)
        return nn.functional.linear(x, torch.addmm(base.weight, a.T, b.T, alpha=scale).T, base.bias)
    return nn.functional.linear(x, torch.addmm(base.weight, b, a, alpha=scale), base.bias)


def _with_lora(net: Any, base: Base, lora: LoraConfig) -> Any:
    """`net`, the modules of `base`, with fresh branches by torch's generator. Raises ModelError if LoRA has no place in it."""
    kind = {
        "causal": peft.TaskType.CAUSAL_LM,
        "seq2seq": peft.TaskType.SEQ_2_SEQ_LM,
        "classifier": peft.TaskType.SEQ_CLS if base.head else peft.TaskType.FEATURE_EXTRACTION,
    }[base.kind]
    maps = [m.weight for m in net.modules() if isinstance(getattr(m, "weight", None), Tensor)]
    widest = max(min(weight.shape) for weight in maps if weight.dim() == 2)
    if lora.rank > widest:
        raise ModelError(f"lora.rank = {lora.rank}: no map of {base.config.base!r} has a rank above {widest}")
    targets, layers = targets_in(net, base, lora)
    heads = heads_of(net) if base.head else []
    config = peft.LoraConfig(
        task_type=kind,
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        lora_dropout=lora.dropout,
        target_modules=targets,
        layers_to_transform=layers,
        # a checkpoint may lack the pooler (DeBERTa's always does): drawn afresh, it is part of the fresh head
        modules_to_save=["pooler", *heads] if heads else None,
    )
    try:
        with quiet():
            made = peft.get_peft_model(net, config)
    except ValueError as error:
        raise ModelError(f"LoRA cannot be put into {base.config.base!r} ({base.about.model_type}): {error}") from error
    more = [n for n in _dense_parameters(made) if n.split(".")[0] not in heads and "pooler" not in n.split(".")]
    if more:
        raise ModelError(f"{base.config.base!r}: PEFT would train {more[0]} whole, as its name is that of a part of the head")
    return made


def _lora_layers(net: nn.Module) -> dict[str, Any]:
    """Path in the base model -> LoRA layer."""
    return {name.removeprefix(PREFIX): m for name, m in net.named_modules() if isinstance(m, LoraLayer)}


def _dense_parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """Path in the base model -> parameter, of what is trained beside the branches."""
    return {
        name.removeprefix(PREFIX).replace(".modules_to_save.default", ""): parameter
        for name, parameter in net.named_parameters()
        if parameter.requires_grad and "lora_" not in name
    }


def _check_kind(kind: str, config: ModelConfig, classes: Sequence[str]) -> None:
    """Raise ModelError for a kind of base that cannot do what is asked of it."""
    if kind == "classifier" and not classes:
        raise ModelError("a classifier needs classification rows: no row of this data has labels")
    if kind != "classifier" and config.head == "analytic":
        raise ModelError(
            f"model.head = 'analytic' scores the classes of an encoder, and {config.base!r} is a {kind} model: evidence.serve "
            f"serves the analytic classifier beside it"
        )
    if kind == "seq2seq" and config.feature_depths:
        raise ModelError(
            f"model.feature_depths says nothing to {config.base!r}: of an encoder-decoder the encoder's last are seen"
        )


class Model:
    """A base model with one adapter in it, on one device.

    kind: `causal`, `seq2seq` or `classifier`. classes: the answers of a classifier, in the order of its logits.
    """

    def __init__(
        self, config: ModelConfig, lora: LoraConfig, seed: int, classes: Sequence[str] = (), weights: bool = True
    ) -> None:
        """weights: False builds the same modules on torch's `meta` device, to count and name what would be trained.

        Raises ModelError if the base cannot be loaded or LoRA has no place in it.
        """
        about = load_config(config)
        self.config = config
        self.kind = kind_of(config, about)
        self.tokenizer = load_tokenizer(config)
        self.classes = tuple(classes)
        self.device = device_of(config, here=weights)  # what another machine will do is planned on any
        self.bf16 = uses_bf16(config.precision, config.device)
        _check_kind(self.kind, config, self.classes)
        # A frozen base is best held in the type it computes in; on a CPU float32 weights are the faster source.
        dtype = torch.bfloat16 if self.bf16 and self.device.type == "cuda" else torch.float32
        self.linear_head = self.kind == "classifier" and config.head == "linear"
        head = len(self.classes) if self.linear_head else 0
        self._base = Base(config, about, self.kind, head, dtype)
        seed_torch(seed, "fresh head")
        net = self._base.load() if weights else self._base.outline()
        net.config.use_cache = False
        if self.bf16 and self.device.type == "cpu":
            train_in_float32(net)
        if net.config.pad_token_id is None:
            net.config.pad_token_id = self.tokenizer.pad_token_id
        seed_torch(seed, "adapter")
        self.net = _with_lora(net, self._base, lora)
        if weights:
            self.net.to(self.device)
            # an encoder's labels are embedded in float32
            if self.bf16 and self.device.type == "cpu" and self.kind != "classifier":
                hold_in_bf16(self.net)
        self.net.eval()
        self._check_words()
        self._lora = _lora_layers(self.net)
        if self.bf16 and self.device.type == "cpu":
            for module in self._lora.values():  # autocast casts for itself; PEFT's cast to float32 before it changes no bit
                module.cast_input_dtype_enabled = False
        self.bare = without_branch(self.net, lora, about.num_hidden_layers)
        # of the blocks with an adapter; those below are the same for every adapter
        self.first = min(lora.blocks(about.num_hidden_layers)) if lora.layers else 0
        self._dense = _dense_parameters(self.net)
        self._slots = [parameter for _, parameter in sorted(self._tensors().items())]
        # others (a quantised base, an embedding) keep their branch
        self._foldable = [m for m in self._lora.values() if type(m.get_base_layer()) in (nn.Linear, Conv1D)]
        self._gather: tuple[Tensor, Tensor] | None = None
        self.remembers = False
        if self.kind != "classifier":
            self._projection().register_forward_pre_hook(self._gather_positions)
        self._ranks: dict[str, int] = {}  # of what was last written; empty before that, when all room is taken
        self.lower = self._lower_blocks(lora) if weights and self.first else None
        self.features = Features(self._pooled, self.tokenizer.pad_token_id)
        self.beside = Beside({})  # what scores labels beside the adapter
        self.shifts = 0  # entries of a federation's log of base shifts that the frozen maps hold
        self.initial = self.read() if weights else None  # what a site that is not sent a factor starts from
        similar = weights and self.kind == "classifier" and not self.linear_head
        self.label_text = self._embed_labels() if similar else None

    by_head: ByHead | None = None  # what scores classes in place of their words
    kept: tuple[int, ...] = ()  # blocks that are left of a model that was cut, see `export.cut`

    def _check_words(self) -> None:
        """Raise ModelError for tokens that the base has no embedding of: the first row with one would end the run."""
        rows = self.net.get_input_embeddings().weight.shape[0]
        words = self.tokenizer
        special = {getattr(words, f"{n}_token_id"): str(getattr(words, f"{n}_token")) for n in ("pad", "eos", "bos")}
        special.pop(None, None)
        behind = [f"{token!r} ({number})" for number, token in sorted(special.items()) if number >= rows]
        if behind:
            raise ModelError(
                f"model.base = {self.config.base!r} embeds {rows} tokens, and its tokenizer has {', '.join(behind[:3])}; use "
                f"the tokenizer that the base was trained with, or widen its embedding"
            )

    @property
    def positions(self) -> int:
        """How many tokens the base was made to read at once; 0 where it names no number."""
        named = getattr(self.net.config.get_text_config(), "max_position_embeddings", None)
        # RoBERTa's kin count from behind their padding
        shifted = [m.padding_idx for path, m in self.net.named_modules() if path.endswith("position_embeddings")]
        return int(named or 0) - sum(idx + 1 for idx in shifted[:1] if idx is not None)

    def _projection(self) -> nn.Module:
        """The map from hidden states to logits. Raises ModelError if there is none."""
        found: nn.Module | None = self.net.get_output_embeddings()
        if found is None:
            told = f"{self.config.base!r} ({self._base.about.model_type})"
            raise ModelError(f"{told} has no output projection to read logits from")
        return found

    def _gather_positions(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """(rows, time, d) -> (1, N, d) in front of the output projection, while `forward` runs."""
        if self._gather is None:
            return None
        return (inputs[0][self._gather].unsqueeze(0), *inputs[1:])

    def _tensors(self) -> dict[str, nn.Parameter]:
        """Every trained tensor under its name in `Adapter.tensors`."""
        named = dict(self._dense)
        for path, module in self._lora.items():
            named[f"{path}.a"], named[f"{path}.b"] = module.lora_A["default"].weight, module.lora_B["default"].weight
        return named

    def _lower_blocks(self, lora: LoraConfig) -> Lower:
        stack, forms = [block for _, block in self.places.stack], self.places.forms
        if self.kind == "seq2seq" or not forms or len(stack) != self._base.about.num_hidden_layers:
            raise ModelError(f"lora.layers = {list(lora.layers)}: {self.config.base!r} has no single stack of blocks")
        states = States(self.config.cache_memory, self.config.cache_disk)
        return Lower(self.net, stack, forms, self.first, states, self.bf16 and self.device.type == "cpu")

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """While it lasts, passes over whole rows begin above the frozen lower blocks of `lora.layers`, whose states are kept.

        Not for a model that is damaged or looked into below that, nor for one that generates.
        """
        before, self.remembers = self.remembers, self.lower is not None
        try:
            yield
        finally:
            self.remembers = before

    def _pass(self, inputs: dict[str, Any]) -> Any:
        """The model's output on whole rows."""
        if self.lower is None or not self.remembers or inputs.get("use_cache"):
            return self.net(**inputs)
        with self.lower.over(inputs):
            return self.net(**inputs)

    @cached_property
    def places(self) -> Places:
        """Where structures can be injected, and the blocks that hidden states are tapped at."""
        branches = {path: (m, m.get_base_layer(), m.lora_A["default"], m.lora_B["default"]) for path, m in self._lora.items()}
        base = self.net.get_base_model()
        found = find_places(base, base.config, branches)
        return replace(found, forms=self._forms([block for _, block in found.stack]))

    @torch.no_grad()
    def _forms(self, blocks: Sequence[nn.Module]) -> tuple[int, ...]:
        """Of each block, the length of the tuple that it gives; 0: states alone. Empty where a block has no part in a pass."""
        seen: dict[int, int] = {}

        def note(number: int, module: nn.Module, inputs: Any, output: Any) -> None:
            seen[number] = len(output) if isinstance(output, tuple) else 0

        ids = torch.tensor([[self.tokenizer.pad_token_id]], device=next(self.net.parameters()).device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        handles = [block.register_forward_hook(partial(note, number)) for number, block in enumerate(blocks)]
        was = self.net.training
        self.train(False)
        try:
            with self.autocast():
                self.net(**inputs, **({"decoder_input_ids": ids} if self.kind == "seq2seq" else {}))
        finally:
            self.train(was)
            for handle in handles:
                handle.remove()
        return tuple(seen[number] for number in range(len(blocks))) if len(seen) == len(blocks) else ()

    @cached_property
    def taps(self) -> tuple[str, ...]:
        """Paths of the tapped blocks, at L/4, L/2, 3L/4 and L of the stack that predicts, or of its part that is trained; empty
        if its blocks are not known."""
        stack = [path for path, _ in self.places.above(self.first).stack]
        depths = {max(1, round(len(stack) * share / 4)) for share in (1, 2, 3, 4)} if stack else set()
        return tuple(stack[depth - 1] for depth in sorted(depths))

    @contextmanager
    def _tapped(self) -> Iterator[dict[str, Tensor]]:
        """While it lasts, the outputs of the tapped blocks, by path, as the forward pass reaches them."""
        found: dict[str, Tensor] = {}

        def keep(path: str, module: nn.Module, inputs: Any, output: Any) -> None:
            found[path] = states_of(output)

        blocks = dict(self.places.stack)
        handles = [blocks[path].register_forward_hook(partial(keep, path)) for path in self.taps]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def park(self, adapter: Adapter) -> list[Tensor]:
        """The tensors of `adapter` on this model's device, in the order in which `swapped` takes them; a lower rank padded."""
        room, parked = self.read_shapes(), []
        for name, tensor in sorted(adapter.tensors().items()):
            whole = torch.zeros(room[name], device=self.device)
            whole[tuple(slice(0, size) for size in tensor.shape)] = tensor.to(self.device)
            parked.append(whole)
        return parked

    @contextmanager
    def swapped(self, parked: Sequence[Tensor]) -> Iterator[None]:
        """While it lasts, the model holds the tensors of `park`; pointers move, nothing is copied, no second base exists.

        Each low-rank map is folded into its base map as the forward pass reaches it, see `_folded`: what this says differs
        from a pass through the branches in rounding only, and costs a sixth less. Only for forward passes without gradient
        and without adapter dropout, and not inside an autocast that outlives it (its casts are cached).
        """
        if [t.shape for t in parked] != [p.shape for p in self._slots]:
            raise ModelError("the parked tensors are not those of an adapter of this model")
        mine = [p.data for p in self._slots]
        try:
            for parameter, tensor in zip(self._slots, parked, strict=True):
                parameter.data = tensor
            for module in self._foldable:
                module.forward = partial(_folded, module)
            yield
        finally:
            for module in self._foldable:
                module.__dict__.pop("forward", None)
            for parameter, tensor in zip(self._slots, mine, strict=True):
                parameter.data = tensor

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 autocast where this model uses it."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()

    @torch.no_grad()
    def _embed_labels(self) -> LabelText:
        """The classes' own words through the base without its adapter: computed once, then frozen."""
        rows = []
        with self.net.disable_adapter():
            for text in self.classes:
                inputs = self.tokenizer(text, return_tensors="pt").to(self.device)
                hidden = self.net(**inputs).last_hidden_state
                rows.append(_pool(hidden, inputs["attention_mask"])[0].float())
        return LabelText(nn.functional.normalize(torch.stack(rows), dim=-1))

    def forward(self, batch: Batch, states: bool = False, exit: int = -1) -> Forward:
        """Logits at the supervised positions of `batch`, on this model's device; see `types.Forward`.

        states: also the hidden states there at each of `taps`; of a classifier, their mean over a row's real tokens. exit:
        index of a block of the stack that predicts; with it also the logits of a model that ends there. −1: none.
        """
        if exit >= 0:
            return self._with_exit(batch, states, exit)
        if not states:
            return self._forward(batch)
        with self._tapped() as found:
            forward = self._forward(batch)
        hidden = [found[path] for path in self.taps]
        if self.kind == "classifier":
            mask = batch.inputs["attention_mask"].to(self.device)
            return replace(forward, states=[_pool(h, mask) for h in hidden])
        where = forward.rows, batch.columns.to(self.device)
        return replace(forward, states=[h[where] for h in hidden])

    def _with_exit(self, batch: Batch, states: bool, exit: int) -> Forward:
        """A pass, and from the block's states a second one through what stands around the blocks alone."""
        if not self.places.forms:
            raise ModelError(f"{self.config.base!r}: its blocks are not known, so there is no early exit")
        blocks = [block for _, block in self.places.stack]
        kept: dict[str, Any] = {}

        def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
            kept[name] = states_of(output) if name == "states" else output

        handles = [blocks[exit].register_forward_hook(partial(keep, "states"))]
        if self.kind == "seq2seq":
            handles.append(self.net.get_encoder().register_forward_hook(partial(keep, "encoder_outputs")))
        try:
            forward = self.forward(batch, states)
        finally:
            for handle in handles:
                handle.remove()
        begin, remembers = kept.pop("states"), self.remembers
        self.remembers = False
        try:
            with without(blocks, self.places.forms, begin):
                return replace(forward, exit=self._forward(batch, **kept).logits)
        finally:
            self.remembers = remembers

    def _forward(self, batch: Batch, **more: Any) -> Forward:
        inputs = {name: tensor.to(self.device) for name, tensor in batch.inputs.items()} | more
        rows, columns, targets = (t.to(self.device) for t in (batch.rows, batch.columns, batch.targets))
        if self.kind == "classifier":
            with self._looking(inputs) as seen:
                out = self._pass(inputs)
            if self.label_text is not None:
                last, mask = out.last_hidden_state, inputs["attention_mask"]
                logits = self.label_text(_pool(last, mask))
                if self.by_head is not None:
                    logits = self.by_head([_pool(states, mask) for states in seen(last)], batch.tasks, logits)
            else:
                logits = out.logits
            if batch.allowed is not None:
                logits = logits.float().masked_fill(~batch.allowed.to(self.device), float("-inf"))
            return Forward(logits, targets, rows)
        if self.kind == "seq2seq":
            labels = inputs.pop("labels")
            inputs["decoder_input_ids"] = self.shift_right(labels)
        logits, _ = self.logits_at(inputs, rows, columns)
        return Forward(logits, targets, rows)

    @torch.no_grad()
    def _pooled(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """What the base without adapter makes of whole rows, (rows, d) each, float32 on the CPU: the mean of a row's hidden
        states below the first block that is trained, else of the last ones, of an encoder-decoder of its encoder's; where the
        head is analytic always of the last ones; or at each of `model.feature_depths`. Of a causal model besides that of the
        last token, which alone has read the whole row."""
        assert self.initial is not None
        ids, mask = ids.to(self.device), mask.to(self.device)
        was = self.net.training
        self.train(False)
        try:
            # of the whole base, in a round too for which a site holds blocks out
            with whole(block for _, block in self.places.stack), self.swapped(self.park(self.initial)), self.autocast():
                inputs = {"input_ids": ids, "attention_mask": mask}
                if self.lower is not None and not self.depths:
                    found = [self.lower.states(inputs)]
                else:
                    base = self.net.get_base_model()
                    body = base.get_encoder() if self.kind == "seq2seq" else base.base_model
                    below = self.lower.over(inputs) if self.lower is not None else nullcontext()
                    with self._looking(inputs) as seen:
                        with below:
                            last = body(**inputs).last_hidden_state
                        found = seen(last)  # outside: what is not kept of the lower blocks takes a pass through them
        finally:
            self.train(was)
        parts = []
        for hidden in found:
            parts.append(_pool(hidden, mask))
            if self.kind == "causal":
                parts.append(hidden[torch.arange(len(ids)), mask.sum(1) - 1])
        return [part.float().cpu() for part in parts]

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Behind how many blocks of the stack the states are that the analytic anchor sees, in order; empty: where it sees them
        by itself. Raises ModelError for one that lies below what is kept of `lora.layers`."""
        blocks = len(self.places.stack)
        asked = self.config.feature_depths or ((1.0,) if self.config.head == "analytic" else ())
        found = tuple(sorted({max(1, round(share * blocks)) for share in asked}))
        if self.config.feature_depths and not self.places.forms:
            raise ModelError(f"model.feature_depths: the blocks of {self.config.base!r} are not known; leave it out")
        if found and self.lower is not None and found[0] < self.first:
            raise ModelError(
                f"model.feature_depths = {list(asked)}: states behind block {found[0]} of {blocks}, which lora.layers keeps "
                f"none of: the lowest that it sees are {self.first / blocks:g} of the depth"
            )
        return found

    @contextmanager
    def _looking(self, inputs: dict[str, Any]) -> Iterator[Callable[[Tensor], list[Tensor]]]:
        """Around a pass over `inputs`: the last hidden states -> those at each of `depths`, (rows, tokens, d); without any the
        last alone."""
        found: dict[int, Tensor] = {}

        def keep(behind: int, module: nn.Module, given: Any, output: Any) -> None:
            found[behind] = states_of(output)

        def seen(last: Tensor) -> list[Tensor]:
            if self.lower is not None and self.first in self.depths:
                found[self.first] = self.lower.states(inputs).to(last)
            return [found.get(behind, last) for behind in self.depths] or [last]

        with ExitStack() as undo:
            for behind in self.depths:
                if behind < len(self.places.stack) and not (self.lower is not None and behind == self.first):
                    block = self.places.stack[behind - 1][1]
                    undo.callback(block.register_forward_hook(partial(keep, behind)).remove)
            yield seen

    def know(self, heads: Mapping[str, Head]) -> None:
        """Score classes by these analytic classifiers from now on, by task, where `model.head = "analytic"`."""
        if self.config.head == "analytic":
            self.by_head = ByHead(heads, self.classes, self.device) if heads else None

    def logits_at(self, inputs: dict[str, Any], rows: Tensor, columns: Tensor) -> tuple[Tensor, Any]:
        """(N, V) logits at the given positions of a language model, and the model's whole output (with its cache)."""
        self._gather = (rows, columns)
        try:
            output = self._pass(inputs)
        finally:
            self._gather = None
        return output.logits[0], output

    @property
    def takes_trees(self) -> bool:
        """Whether a row may be a tree: each token sees what a mask says, and stands where `position_ids` says."""
        about = self._base.about
        knows = tables.ARCHITECTURES.get(about.model_type, tables.Architecture()).tree
        return self.kind == "causal" and knows and getattr(about, "sliding_window", None) is None

    def as_mask(self, sees: Tensor) -> Tensor:
        """What is added to attention scores, in four dimensions, so that a token looks only where `sees` says."""
        least = torch.finfo(torch.bfloat16 if self.bf16 else torch.float32).min
        return torch.zeros(sees.shape, device=sees.device).masked_fill(~sees, least)

    def shift_right(self, labels: Tensor) -> Tensor:
        """Decoder inputs for target tokens: the start token, then all targets but the last; padding after the end."""
        start, pad = self.net.config.decoder_start_token_id, self.net.config.pad_token_id
        if start is None:
            raise ModelError(f"{self.config.base!r}: its config has no decoder_start_token_id, which an encoder-decoder needs")
        shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
        return shifted.masked_fill(shifted == -100, pad)

    def accepts(self, argument: str) -> bool:
        """Whether the base model's forward takes `argument`."""
        return argument in inspect.signature(self.net.get_base_model().forward).parameters

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [p for p in self.net.parameters() if p.requires_grad]

    @contextmanager
    def training_only(self, names: Container[str]) -> Iterator[None]:
        """While it lasts, of the adapter's tensors only those of `names` (see `Adapter.tensors`) are trained."""
        frozen = [p for name, p in self._tensors().items() if name not in names]
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    @torch.no_grad()
    def replay(self, entries: Sequence[Shift], first: int) -> None:
        """Add entries `first`, `first` + 1, … of a federation's log of base shifts to the frozen maps; those that they hold
        already are passed over. In a bf16 base on CUDA each sum is rounded to bf16.

        Raises ModelError if entries are missing in between, or a map is not one that can be shifted (a quantised one).
        """
        if first > self.shifts:
            raise ModelError(
                f"the base holds {self.shifts} base shifts and the message begins with number {first + 1}: ask for the log "
                f"from its beginning"
            )
        for entry in entries[self.shifts - first :]:
            for path, (left, right) in entry.items():
                base = self._lora[path].get_base_layer()
                if self._lora[path] not in self._foldable:
                    raise ModelError(f"{path} is a {type(base).__name__}: a base shift needs a plain linear map")
                change = left.to(self.device) @ right.to(self.device)
                if self.device.type == "cpu":
                    base.weight.data = base.weight.data.float()  # of a map held in bf16, so that small shifts add up
                base.weight.copy_(base.weight.float() + (change.T if isinstance(base, Conv1D) else change))
            self.shifts += 1

    @torch.no_grad()
    def rewind(self) -> None:
        """Take every base shift out: the maps are read again, as taking sums off would leave rounding behind."""
        if self.shifts:
            fresh = self._base.load()
            for path, module in self._lora.items():
                module.get_base_layer().weight.copy_(fresh.get_submodule(path).weight)
            self.shifts = 0

    @cached_property
    @torch.no_grad()
    def keeps_keys(self) -> bool:
        """Whether what it keeps between tokens is keys and values of every token alone, which rows can be padded in, copied and
        taken from; a recurrent or hybrid model keeps a state."""
        with self.autocast():
            out = self.net(input_ids=torch.tensor([[self.tokenizer.pad_token_id]], device=self.device), use_cache=True)
        kept = getattr(out, "past_key_values", None)
        layers = getattr(kept, "layers", []) if type(kept) is DynamicCache else []  # a subclass may hold more than its layers
        return bool(layers) and all(isinstance(layer, DynamicLayer) for layer in layers)

    @property
    def stored(self) -> torch.dtype:
        """The type of the base's numbers, as its config names it."""
        named = self._base.about.dtype
        return named if named in (torch.bfloat16, torch.float16) else torch.float32

    def merged(self) -> Any:
        """The transformers model with its adapter folded in, float32. This model is of no further use after it."""
        return self.net.float().merge_and_unload()

    def train(self, mode: bool = True) -> None:
        """Training mode (dropout on), or evaluation mode."""
        if self.net.training != mode:  # all modules follow it, and to go through them takes as long as a small batch
            self.net.train(mode)

    def read(self) -> Adapter:
        """A copy of the adapter, float32, on the CPU; of the rank of what was last written."""

        def taken(tensor: Tensor) -> Tensor:
            return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()

        lora = {}
        for path, m in self._lora.items():
            rank = self._ranks.get(path)
            a, b = m.lora_A["default"].weight[:rank], m.lora_B["default"].weight[:, :rank]
            lora[path] = Lora(taken(a), taken(b), float(m.scaling["default"]))
        return Adapter(lora, {path: taken(p) for path, p in self._dense.items()})

    @torch.no_grad()
    def write(self, adapter: Adapter) -> None:
        """Put `adapter` in place of the present one, in place: no new modules, no second base.

        An adapter of a lower rank fills the first rows; the others are 0 in both factors, where no gradient reaches them, so
        that training is that of the lower rank. Raises ModelError if its modules or shapes do not fit.
        """
        room, given = self.read_shapes(), {name: tuple(t.shape) for name, t in adapter.tensors().items()}
        ranks = {path: factors.a.shape[0] for path, factors in adapter.lora.items()}
        need = dict(given)
        for path, rank in ranks.items():
            if f"{path}.a" in room and rank <= (most := room[f"{path}.a"][0]):
                need[f"{path}.a"], need[f"{path}.b"] = (most, given[f"{path}.a"][1]), (given[f"{path}.b"][0], most)
        if room != need:
            odd = sorted(set(room.items()) ^ set(need.items()))[0][0]
            raise ModelError(f"the adapter does not fit {self.config.base!r}: {odd} has {given.get(odd)}, not {room.get(odd)}")
        self._ranks = ranks
        for path, module in self._lora.items():
            a, b, rank = module.lora_A["default"].weight, module.lora_B["default"].weight, ranks[path]
            a[:rank].copy_(adapter.lora[path].a)
            b[:, :rank].copy_(adapter.lora[path].b)
            a[rank:].zero_()
            b[:, rank:].zero_()
            module.scaling["default"] = adapter.lora[path].scale
        for path, parameter in self._dense.items():
            parameter.copy_(adapter.dense[path])

    def read_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that `read` gives, by the names of `Adapter.tensors`."""
        return {name: tuple(parameter.shape) for name, parameter in self._tensors().items()}

    def not_finite(self) -> list[str]:
        """The frozen tensors that hold an infinity or a NaN, by their names in the base."""
        frozen = ((name, p) for name, p in self.net.named_parameters() if not p.requires_grad and p.is_floating_point())
        return [name.removeprefix(PREFIX).replace(".base_layer", "") for name, p in frozen if not p.isfinite().all()]

    def base_parameters(self) -> int:
        """The number of frozen scalars."""
        return sum(p.numel() for p in self.net.parameters() if not p.requires_grad)
