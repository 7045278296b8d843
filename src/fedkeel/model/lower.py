"""The frozen blocks below the first that is trained: what they say of a row is worked out once and kept.

Adapters in the upper blocks only (`lora.layers`) leave the hidden states at the boundary the same all run long, for student,
teacher and scoring alike. Each row passes through the lower blocks on its own, without padding, so what is kept is the same
to the bit as what would be worked out anew, whatever batch the row comes in.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, Any

import torch
from torch import Tensor, nn

from fedkeel.model.depth import without

MIB = 2**20
ROWS = ("input_ids", "position_ids", "token_type_ids")  # inputs of (rows, tokens)


class _Reached(Exception):
    """The boundary, with the hidden states there."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


class States:
    """Hidden states by row, (tokens, d) each: in memory up to a bound, then in an unnamed file up to another, then not at all.

    memory, disk: the bounds, in MiB. The file is gone with the process, however that ends.
    """

    def __init__(self, memory: int, disk: int) -> None:
        self._memory, self._disk = memory * MIB, disk * MIB
        self._held: dict[bytes, Tensor] = {}
        self._filed: dict[bytes, tuple[int, tuple[int, ...]]] = {}
        self._file: IO[bytes] | None = None
        self._dtype = torch.float32

    def get(self, key: bytes) -> Tensor | None:
        """What was put under `key`, on the CPU."""
        if key in self._held:
            return self._held[key]
        if key not in self._filed or self._file is None:
            return None
        at, shape = self._filed[key]
        found = torch.empty(shape, dtype=self._dtype)
        self._file.seek(at)
        self._file.readinto(found.view(torch.uint8).numpy())  # type: ignore[attr-defined]
        return found

    def put(self, key: bytes, states: Tensor) -> None:
        """Keep `states`, if there is room."""
        if states.nbytes <= self._memory:
            self._memory -= states.nbytes
            self._held[key] = states
        elif states.nbytes <= self._disk:
            if self._file is None:
                self._file, self._dtype = tempfile.TemporaryFile(), states.dtype  # noqa: SIM115, as it lasts as this object does
            at = self._file.seek(0, 2)
            try:
                self._file.write(states.contiguous().view(torch.uint8).numpy().data)
                self._file.flush()
            except OSError:  # less room than was asked for: what is not kept is computed again
                self._disk = 0
                return
            self._disk -= states.nbytes
            self._filed[key] = at, tuple(states.shape)


class Lower:
    """The lower blocks of one model.

    net: the model. blocks, forms: of its stack, from the lowest, see `Places`. first: index of the first block that is trained,
    above 0. bf16: it runs under bf16 autocast. The linear maps' weights are then held in that type beside the others: for a
    single row a cast of every weight would cost as much as the row itself, and a weight cast beforehand gives the same.
    """

    def __init__(
        self, net: nn.Module, blocks: Sequence[nn.Module], forms: Sequence[int], first: int, states: States, bf16: bool
    ) -> None:
        self._net, self._below, self._boundary, self._states = net, blocks[:first], blocks[first], states
        self._forms = forms[:first]
        maps = [m for b in self._below for m in b.modules() if type(m) is nn.Linear] if bf16 else []
        self._cast = [(m, m.weight.detach().to(torch.bfloat16)) for m in maps if m.weight.dtype != torch.bfloat16]

    @contextmanager
    def over(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """While it lasts, a pass of the model over `inputs` begins at the boundary, with the states kept of each row.

        inputs: as of `states`.
        """
        with without(self._below, self._forms, self.states(inputs)):
            yield

    def states(self, inputs: Mapping[str, Any]) -> Tensor:
        """The hidden states at the boundary, (rows, tokens, d), 0 where a row is padded.

        inputs: `input_ids` and `attention_mask`, (rows, tokens) and padded on the right, or the mask of trees, (rows, 1,
        tokens, tokens), with `position_ids`.
        """
        mask = inputs["attention_mask"]
        lengths = (mask if mask.dim() == 2 else mask[:, 0, :, 0] == mask[:, 0, :1, 0]).sum(1).tolist()
        rows = [self._of(self._row(inputs, row, length)) for row, length in enumerate(lengths)]
        whole = rows[0].new_zeros(len(rows), mask.shape[-1], rows[0].shape[-1], device=mask.device)
        for row, states in enumerate(rows):
            whole[row, : len(states)] = states
        return whole

    @staticmethod
    def _row(inputs: Mapping[str, Any], row: int, length: int) -> dict[str, Tensor]:
        """One row of `inputs`, without its padding."""
        mask = inputs["attention_mask"]
        own = {name: tensor[row : row + 1, :length] for name, tensor in inputs.items() if name in ROWS}
        own["attention_mask"] = mask[row : row + 1, :length] if mask.dim() == 2 else mask[row : row + 1, :, :length, :length]
        return own

    @torch.no_grad()
    def _of(self, row: Mapping[str, Tensor]) -> Tensor:
        """The states of one row at the boundary, (tokens, d)."""
        content = [t.cpu().contiguous().numpy() for _, t in sorted(row.items())]
        key = hashlib.sha256(b"".join(repr(c.shape).encode() + c.tobytes() for c in content)).digest()
        found = self._states.get(key)
        if found is None:
            found = self._worked_out(row)[0].cpu()
            self._states.put(key, found)
        return found

    def _worked_out(self, row: Mapping[str, Tensor]) -> Tensor:
        with ExitStack() as undo:
            for module in self._net.modules():  # nothing is dropped of what is kept
                undo.callback(setattr, module, "training", module.training)
                module.training = False
            for module, weight in self._cast:
                undo.callback(setattr, module.weight, "data", module.weight.data)
                module.weight.data = weight
            undo.callback(self._boundary.register_forward_pre_hook(_stop).remove)
            try:
                self._net(**row)
            except _Reached as reached:
                return reached.states
        raise AssertionError("the boundary was not reached")


def _stop(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    raise _Reached(inputs[0])
