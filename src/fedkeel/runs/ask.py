"""Questions to a finished run: its base and its federated model answer the same, each going by what it said itself before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from fedkeel.data.batches import collate
from fedkeel.data.format import Example, Formatter
from fedkeel.model.generate import generate
from fedkeel.model.lora import Model
from fedkeel.recipe.schema import Recipe
from fedkeel.rng import seed_torch
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.served import trained_model
from fedkeel.scores.evaluate import label_log_likelihoods
from fedkeel.types import FedKeelError, Record

WHO = ("base", "federated")
LONGEST = 4096  # tokens of a prompt and its answer, where the base itself sets no lower bound

Turn = tuple[str, str]  # (role, text)


class Heard(BaseStreamer):
    """Tells the answer so far, after each token of it."""

    def __init__(self, tokenizer: Any, told: Callable[[str], None]) -> None:
        self._tokenizer, self._told, self._begun = tokenizer, told, False
        self._ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate`: once with what stands before the answer, then with each token."""
        if self._begun:
            self._ids += value.flatten().tolist()
            text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
            self._told(text.removesuffix("\N{REPLACEMENT CHARACTER}"))  # half of a character is told with its other half
        self._begun = True

    def end(self) -> None:
        """Called by `generate` behind the last token."""


class Ask:
    """The two models of one run. recipe, folder: of the run, which has ended in one adapter. which: see `served.serve`."""

    def __init__(self, recipe: Recipe, folder: Path, which: str = "adapter") -> None:
        self.model = trained_model(recipe, folder, which)
        # what is added to the base's own maps cannot be switched off
        self._base = Model(recipe.model, recipe.lora, recipe.seed, self.model.classes) if self.model.shifts else self.model
        longest = min(LONGEST, self.model.positions or LONGEST)
        self._formatter = Formatter(
            self.model.tokenizer, self.model.kind, longest, recipe.data.list_labels, classes=self.model.classes
        )
        self._seed = recipe.seed
        self.tasks = RunFolder(folder).tasks()

    @property
    def remembers(self) -> bool:
        """Whether a question is taken with those before it: the base has a template for chats."""
        return self.model.kind == "causal" and self.model.tokenizer.chat_template is not None

    @contextmanager
    def _speaking(self, who: str) -> Iterator[Model]:
        if who == "federated":
            yield self.model
        else:
            with self._base.net.disable_adapter():
                yield self._base

    @torch.no_grad()
    def answer(
        self, who: str, turns: Sequence[Turn], tokens: int, temperature: float = 0.0, told: Callable[[str], None] = print
    ) -> str:
        """What `who` of WHO says to the last of `turns`, those before it in mind where it `remembers`.

        tokens: at most, of the answer. temperature: 0 takes the likeliest token each time. told: called with the answer so far.
        Raises FedKeelError for a prompt that leaves no room for `tokens`.
        """
        question = turns[-1][1]
        if not question.strip():
            raise FedKeelError("the question is empty")
        with self._speaking(who) as model, model.autocast():
            if model.kind == "classifier":
                text = self._classes(model, question, who)
                told(text)
                return text
            heard = Heard(model.tokenizer, told)
            ids = torch.tensor([self._prompt(turns, tokens)], device=model.device)
            seed_torch(self._seed, "ask")
            ends = self._formatter.ends(Record("asked", "asked", "test", "", input=question))
            (new,) = generate(model, (ids, torch.ones_like(ids)), ends, tokens, temperature, heard)
        return self._formatter.said(Record("asked", "asked", "test", "", input=question), new.tolist())

    @torch.no_grad()
    def answer_as(self, who: str, task: str, text: str, tokens: int, told: Callable[[str], None] = print) -> str:
        """What `who` says to `text` as the input of a row of `task`: behind its instruction, and where it has labels, the three
        likeliest with their shares. Raises FedKeelError for a task that the run did not learn."""
        if task not in self.tasks:
            known = ", ".join(self.tasks) or "none, as it ran elsewhere or before they were kept"
            raise FedKeelError(f"task {task!r} is not among those that this run learnt: {known}")
        if not text.strip():
            raise FedKeelError("the question is empty")
        about = self.tasks[task]
        labels = tuple(about["labels"])
        record = Record("asked", task, "test", labels[0] if labels else "", about["instruction"], text, labels=labels)
        with self._speaking(who) as model, model.autocast():
            if labels and model.kind != "classifier":
                answers = self._formatter.label_ids(record)
                prompt = self._formatter.prompt_ids(record, max(map(len, answers)))
                (likelihoods,) = label_log_likelihoods(model, [prompt], [answers])
                told_by = self._beside(who, task, labels, prompt, torch.tensor(likelihoods, dtype=torch.float64))
                said = _likeliest(labels, told_by.softmax(0))
                told(said)
                return said
            if labels:
                said = self._classes(model, text, who, task, labels)
                told(said)
                return said
        asked = "\n".join(part for part in (about["instruction"], text) if part)
        return self.answer(who, [("user", asked)], tokens, told=told)

    def _prompt(self, turns: Sequence[Turn], room: int) -> tuple[int, ...]:
        said = (*turns, ("assistant", "")) if self.remembers and len(turns) > 1 else ()  # a long talk loses its beginning
        record = Record("asked", "asked", "test", "", input="" if said else turns[-1][1], messages=said)
        before = self._formatter.counts["truncated"]
        ids = self._formatter.prompt_ids(record, room)
        if self._formatter.counts["truncated"] > before:
            raise FedKeelError(
                f"the prompt and {room} tokens of an answer are over the {self._formatter.max_length} of this base"
            )
        return ids

    def _classes(self, model: Model, question: str, who: str, task: str = "", labels: Sequence[str] = ()) -> str:
        """The three likeliest classes, of a task's own or of all, with their shares."""
        names = labels or model.classes
        ids = tuple(model.tokenizer(question, truncation=True, max_length=self._formatter.max_length)["input_ids"])
        of = task or (next(iter(self.tasks)) if len(self.tasks) == 1 else "asked")
        by = of if who == "federated" else "asked"  # the base goes by the classes' words, whatever the adapter was trained for
        example = Example("asked", by, ids, target=0, allowed=tuple(model.classes.index(name) for name in names))
        logits = model.forward(collate([example], model.kind, model.tokenizer.pad_token_id, len(model.classes))).logits
        own = logits.float()[0, list(example.allowed)]
        return _likeliest(names, self._beside(who, task, names, ids, own).softmax(-1))

    def _beside(self, who: str, task: str, labels: Sequence[str], prompt: Sequence[int], own: torch.Tensor) -> torch.Tensor:
        """Scores of labels, with what is served beside the federated adapter."""
        beside = self.model.beside
        if who != "federated" or task not in beside.heads:
            return own
        return beside.together(own, task, labels, self.model.features([prompt])[0])


def _likeliest(names: Sequence[str], shares: torch.Tensor) -> str:
    """The first three, with their shares."""
    return ", ".join(f"{names[k]} ({float(shares[k]):.0%})" for k in shares.argsort(descending=True)[:3].tolist())
