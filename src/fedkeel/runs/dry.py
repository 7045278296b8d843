"""What a run would take, told before any work."""

from __future__ import annotations

from fedkeel.model.bases import ModelError
from fedkeel.model.load import device_of
from fedkeel.model.lora import Model
from fedkeel.runs.encode import Encoded
from fedkeel.runs.planned import planned
from fedkeel.runs.prepare import Prepared
from fedkeel.runs.traffic import traffic


class Dry:
    """What a run would find before its first step, without the base's weights.

    frozen, trainable: numbers of parameters. cast: who takes part. traffic: of the federation's messages. legs: what would
    run. notes: what the user should know. promise: ε, in words; empty without one.
    """

    def __init__(self, prepared: Prepared) -> None:
        """Raises what the run would."""
        recipe = prepared.recipe
        model = Model(recipe.model, recipe.lora, recipe.seed, prepared.classes, weights=False)
        rows = Encoded(model, prepared)
        self.cast = rows.cast
        self.traffic = traffic(self.cast, rows.stages, model.read_shapes(), model.pooled_width)
        self.frozen, self.trainable = model.base_parameters(), sum(p.numel() for p in model.parameters())
        self.notes = [*rows.notes(), *prepared.notes]
        try:
            device_of(recipe.model)
        except ModelError as error:
            self.notes.append(str(error))
        self.legs, self.promise = planned(self.cast, lambda leg, stage, split: len(rows.held_out[split][stage]))
