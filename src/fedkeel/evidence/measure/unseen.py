"""Tasks that no site trained on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedkeel.data.sources import files, unique_ids
from fedkeel.evidence.measure.run import Finished, MeasureError, Settings, UnmeasuredError, digest
from fedkeel.model.lora import Model
from fedkeel.recipe.schema import Data
from fedkeel.runs.encode import formatter_of
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.prepare import Prepared
from fedkeel.runs.served import serve
from fedkeel.scores.evaluate import choose, overall, score, task_table
from fedkeel.types import Record, Row


def unseen_records(settings: Settings, prepared: Prepared) -> list[Record]:
    """Test rows of the file of unseen tasks, at most `rows` a task; a row without a split is a test row.

    Raises MeasureError where no row is of a task that no site trained on.
    """
    assert settings.unseen is not None
    tasks_file = str(settings.unseen_tasks.absolute()) if settings.unseen_tasks else ""
    data = Data(source="jsonl", files=(str(settings.unseen.absolute()),), tasks_file=tasks_file)
    records = [replace(r, split=r.split or "test") for r in files(data)]
    trained = {r.task for r in prepared.sites.all("train")}
    found = choose(unique_ids([r for r in records if r.task not in trained]), "test", settings.rows)
    if not found:
        raise MeasureError(
            f"{settings.unseen}: no test row of a task that no site trained on; its tasks are "
            f"{', '.join(sorted({r.task for r in records})[:10])}"
        )
    return found


def about(settings: Settings) -> dict[str, Any] | None:
    """See `tables.Measure`."""
    if not settings.unseen:
        return None
    tasks = digest([settings.unseen_tasks]) if settings.unseen_tasks else ""
    return {"file": digest([settings.unseen]), "tasks": tasks, "rows": settings.rows}


def unseen(run: Finished) -> list[Row]:
    """Scores of the base and of the federated model on tasks that no site trained on."""
    if run.model.linear_head:
        raise UnmeasuredError("not measured, as a linear head has no output for classes that it was not trained on")
    recipe, model = run.recipe, run.model
    records = unseen_records(run.settings, run.prepared)
    if model.kind == "classifier":  # the answers of other tasks are other classes
        records = [r for r in records if r.labels]
        classes = tuple(sorted({label for r in records for label in r.labels}))
        if not classes:
            raise MeasureError(f"{run.settings.unseen}: no row has labels, and {recipe.model.base!r} is a classifier")
        model = Model(recipe.model, recipe.lora, recipe.seed, classes)
    formatter, done, rows = formatter_of(model, run.prepared), 0, []

    def advance(count: int) -> None:
        nonlocal done
        done += count
        run.watch("unseen", done, 2 * len(records))

    model.rewind()
    with model.net.disable_adapter():
        before = score(model, formatter, records, recipe.evaluation, advance)
    serve(model, RunFolder(run.folder), run.prepared.recipe)
    after = score(model, formatter, records, recipe.evaluation, advance)
    for method, scored in (("base", before), ("federated", after)):
        for task, metrics in task_table(scored).items():
            rows.append(run.row("score", metrics["score"], "share", split="unseen", task=task, method=method))
            rows.append(run.row("rows", metrics["rows"], "rows", split="unseen", task=task, method=method))
        rows.append(run.row("score", overall(scored), "share", split="unseen", method=method))
    return rows
