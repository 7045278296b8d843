"""A network with one LoRA adapter in it: what is trained, read and written, and exchanged for another's in place."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedkeel.model.bases import ModelError
from fedkeel.model.load import Base, heads_of
from fedkeel.model.quiet import quiet
from fedkeel.model.targets import targets_in
from fedkeel.recipe.schema import LoraConfig
from fedkeel.types import Adapter, Lora, Shift

PREFIX = "base_model.model."  # before a path in the base model, in PEFT's names


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


def with_lora(net: Any, base: Base, lora: LoraConfig) -> Any:
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


class Adapted:
    """The modules of a base with one adapter in them, on one device.

    layers: path in the base model -> LoRA layer. shifts: entries of a federation's log of base shifts that frozen maps hold.
    """

    def __init__(self, net: Any, base: Base, device: torch.device) -> None:
        self.net, self.base, self.device = net, base, device
        self.layers: dict[str, Any] = _lora_layers(net)
        self.shifts = 0
        self._dense = _dense_parameters(net)
        self._slots = [parameter for _, parameter in sorted(self._tensors().items())]
        # others (a quantised base, an embedding) keep their branch
        self._foldable = [m for m in self.layers.values() if type(m.get_base_layer()) in (nn.Linear, Conv1D)]
        self._ranks: dict[str, int] = {}  # of what was last written; empty before that, when all room is taken

    def read(self) -> Adapter:
        """A copy of the adapter, float32, on the CPU; of the rank of what was last written."""

        def taken(tensor: Tensor) -> Tensor:
            return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()

        lora = {}
        for path, m in self.layers.items():
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
            raise ModelError(
                f"the adapter does not fit {self.base.config.base!r}: {odd} has {given.get(odd)}, not {room.get(odd)}"
            )
        self._ranks = ranks
        for path, module in self.layers.items():
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

    def _tensors(self) -> dict[str, nn.Parameter]:
        """Every trained tensor under its name in `Adapter.tensors`."""
        named = dict(self._dense)
        for path, module in self.layers.items():
            named[f"{path}.a"], named[f"{path}.b"] = module.lora_A["default"].weight, module.lora_B["default"].weight
        return named

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
                base = self.layers[path].get_base_layer()
                if self.layers[path] not in self._foldable:
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
            fresh = self.base.load()
            for path, module in self.layers.items():
                module.get_base_layer().weight.copy_(fresh.get_submodule(path).weight)
            self.shifts = 0

    def not_finite(self) -> list[str]:
        """The frozen tensors that hold an infinity or a NaN, by their names in the base."""
        frozen = ((name, p) for name, p in self.net.named_parameters() if not p.requires_grad and p.is_floating_point())
        return [name.removeprefix(PREFIX).replace(".base_layer", "") for name, p in frozen if not p.isfinite().all()]

    def base_parameters(self) -> int:
        """The number of frozen scalars."""
        return sum(p.numel() for p in self.net.parameters() if not p.requires_grad)
