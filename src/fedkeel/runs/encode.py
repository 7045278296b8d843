"""What a run's rows become for its base: examples in tokens, by stage and site, and the rows that are scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedkeel.data.format import Example, Formatter
from fedkeel.data.forms import DataError
from fedkeel.data.sites import Sites
from fedkeel.federation.evidence import check_pooled
from fedkeel.model.lora import Model
from fedkeel.recipe.schema import Evaluation
from fedkeel.recipe.settings import ConfigError
from fedkeel.runs.legs import Cast, cast_of
from fedkeel.runs.prepare import Prepared
from fedkeel.scores.evaluate import choose
from fedkeel.types import Record


def check_length(model: Model, tokens: int, answers: int = 0) -> None:
    """Raise ConfigError for rows longer than the base can read, or answers, of tokens of their own, than it can write."""
    if 0 < model.positions < tokens:
        raise ConfigError(
            f"data.max_length = {tokens}, and {model.config.base!r} was made for {model.positions} tokens: set "
            f"data.max_length = {model.positions} or less"
        )
    if model.kind == "seq2seq" and 0 < model.positions < answers:
        raise ConfigError(
            f"evaluation.max_new_tokens = {answers}, and {model.config.base!r} was made for {model.positions} tokens: set it "
            f"to {model.positions} or less"
        )


def formatter_of(model: Model, prepared: Prepared) -> Formatter:
    """What makes examples of the run's rows for this model. Raises ConfigError or ModelError where the recipe asks of the base
    what it cannot do."""
    data = prepared.recipe.data
    check_length(model, data.max_length, prepared.recipe.evaluation.max_new_tokens)
    if prepared.recipe.evidence.prototype:
        check_pooled(model)
    return Formatter(model.tokenizer, model.kind, data.max_length, data.list_labels, classes=model.classes)


class Encoded:
    """The rows of a run in this process.

    stages: of each, by site, what it trains on. held_out: `validation`, `test` or `unseen-sites` -> the rows to score after
    each stage. The model's weights are not asked for.
    """

    def __init__(self, model: Model, prepared: Prepared) -> None:
        """Raises ConfigError or DataError where rows and base do not go together."""
        self._model, self._prepared = model, prepared
        self.formatter = formatter_of(model, prepared)
        self.stages = [self._encoded(stage, number) for number, stage in enumerate(prepared.stages, 1)]
        evaluation = prepared.recipe.evaluation
        self.held_out = {
            "validation": _held_out("validation", evaluation, prepared.stages),
            "test": _held_out("test", evaluation, prepared.stages),
            "unseen-sites": _held_out("test", evaluation, prepared.unseen),
        }
        if not all(self.held_out["test"]):
            raise ConfigError(
                "no test row: nothing could be scored; add rows with split `test`, or, if rows name none, set data.test_share"
            )
        self._check_room()

    @property
    def cast(self) -> Cast:
        """The sites that take part."""
        return cast_of(self._prepared.recipe, self.stages)

    def _encoded(self, stage: Sites, number: int) -> dict[str, list[Example]]:
        """Training examples by site; rows that do not fit are counted."""
        encoded = {name: self.formatter.encode_all(held["train"]) for name, held in stage.rows.items()}
        for name, rows in encoded.items():
            if stage.rows[name]["train"] and not rows:
                where = f" of stage {number}" if len(self._prepared.stages) > 1 else ""
                limit = self._prepared.recipe.data.max_length
                raise ConfigError(f"site {name}: none of its rows{where} fits into data.max_length = {limit} tokens")
        return encoded

    def _check_room(self) -> None:
        """Raise DataError now for a held-out row whose prompt would have no room before its answer when it is scored."""
        evaluation, trial = self._prepared.recipe.evaluation, formatter_of(self._model, self._prepared)
        if self._model.kind != "causal" or not evaluation.generate:
            return
        for record in (r for held in self.held_out.values() for rows in held[-1:] for r in rows if not r.labels):
            try:
                trial.prompt_ids(record, evaluation.max_new_tokens)
            except DataError as error:
                raise DataError(f"{error}, or lower evaluation.max_new_tokens = {evaluation.max_new_tokens}") from error

    def notes(self) -> Iterator[str]:
        """What was done to the training rows that the user should know."""
        counts, limit = self.formatter.counts, self._prepared.recipe.data.max_length
        for what, text in (("truncated", "had their text shortened"), ("dropped", "were left out: their answer is too long")):
            if counts[what]:
                yield f"{counts[what]} training rows {text} (data.max_length = {limit} tokens)"
        if counts["last only"]:
            yield (
                f"{counts['last only']} talks are learnt in their last answer alone: the chat template writes earlier ones "
                f"otherwise than they stand in the row"
            )


def _held_out(split: str, evaluation: Evaluation, stages: Sequence[Sites]) -> list[list[Record]]:
    """The rows to score after each stage: one choice for the whole run, each stage seeing what has arrived by then."""
    chosen = {r.id for r in choose(stages[-1].all(split), split, evaluation.limit(split))}
    found = [[r for r in stage.all(split) if r.id in chosen] for stage in stages]
    return [choose(rows, split, 0) for rows in found]
