"""The task loss by evidence: labels without a row at the site, along a trie of label strings, against brute force."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import shapes
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from training import recipe_of, same_bits, setting, train

from fedkeel.data.batches import collate
from fedkeel.data.format import Example, Formatter
from fedkeel.federation.evidence import Calibration
from fedkeel.method.objective.calibrate import along, prior, restricted
from fedkeel.method.objective.task import task_loss
from fedkeel.recipe.load import load_recipe, plain
from fedkeel.recipe.schema import Evidence
from fedkeel.types import Forward, Record

LABELS = ("in", "in part", "in part only", "out", "never", "no")


@st.composite
def tasks(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[int], int]:
    """Label strings over four tokens, none the beginning of another as each ends in 9; rows of each; the right one."""
    bodies = draw(st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=2, max_size=7, unique=True))
    counts = draw(st.lists(st.integers(0, 3), min_size=len(bodies), max_size=len(bodies)))
    right = draw(st.integers(0, len(bodies) - 1))
    counts[right] += 1  # the row itself
    return [(*body, 9) for body in bodies], counts, right


@given(tasks())
def test_restricted_is_the_softmax_without_what_leads_to_absent_labels_only(made: tuple) -> None:
    """Place by place over a vocabulary of ten, each token asked for by going through all label strings."""
    labels, counts, right = made
    answer = labels[right]
    logits = torch.randn(len(answer), 10, generator=torch.Generator().manual_seed(sum(counts)), dtype=torch.float64)
    changed = logits.clone()
    for place, token, value in along(answer, labels, counts, restricted, None):
        changed[place, token] += value
    wanted = []
    for place, token in enumerate(answer):
        kept = []
        for other in range(10):
            through = [k for k, label in enumerate(labels) if label[: place + 1] == (*answer[:place], other)]
            if not through or any(counts[k] for k in through):
                kept.append(other)
        wanted.append(float(logits[place, token] - logits[place, kept].logsumexp(0)))
    assert changed.log_softmax(-1)[range(len(answer)), list(answer)].tolist() == pytest.approx(wanted, abs=1e-12)


@given(tasks())
def test_prior_is_the_labels_posterior_under_the_sites_shares(made: tuple) -> None:
    """Where label strings are all there is, shifted next-token probabilities multiply to p(label) π(label) / Σ p π: logit
    adjustment as it is for a classifier. p is uniform over labels here: next tokens have the shares of labels below them."""
    labels, counts, right = made
    options = SimpleNamespace(kappa=1.0, epsilon=0.1)
    total = 0.0
    for place, token in enumerate(labels[right]):
        here = [label for label in labels if label[:place] == labels[right][:place]]
        logits = torch.full((10,), -math.inf, dtype=torch.float64)
        for other in {label[place] for label in here}:
            logits[other] = math.log(sum(label[place] == other for label in here))
        for at, other, value in along(labels[right], labels, counts, prior, options):
            if at == place:
                logits[other] += value
        total += float(logits.log_softmax(-1)[token])
    share = (counts[right] + 0.1) / sum(n + 0.1 for n in counts)
    assert total == pytest.approx(math.log(share), abs=1e-9)


@given(tasks(), st.integers(1, 5))
def test_equal_evidence_changes_nothing(made: tuple, rows: int) -> None:
    labels, _, right = made
    counts = [rows] * len(labels)
    assert along(labels[right], labels, counts, restricted, None) == []
    found = along(labels[right], labels, counts, prior, SimpleNamespace(kappa=1.0, epsilon=0.1))
    assert all(abs(value) < 1e-12 for _, _, value in found)


def encoded(name: str, answers: Sequence[str]) -> list[Example]:
    kind, words, _ = shapes.ARCHITECTURES[name]
    formatter = Formatter(shapes.tokenizer(words), kind, 128, classes=LABELS)
    records = [Record(f"r{k}", "t", "train", a, input=f"row {k}", labels=LABELS) for k, a in enumerate(answers)]
    return [formatter.encode(record) for record in records]


def by_hand(logits: Tensor, examples: Sequence[Example], present: set[str]) -> float:
    """Mean nats a position, going through every label's tokens for every token of the vocabulary."""
    nats, at = 0.0, 0
    for example in examples:
        strings = dict(zip(example.labels, example.options, strict=True))
        answer = strings[example.label]
        for place, token in enumerate(answer):
            banned = {s[place] for s in strings.values() if len(s) > place and s[:place] == answer[:place]}
            for label in present:
                string = strings[label]
                if len(string) > place and string[:place] == answer[:place]:
                    banned.discard(string[place])
            kept = [v for v in range(logits.shape[1]) if v not in banned]
            nats -= float(logits[at, token] - logits[at, kept].logsumexp(0))
            at += 1
    assert at == len(logits)
    return nats / at


@pytest.mark.parametrize("name", ["llama", "qwen2", "t5", "bert"])
def test_a_batch_of_each_kind_of_model_against_a_loop(name: str) -> None:
    """Labels that begin alike, one of them the beginning of the next; a site with three of the six."""
    examples = encoded(name, ["in", "in part only", "never", "in"])
    kind, words, _ = shapes.ARCHITECTURES[name]
    batch = collate(examples, kind, shapes.tokenizer(words).pad_token_id, len(LABELS))
    positions = len(batch.targets)
    size = len(LABELS) if kind == "classifier" else len(shapes.tokenizer(words))
    logits = torch.randn(positions, size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    seen = Forward(logits, batch.targets, batch.rows)
    offsets = Calibration(examples, Evidence(task="restricted"))(batch, examples)
    told = float(task_loss(replace(seen, offsets=offsets)))
    assert told == pytest.approx(by_hand(logits, examples, {"in", "in part only", "never"}), abs=1e-12)
    assert told < float(task_loss(seen))
    # the site holds every label: nothing to leave out
    every = encoded(name, LABELS)
    assert Calibration(every, Evidence(task="restricted"))(batch, examples) is None


def test_no_gradient_reaches_an_absent_label_and_all_of_it_a_plain_one() -> None:
    examples = encoded("bert", ["in", "out"])
    batch = collate(examples, "classifier", 0, len(LABELS))
    logits = torch.zeros(2, len(LABELS), requires_grad=True)
    offsets = Calibration(examples, Evidence(task="restricted"))(batch, examples)
    task_loss(Forward(logits, batch.targets, batch.rows, offsets=offsets)).backward()
    absent = [k for k, label in enumerate(LABELS) if label not in ("in", "out")]
    assert logits.grad[:, absent].abs().max() == 0
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[:, [0, 3]].abs().min() > 0.1


def test_free_text_is_left_alone() -> None:
    kind, words, _ = shapes.ARCHITECTURES["qwen2"]
    formatter = Formatter(shapes.tokenizer(words), kind, 128)
    free = [formatter.encode(Record("r", "t", "train", "a line of talk", input="row"))]
    labelled = encoded("qwen2", ["in"])
    mixed = [*free, *labelled]
    batch = collate(mixed, kind, shapes.tokenizer(words).pad_token_id)
    offsets = Calibration(mixed, Evidence(task="restricted"))(batch, mixed)
    assert offsets is not None
    assert int(offsets.place.min()) >= free[0].positions  # only positions of the second row


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_site_with_every_label_trains_to_the_same_bits(name: str) -> None:
    ends = []
    for overrides in ([], ["evidence.task=restricted"]):
        model, _ = setting(name)
        examples = encoded(name, LABELS * 2)
        if name == "bert":
            model = shapes.make(name, LABELS)
        ends.append(train(model, examples, recipe_of(*overrides))[0])
    assert same_bits(*ends)


def test_absent_labels_change_the_training() -> None:
    ends = []
    for overrides in ([], ["evidence.task=restricted"], ["evidence.task=prior"], ["evidence.task=prior", "evidence.kappa=0"]):
        model, _ = setting("llama")
        ends.append(train(model, encoded("llama", ["in", "out", "no", "no", "no", "in"]), recipe_of(*overrides))[0])
    assert not same_bits(ends[0], ends[1])
    assert not same_bits(ends[0], ends[2])
    assert same_bits(ends[0], ends[3])


def test_baselines_are_without_it() -> None:
    assert plain(load_recipe(None, ["evidence.task=prior"])).evidence.task == "plain"
