"""Where structures go: the attention output maps, down projections and LoRA branches of a model, found by module path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from fedkeel import tables
from fedkeel.types import FedKeelError


class StructureError(FedKeelError):
    """A structure that does not exist, has an impossible amount or finds no place in this model."""


class InBlock(NamedTuple):
    """Where a path lies. stack: path of a stack of blocks. number: of the block, from 0. inner: the path within it."""

    stack: str
    number: int
    inner: str

    @property
    def block(self) -> str:
        """The block's own path."""
        return f"{self.stack}.{self.number}".removeprefix(".")


def in_block(path: str) -> InBlock | None:
    """Of a module or tensor; None outside of all blocks. A stack is what stands in front of the first number of a path."""
    parts = path.split(".")
    at = next((n for n, part in enumerate(parts) if part.isdigit()), None)
    return None if at is None else InBlock(".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :]))


@dataclass(frozen=True)
class Place:
    """One module at which something is injected: a linear map, or a norm behind it.

    path: in the base model. block: index of its transformer block, from 0, within its stack of `blocks`. units: for an
    attention output map what is dropped together, heads or KV groups under grouped-query attention; else 0.
    """

    path: str
    module: nn.Module
    block: int
    blocks: int
    units: int = 0


@dataclass(frozen=True)
class Branch:
    """One LoRA branch: y = base(x) + scale · b(a(x)), with y the output of `whole`.

    a: (…, d_in) -> (…, r). b: (…, r) -> (…, d_out). base: frozen. block, blocks: as in `Place`; outside any block, 0 of 1.
    """

    path: str
    whole: nn.Module
    base: nn.Module
    a: nn.Module
    b: nn.Module
    block: int
    blocks: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(d_out, r, d_in)."""
        (rank, d_in), (d_out, _) = _weight(self.a), _weight(self.b)
        return d_out, rank, d_in


def _weight(linear: nn.Module) -> tuple[int, int]:
    weight = linear.weight
    assert isinstance(weight, nn.Parameter)
    return weight.shape[0], weight.shape[1]


@dataclass(frozen=True)
class Places:
    """All places of one model, in the order of its modules. For an unknown architecture only `branches` and `stack` are found.

    attention: output projections of self- and cross-attention; their input is the heads side by side. down: down
    projections of feed-forward blocks. residual: modules whose output is what is added to the residual stream. stack:
    (path, block) of the stack that makes predictions, from the lowest; in an encoder-decoder, the decoder. forms: of each of
    its blocks, the length of the tuple that it gives, 0 where it gives states alone; empty before a pass has shown it.
    """

    architecture: str
    attention: tuple[Place, ...]
    down: tuple[Place, ...]
    residual: tuple[Place, ...]
    branches: tuple[Branch, ...]
    stack: tuple[tuple[str, nn.Module], ...]
    forms: tuple[int, ...] = ()

    def above(self, first: int) -> Places:
        """Those of blocks from index `first` on."""
        if not first:
            return self
        attention, down, residual = (
            tuple(p for p in found if p.block >= first) for found in (self.attention, self.down, self.residual)
        )
        stack, forms = self.stack[first:], self.forms[first:]
        return replace(self, attention=attention, down=down, residual=residual, stack=stack, forms=forms)

    def need(self, found: tuple[Any, ...], structure: str) -> None:
        """Raises StructureError, naming the architecture and `structure`, if nothing was `found`."""
        if found:
            return
        if tables.STRUCTURES[structure].at != "branches":
            placed = sorted(name for name, maps in tables.ARCHITECTURES.items() if maps.attention or maps.down)
            known = f"It is known how to place it in {', '.join(placed)}"
            if self.architecture in placed:
                known += f", but the blocks of this {self.architecture} hold no such map as a module of its own"
            anywhere = (name for name, entry in tables.STRUCTURES.items() if entry.at == "branches" and not entry.learns)
            known += f"; structures on LoRA branches ({', '.join(anywhere)}) work in any architecture"
        else:
            known = "It sits on LoRA branches, and this model has none"
        raise StructureError(f"structure {structure!r} finds no place in a model of type {self.architecture!r}. {known}")


def find_places(
    base: nn.Module, config: Any, branches: Mapping[str, tuple[nn.Module, nn.Module, nn.Module, nn.Module]]
) -> Places:
    """The places of `base`, a Hugging Face model of the given config, LoRA layers in it or not.

    branches: module path -> (whole, base, a, b), see `Branch`. Never fails: what cannot be found is empty, and the structure
    that needs it says so.
    """
    architecture = str(config.model_type)
    maps = tables.ARCHITECTURES.get(architecture, tables.Architecture())
    sizes: dict[str, int] = {}  # path of a stack -> its number of blocks

    def locate(path: str) -> tuple[int, int, str]:
        """(block, blocks, path within the block)."""
        at = in_block(path)
        if at is None:
            return 0, 1, ""
        if at.stack not in sizes:
            sizes[at.stack] = sum(name.isdigit() for name, _ in base.get_submodule(at.stack).named_children())
        return at.number, sizes[at.stack], at.inner

    attention, down, residual = [], [], []
    for path, module in base.named_modules() if maps.added else ():
        block, blocks, inner = locate(path)
        if inner in maps.attention:
            attention.append(Place(path, module, block, blocks, _units(config, path)))
        if inner in maps.down:
            down.append(Place(path, module, block, blocks))
        if inner in maps.added:
            residual.append(Place(path, module, block, blocks))
    found = []
    for path, (whole, frozen, a, b) in branches.items():
        block, blocks, _ = locate(path)
        found.append(Branch(path, whole, frozen, a, b, block, blocks))

    # the longest stack; in an encoder-decoder the one on the decoder's side
    last = max(sizes, key=lambda s: ("decoder" in s.split("."), sizes[s]), default=None)
    stack = [f"{last}.{i}".removeprefix(".") for i in range(sizes[last])] if last is not None else []
    return Places(
        architecture,
        tuple(attention),
        tuple(down),
        tuple(residual),
        tuple(found),
        tuple((p, base.get_submodule(p)) for p in stack),
    )


def _units(config: Any, path: str) -> int:
    """Heads, or KV groups: under grouped-query attention the heads of a group stand side by side and share keys and values."""
    heads = config.num_attention_heads
    if config.is_encoder_decoder and "decoder" in path.split("."):
        heads = getattr(config, "decoder_attention_heads", heads)
    return int(getattr(config, "num_key_value_heads", None) or heads)


def in_width(module: nn.Module) -> int:
    """d_in of a linear map; GPT-2's transposed one calls it nx."""
    return int(getattr(module, "in_features", None) or module.nx)  # type: ignore[arg-type]
