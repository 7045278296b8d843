"""What a run would take, told before any work."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedkeel import tables
from fedkeel.exchange.codecs import make_codec, seal
from fedkeel.exchange.messages import Way, about, names_of, pack, pack_global, shapes_of
from fedkeel.exchange.summands import summand
from fedkeel.model.bases import ModelError
from fedkeel.model.load import device_of
from fedkeel.model.lora import Model
from fedkeel.recipe.schema import Recipe
from fedkeel.runs.encode import Encoded
from fedkeel.runs.planned import planned
from fedkeel.runs.prepare import Prepared
from fedkeel.types import Adapter, Global, Lora


def payload_bytes(shapes: Mapping[str, tuple[int, ...]], recipe: Recipe, sites: int = 1) -> tuple[int, int]:
    """(down, up): bytes of one message each way for an adapter of these shapes, by sealing one of zeros.

    True messages are a little longer: their headers carry names and numbers. In a stream with distill.memory the message
    down holds two adapters from the second stage on, and that is the size given here. Base shifts come on top: of rank up
    to that of all sites' adapters together, for every round that a site has not seen. sites: of a round, whose number decides
    how wide the numbers behind masks are; keys and shares come on top, 0.4 kB a pair of sites.
    """
    zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
    paths = sorted(name[:-2] for name in zeros if name.endswith(".a") and f"{name[:-2]}.b" in zeros)
    lora = {p: Lora(zeros[f"{p}.a"], zeros[f"{p}.b"], 1.0) for p in paths}
    factors = {f"{p}.{x}" for p in paths for x in "ab"}
    adapter = Adapter(lora, {n: t for n, t in zeros.items() if n not in factors})
    stats = {"loss": 0.1234567890123456}
    more = {"site": "site-0", "positions": 10_000, "stats": stats, "seconds": "00000000.000", "tasks": {}}
    remembers = recipe.distill.weight and recipe.distill.memory and len(recipe.stream.stages) > 1
    federation, state = recipe.federation, Global(0, adapter, adapter if remembers else None)
    rule = tables.RULES[federation.rule]
    way = Way(federation.codec_down, names_of(adapter, rule.down))
    down = pack_global("global", state, way, tasks={}, unsent="0" * 16)
    sent = names_of(adapter, rule.trained(0) & rule.shared)
    changes = {name: t for name, t in adapter.tensors().items() if name in sent}
    if recipe.privacy.masks:
        return len(down), len(_masked(changes, adapter, recipe, sites))
    encoded = make_codec(federation.codec_up).encode(changes, 0)
    up = pack("update", 0, adapter, encoded, federation.codec_up, held=0, **more)
    return len(down), len(up)


def _masked(changes: Mapping[str, torch.Tensor], adapter: Adapter, recipe: Recipe, sites: int) -> bytes:
    """A change of zeros as it goes behind masks."""
    form = summand(recipe.federation.codec_up, sites, {}).form(shapes_of(changes), int(recipe.privacy.quantile > 0))
    zeros = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in form.wire().items()}
    return seal(about("masked", 0, adapter, site="site-0"), zeros)


class Dry:
    """What a run would find before its first step, without the base's weights. frozen, trainable: numbers of parameters.
    shapes: of the adapter. legs: what would run. notes: what the user should know. promise: ε, in words; empty without one."""

    def __init__(self, prepared: Prepared) -> None:
        """Raises what the run would."""
        recipe = prepared.recipe
        model = Model(recipe.model, recipe.lora, recipe.seed, prepared.classes, weights=False)
        rows = Encoded(model, prepared)
        self.cast, self.shapes = rows.cast, model.read_shapes()
        self.frozen, self.trainable = model.base_parameters(), sum(p.numel() for p in model.parameters())
        self.notes = [*rows.notes(), *prepared.notes]
        try:
            device_of(recipe.model)
        except ModelError as error:
            self.notes.append(str(error))
        self.legs, self.promise = planned(self.cast, lambda leg, stage, split: len(rows.held_out[split][stage]))
