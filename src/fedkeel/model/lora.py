"""One frozen base model with a LoRA adapter: passes over rows and their scores; the adapter in it is of `adapted`.

Logits are computed at supervised positions only: a hook in front of the output projection gathers the hidden states of
those positions, so a (batch, time, V) tensor never exists, whatever the architecture does after the projection.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from fedkeel import tables
from fedkeel.data.batches import Batch
from fedkeel.model.adapted import Adapted, with_lora
from fedkeel.model.attention import train_in_float32
from fedkeel.model.bases import ModelError
from fedkeel.model.depth import states_of, whole, without
from fedkeel.model.features import Beside, ByHead, Features, standardised
from fedkeel.model.half import hold_in_bf16
from fedkeel.model.load import Base, device_of, kind_of, load_config, load_tokenizer, uses_bf16
from fedkeel.model.lower import Lower, States
from fedkeel.model.places import Places, find_places
from fedkeel.model.targets import without_branch
from fedkeel.recipe.schema import LoraConfig
from fedkeel.recipe.schema import Model as ModelConfig
from fedkeel.rng import seed_torch
from fedkeel.types import Forward, Head

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


class Model(Adapted):
    """A base model with one adapter in it, on one device: passes over rows, and what they are scored by.

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
        device = device_of(config, here=weights)  # what another machine will do is planned on any
        self.bf16 = uses_bf16(config.precision, config.device)
        _check_kind(self.kind, config, self.classes)
        # A frozen base is best held in the type it computes in; on a CPU float32 weights are the faster source.
        dtype = torch.bfloat16 if self.bf16 and device.type == "cuda" else torch.float32
        self.linear_head = self.kind == "classifier" and config.head == "linear"
        head = len(self.classes) if self.linear_head else 0
        base = Base(config, about, self.kind, head, dtype)
        seed_torch(seed, "fresh head")
        net = base.load() if weights else base.outline()
        net.config.use_cache = False
        if self.bf16 and device.type == "cpu":
            train_in_float32(net)
        if net.config.pad_token_id is None:
            net.config.pad_token_id = self.tokenizer.pad_token_id
        seed_torch(seed, "adapter")
        net = with_lora(net, base, lora)
        if weights:
            net.to(device)
            # an encoder's labels are embedded in float32
            if self.bf16 and device.type == "cpu" and self.kind != "classifier":
                hold_in_bf16(net)
        net.eval()
        super().__init__(net, base, device)
        self._check_words()
        if self.bf16 and self.device.type == "cpu":
            for module in self.layers.values():  # autocast casts for itself; PEFT's cast to float32 before it changes no bit
                module.cast_input_dtype_enabled = False
        self.bare = without_branch(self.net, lora, about.num_hidden_layers)
        # of the blocks with an adapter; those below are the same for every adapter
        self.first = min(lora.blocks(about.num_hidden_layers)) if lora.layers else 0
        self._gather: tuple[Tensor, Tensor] | None = None
        self.remembers = False
        if self.kind != "classifier":
            self._projection().register_forward_pre_hook(self._gather_positions)
        self.lower = self._lower_blocks(lora) if weights and self.first else None
        self.features = Features(self._pooled, self.tokenizer.pad_token_id)
        self.beside = Beside({})  # what scores labels beside the adapter
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
            told = f"{self.config.base!r} ({self.base.about.model_type})"
            raise ModelError(f"{told} has no output projection to read logits from")
        return found

    def _gather_positions(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """(rows, time, d) -> (1, N, d) in front of the output projection, while `forward` runs."""
        if self._gather is None:
            return None
        return (inputs[0][self._gather].unsqueeze(0), *inputs[1:])

    def _lower_blocks(self, lora: LoraConfig) -> Lower:
        stack, forms = [block for _, block in self.places.stack], self.places.forms
        if self.kind == "seq2seq" or not forms or len(stack) != self.base.about.num_hidden_layers:
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
        branches = {path: (m, m.get_base_layer(), m.lora_A["default"], m.lora_B["default"]) for path, m in self.layers.items()}
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

    def forward(self, batch: Batch, states: bool = False, exit: int = -1, pooled: bool = False) -> Forward:
        """Logits at the supervised positions of `batch`, on this model's device; see `types.Forward`.

        states: also the hidden states there at each of `taps`; of a classifier, their mean over a row's real tokens. exit:
        index of a block of the stack that predicts; with it also the logits of a model that ends there. −1: none. pooled: also
        what it makes of whole rows at each of `depths`, of an encoder.
        """
        if exit >= 0:
            return self._with_exit(batch, states, exit, pooled)
        if not states:
            return self._forward(batch, pooled)
        with self._tapped() as found:
            forward = self._forward(batch, pooled)
        hidden = [found[path] for path in self.taps]
        if self.kind == "classifier":
            mask = batch.inputs["attention_mask"].to(self.device)
            return replace(forward, states=[_pool(h, mask) for h in hidden])
        where = forward.rows, batch.columns.to(self.device)
        return replace(forward, states=[h[where] for h in hidden])

    def _with_exit(self, batch: Batch, states: bool, exit: int, pooled: bool) -> Forward:
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
            forward = self.forward(batch, states, pooled=pooled)
        finally:
            for handle in handles:
                handle.remove()
        begin, remembers = kept.pop("states"), self.remembers
        self.remembers = False
        try:
            with without(blocks, self.places.forms, begin):
                return replace(forward, exit=self._forward(batch, False, **kept).logits)
        finally:
            self.remembers = remembers

    def _forward(self, batch: Batch, pooled: bool, **more: Any) -> Forward:
        inputs = {name: tensor.to(self.device) for name, tensor in batch.inputs.items()} | more
        rows, columns, targets = (t.to(self.device) for t in (batch.rows, batch.columns, batch.targets))
        if self.kind == "classifier":
            with self._looking(inputs) as seen:
                out = self._pass(inputs)
            if self.label_text is not None:
                last, mask = out.last_hidden_state, inputs["attention_mask"]
                logits = self.label_text(_pool(last, mask))
                parts = [_pool(states, mask) for states in seen(last)] if pooled or self.by_head is not None else []
                if self.by_head is not None:
                    logits = self.by_head(parts, batch.tasks, logits)
            else:
                logits, parts = out.logits, []
            if batch.allowed is not None:
                logits = logits.float().masked_fill(~batch.allowed.to(self.device), float("-inf"))
            whole = standardised([part.float() for part in parts]) if pooled else None
            return Forward(logits, targets, rows, pooled=whole)
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

    @property
    def pooled_width(self) -> int:
        """Features that the analytic anchor sees of a row, the intercept among them, see `_pooled`; known without weights. Of
        `model.feature_depths` that fall on one block it counts each."""
        hidden: int = self.net.get_base_model().config.get_text_config().hidden_size
        return max(1, len(self.config.feature_depths)) * (2 if self.kind == "causal" else 1) * hidden + 1

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
        about = self.base.about
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
        named = self.base.about.dtype
        return named if named in (torch.bfloat16, torch.float16) else torch.float32

    def merged(self) -> Any:
        """The transformers model with its adapter folded in, float32. This model is of no further use after it."""
        return self.net.float().merge_and_unload()

    def train(self, mode: bool = True) -> None:
        """Training mode (dropout on), or evaluation mode."""
        if self.net.training != mode:  # all modules follow it, and to go through them takes as long as a small batch
            self.net.train(mode)
