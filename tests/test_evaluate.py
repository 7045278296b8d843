"""Scores against a plain forward of every (prompt, answer) pair and a token-by-token decoding loop, all unpadded."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from shapes import ARCHITECTURES, CAUSAL, ENCODERS, SEQ2SEQ, base, chosen, make, randomise

from fedkeel.data.batches import collate
from fedkeel.data.format import Example, Formatter
from fedkeel.model.lora import Model
from fedkeel.recipe.schema import Evaluation
from fedkeel.rng import derive
from fedkeel.scores import evaluate, trie
from fedkeel.scores.evaluate import Scored, _foretold, choose, label_log_likelihoods, score, task_table
from fedkeel.scores.trie import tree
from fedkeel.types import Record

LANGUAGE = chosen(CAUSAL, SEQ2SEQ)
LABELS = ("yes", "no", "a rather longer answer, in words", "42", "maybe")
TEXTS = (
    "What?",
    "the boat turns and the captain, who is old, says no word about it to the crew",
    "soup of lentils",
    "is it so, or is it not so",
)


@cache
def prepared(name: str) -> tuple[Model, Formatter]:
    """A model with a non-zero adapter, and the formatter for it; nothing here changes either."""
    classes = LABELS if ARCHITECTURES[name][0] == "classifier" else ()
    model = make(name, classes)
    randomise(model, seed=8)
    model.train(False)
    return model, Formatter(model.tokenizer, model.kind, 200, classes=model.classes)


def rows(count: int = 4, labels: tuple[str, ...] = LABELS) -> list[Record]:
    """`count` rows whose prompts have different lengths and whose label lists do too."""
    made = []
    for n in range(count):
        own = labels[: 2 + n % 4] if labels else ()
        output = own[n % len(own)] if own else TEXTS[-1 - n % 4]
        made.append(Record(f"row-{n}", f"task-{n % 2}", "test", output, "Say it.", f"{TEXTS[n % 4]} {n}", labels=own))
    return made


@torch.no_grad()
def pair_logits(model: Model, prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
    """The slow twin, in front of each token of the answer: one unpadded forward of one pair, all positions, no cache."""
    if model.kind == "seq2seq":
        decoder = torch.tensor([[model.net.config.decoder_start_token_id, *answer[:-1]]])
        return model.net(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder, use_cache=False).logits[0]
    return model.net(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]


def pair_log_likelihood(model: Model, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    logits = pair_logits(model, prompt, answer)
    return float(logits.double().log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)].sum())


@pytest.mark.parametrize("sequences", [256, 2])
@pytest.mark.parametrize("name", LANGUAGE)
def test_label_likelihoods_equal_a_plain_forward_of_every_pair(
    name: str, sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "SEQUENCES", sequences)
    model, formatter = prepared(name)
    answers = [[formatter.answer_ids(r, label) for label in r.labels] for r in rows()]
    answers[0].append(answers[0][1][:1])  # of one token: nothing of it is behind the cached prompt
    prompts = [formatter.prompt_ids(r, 20) for r in rows()]
    assert len({len(p) for p in prompts}) == 4
    assert max(map(len, prompts)) > 12  # beyond the sliding window of the models that have one
    found = label_log_likelihoods(model, prompts, answers)
    expected = [[pair_log_likelihood(model, p, a) for a in options] for p, options in zip(prompts, answers, strict=True)]
    assert [len(f) for f in found] == [3, 3, 4, 5]
    for f, e in zip(found, expected, strict=True):
        assert f == pytest.approx(e, abs=1e-4, rel=1e-5)
    assert torch.tensor([v for e in expected for v in e]).std() > 1


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_likeliest_label_is_the_prediction_for_any_batch_size(name: str) -> None:
    model, formatter = prepared(name)
    records = rows(9)
    expected, chances = [], []
    for record in records:
        prompt = formatter.prompt_ids(record, 20)
        values = [pair_log_likelihood(model, prompt, formatter.answer_ids(record, v)) for v in record.labels]
        expected.append(record.labels[values.index(max(values))])
        weights = [math.exp(v - max(values)) for v in values]
        chances.append([w / sum(weights) for w in weights])
    for batch_size in (1, 4, 32):
        counted: list[int] = []
        scored = score(model, formatter, records, Evaluation(batch_size=batch_size), counted.append)
        assert [s.record for s in scored] == records
        assert [s.prediction for s in scored] == expected
        assert [s.metrics for s in scored] == [
            {"accuracy": float(p == r.output)} for p, r in zip(expected, records, strict=True)
        ]
        for one, chance in zip(scored, chances, strict=True):
            assert one.distribution == pytest.approx(chance, abs=1e-4)
        assert (sum(counted), max(counted)) == (9, min(batch_size, 9))


@torch.no_grad()
def greedy(model: Model, prompt: tuple[int, ...], ends: set[int], most: int) -> list[int]:
    """The slow twin of generation: the whole text again for every token, unpadded and without a cache."""
    new: list[int] = []
    start = [] if model.kind == "causal" else [model.net.config.decoder_start_token_id]
    while len(new) < most and not (new and new[-1] in ends):
        if model.kind == "causal":
            logits = model.net(input_ids=torch.tensor([[*prompt, *new]]), use_cache=False).logits
        else:
            decoder = torch.tensor([start + new])
            logits = model.net(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder, use_cache=False).logits
        new.append(int(logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("name", LANGUAGE)
def test_generation_equals_a_token_by_token_loop_for_any_batch_size(name: str) -> None:
    model, formatter = prepared(name)
    records = rows(5, labels=())
    end = formatter.answer_ids(records[0], "x")[-1]
    assert model.tokenizer.convert_ids_to_tokens(end) in ("<|endoftext|>", "</s>", "<|im_end|>", "<|eot_id|>")
    expected = []
    for record in records:
        new = greedy(model, formatter.prompt_ids(record, 10), {end, model.tokenizer.eos_token_id}, 10)
        expected.append(model.tokenizer.decode(new, skip_special_tokens=True).strip())
    assert len(set(expected)) > 1
    for batch_size in (1, 3, 8):
        scored = score(model, formatter, records, Evaluation(batch_size=batch_size, max_new_tokens=10))
        assert [s.record for s in scored] == records
        assert [s.prediction for s in scored] == expected
        assert [s.distribution for s in scored] == [()] * 5


@pytest.mark.parametrize("name", chosen(["llama", "gpt2", "bart"]))
def test_generation_stops_behind_the_end_of_an_answer(name: str) -> None:
    """Trained by hand until the answer is known by heart; what comes behind its end must not be read."""
    model = make(name)
    formatter = Formatter(model.tokenizer, model.kind, 200)
    record = Record("r", "t", "test", "near the river", "Say it.", "the red house")
    batch = collate([formatter.encode(record)], model.kind, model.tokenizer.pad_token_id)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        forward = model.forward(batch)
        loss = torch.nn.functional.cross_entropy(forward.logits, forward.targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert torch.equal(forward.logits.argmax(-1), forward.targets)
    found = score(model, formatter, [record], Evaluation(max_new_tokens=30))[0]
    loss = torch.nn.functional.cross_entropy(model.forward(batch).logits, forward.targets).item()
    assert found.prediction == "near the river"
    assert found.metrics == {"rouge_l": 1.0, "exact_match": 1.0, "nats": pytest.approx(loss, rel=1e-3)}


def test_a_template_without_an_end_marker_does_not_end_answers_at_the_letter_x(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end is found by asking for the answer "x": where a template ends no turn, that is no end."""
    model = make("qwen3")
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    formatter = Formatter(model.tokenizer, model.kind, 200)
    asked: list[list[int]] = []

    def generate(**options: Any) -> torch.Tensor:
        asked.append(options["eos_token_id"])
        return options["input_ids"]

    monkeypatch.setattr(model.net, "generate", generate)
    score(model, formatter, rows(1, labels=()), Evaluation(max_new_tokens=4))
    assert asked == [[model.tokenizer.eos_token_id]]


@pytest.mark.parametrize("name", chosen(ENCODERS))
def test_an_encoder_predicts_among_the_labels_of_the_row(name: str) -> None:
    model, formatter = prepared(name)
    records = rows(9)
    free = dataclasses.replace(records[0], id="free", labels=())
    records[3] = dataclasses.replace(records[3], labels=tuple(reversed(records[3].labels)))  # in the record's order
    expected, chances = [], []
    for record in records:
        example = Example("", "", formatter.encode(record).ids, target=0)
        with torch.no_grad():
            hidden = model.net(input_ids=torch.tensor([example.ids])).last_hidden_state[0].mean(0)
        assert model.label_text is not None
        cosines = (torch.nn.functional.normalize(hidden, dim=0) @ model.label_text.embeddings.T).tolist()
        expected.append(max(record.labels, key=lambda label: cosines[LABELS.index(label)]))
        weights = [math.exp(20 * cosines[LABELS.index(label)]) for label in record.labels]
        chances.append([w / sum(weights) for w in weights])
    for batch_size in (1, 4):
        scored = score(model, formatter, [*records, free], Evaluation(batch_size=batch_size))
        # a row without labels is nothing that an encoder could answer
        assert [(s.record, s.prediction) for s in scored] == list(zip(records, expected, strict=True))
        assert [s.metrics["accuracy"] for s in scored] == [p == r.output for p, r in zip(expected, records, strict=True)]
        for one, chance in zip(scored, chances, strict=True):
            assert one.distribution == pytest.approx(chance, abs=1e-4)


def test_a_generated_answer_counts_against_its_best_reference() -> None:
    model, formatter = prepared("gpt2")
    record = rows(1, labels=())[0]
    said = score(model, formatter, [record], Evaluation(max_new_tokens=12))[0].prediction
    assert said

    def metrics(*references: str) -> dict[str, float]:
        row = dataclasses.replace(record, output="zzz qqq", references=references)
        metrics = score(model, formatter, [row], Evaluation(max_new_tokens=12))[0].metrics
        return {name: value for name, value in metrics.items() if name != "nats"}

    assert metrics("something else", said.upper() + " !") == {"rouge_l": pytest.approx(1.0), "exact_match": 1.0}
    assert metrics("something else", said + " and much more") == {
        "rouge_l": pytest.approx(metrics(said + " and much more")["rouge_l"]),
        "exact_match": 0.0,
    }
    # without references the row's own answer is the only one
    assert metrics() == {"rouge_l": 0.0, "exact_match": 0.0}


STEERING: dict[str, Any] = {
    "min_new_tokens": 9,
    "min_length": 30,
    "max_length": 2,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "repetition_penalty": 9.0,
    "encoder_repetition_penalty": 9.0,
    "num_beams": 3,
    "do_sample": True,
    "temperature": 5.0,
    "eos_token_id": [5, 6, 7, 8, 9],
    "bad_words_ids": [[n] for n in range(40, 120)],
    "suppress_tokens": list(range(40, 120)),
    "begin_suppress_tokens": list(range(40, 200)),
    "sequence_bias": [[[50], 99.0]],
    "forced_bos_token_id": 50,
    "forced_eos_token_id": 51,
    "decoder_start_token_id": 50,
    "exponential_decay_length_penalty": [1, 9.0],
    "use_cache": False,
}


@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_the_bases_own_settings_of_generation_change_no_score(name: str, tmp_path: Path) -> None:
    records = [*rows(2), *rows(3, labels=())]
    records = [dataclasses.replace(r, id=f"{r.id}-{n}") for n, r in enumerate(records)]
    how = Evaluation(max_new_tokens=8)

    def scored(folder: Path, seed: int) -> list[tuple[str, dict[str, float]]]:
        model = make(name, base=str(folder))
        randomise(model, seed=seed)
        formatter = Formatter(model.tokenizer, model.kind, 200)
        before = model.net.generation_config
        found = [(s.prediction, s.metrics) for s in score(model, formatter, records, how)]
        assert model.net.generation_config is before
        return found

    plain = shutil.copytree(base(name), tmp_path / "plain")
    (plain / "generation_config.json").unlink(missing_ok=True)
    # an adapter under which something is said: what a tiny random model says depends on the tests that drew before
    seed = next(n for n in range(99) if any(said for said, metrics in scored(plain, n) if "rouge_l" in metrics))
    wanted = scored(plain, seed)
    for key, value in STEERING.items():
        steered = shutil.copytree(plain, tmp_path / key)
        (steered / "generation_config.json").write_text(json.dumps({key: value}))
        assert scored(steered, seed) == wanted, key


@pytest.mark.parametrize("name", chosen(["llama", "gpt2", "t5"]))
def test_free_text_has_the_loss_of_its_given_answer(name: str) -> None:
    model, formatter = prepared(name)
    records = rows(5, labels=())
    answers = [formatter.answer_ids(r, r.output) for r in records]
    losses = [-pair_log_likelihood(model, formatter.prompt_ids(r, 12), a) for r, a in zip(records, answers, strict=True)]
    for generate in (True, False):
        scored = score(model, formatter, records, Evaluation(generate=generate, max_new_tokens=12, batch_size=3))
        for one, loss, answer in zip(scored, losses, answers, strict=True):
            assert one.tokens == len(answer)
            assert one.metrics["nats"] == pytest.approx(loss / len(answer), rel=1e-4)
            if not generate:
                assert one.metrics.keys() == {"nats", "token_accuracy"}
                likeliest = pair_logits(model, formatter.prompt_ids(one.record, 12), answer).argmax(-1).tolist()
                assert one.score == sum(a == b for a, b in zip(likeliest, answer, strict=True)) / len(answer)
        # a task's loss is that of all its tokens, whichever row they are of
        for task, metrics in task_table(scored).items():
            own = [(loss, len(a)) for r, loss, a in zip(records, losses, answers, strict=True) if r.task == task]
            assert metrics["nats"] == pytest.approx(sum(loss for loss, _ in own) / sum(n for _, n in own), rel=1e-4)
            assert metrics["score"] == pytest.approx(sum(s.score for s in scored if s.record.task == task) / len(own))


@pytest.mark.parametrize("name", chosen(["llama", "t5"]))
def test_tokens_that_are_the_likeliest_are_counted(name: str) -> None:
    """Answers that go along with the model in 0, 1, 2, … of their six tokens."""
    model, formatter = prepared(name)
    examples = []
    for n, record in enumerate(rows(5, labels=())):
        prompt, answer = formatter.prompt_ids(record, 12), [7, 8, 9, 7, 8, 9]
        for place in range(n):
            answer[place] = int(pair_logits(model, prompt, tuple(answer))[place].argmax())
        rest = pair_logits(model, prompt, tuple(answer)).argmax(-1).tolist()
        assert not any(a == b for a, b in zip(rest[n:], answer[n:], strict=True))
        given = {"decoder": tuple(answer)} if model.kind == "seq2seq" else {}
        ids = prompt if given else (*prompt, *answer)
        examples.append(Example(record.id, "task", ids, (False,) * len(prompt) + (True,) * (len(ids) - len(prompt)), **given))
    with torch.no_grad():
        assert [hits for _, hits in _foretold(model, examples)] == [0, 1, 2, 3, 4]


def test_an_answer_that_does_not_fit_loses_its_end() -> None:
    model, _ = prepared("llama")
    formatter = Formatter(model.tokenizer, model.kind, 40)
    record = dataclasses.replace(rows(1, labels=())[0], output=" ".join(TEXTS))
    prompt, answer = formatter.prompt_ids(record, 8), formatter.answer_ids(record, record.output)
    assert len(prompt) + len(answer) > 40
    found = score(model, formatter, [record], Evaluation(generate=False, max_new_tokens=8))[0]
    assert found.tokens == 40 - len(prompt)
    kept = pair_log_likelihood(model, prompt, answer[: found.tokens])
    assert found.metrics["nats"] == pytest.approx(-kept / found.tokens, rel=1e-4)


def test_trees_work_with_eager_attention_too() -> None:
    model = make("llama")
    randomise(model)
    model.net.set_attn_implementation("eager")
    formatter = Formatter(model.tokenizer, model.kind, 200)
    prompts = [formatter.prompt_ids(r, 20) for r in rows()]
    answers = [[formatter.answer_ids(r, label) for label in r.labels] for r in rows()]
    found = label_log_likelihoods(model, prompts, answers)
    for prompt, options, values in zip(prompts, answers, found, strict=True):
        assert values == pytest.approx([pair_log_likelihood(model, prompt, a) for a in options], abs=1e-4, rel=1e-5)


def test_a_tree_runs_what_answers_share_once() -> None:
    one = tree((7, 8), [(1, 2, 3), (1, 2, 4), (1, 5), (6,)])
    assert one.ids == (7, 8, 1, 2)  # no answer's last token is read, and 1, 2 stand once
    assert one.above == (1, 2)
    assert one.positions == (0, 1, 2, 3)
    assert sorted(one.asked) == [
        (1, 1, 0),
        (1, 1, 1),
        (1, 1, 2),
        (1, 6, 3),
        (2, 2, 0),
        (2, 2, 1),
        (2, 5, 2),
        (3, 3, 0),
        (3, 4, 1),
    ]
    fork = tree((7,), [(1, 2), (3, 4)])
    assert fork.ids == (7, 1, 3)
    assert fork.positions == (0, 1, 1)
    assert fork.sees().tolist() == [[True, False, False], [True, True, False], [True, False, True]]


@pytest.mark.parametrize("positions", [1, 5, 1000])
def test_rows_go_through_in_parts_that_change_nothing(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trie, "POSITIONS", positions)
    model, formatter = prepared("llama")
    prompts = [formatter.prompt_ids(r, 20) for r in rows(6)]
    answers = [[formatter.answer_ids(r, label) for label in r.labels] for r in rows(6)]
    for prompt, options, values in zip(prompts, answers, label_log_likelihoods(model, prompts, answers), strict=True):
        assert values == pytest.approx([pair_log_likelihood(model, prompt, a) for a in options], abs=1e-4, rel=1e-5)


def test_dropout_is_off_while_scoring() -> None:
    model = make("llama", dropout=0.9)
    randomise(model)
    formatter = Formatter(model.tokenizer, model.kind, 200)
    prompts = [formatter.prompt_ids(r, 20) for r in rows()]
    answers = [[formatter.answer_ids(r, label) for label in r.labels] for r in rows()]
    model.train()
    assert label_log_likelihoods(model, prompts, answers) != label_log_likelihoods(model, prompts, answers)
    score(model, formatter, rows(), Evaluation())
    assert label_log_likelihoods(model, prompts, answers) == label_log_likelihoods(model, prompts, answers)


def test_task_table_by_hand() -> None:
    def one(task: str, **metrics: float) -> Scored:
        return Scored(Record("r", task, "test", "a"), "p", metrics)

    scored = [
        one("topic", accuracy=1.0),
        one("sums", rouge_l=0.5, exact_match=0.0),
        one("topic", accuracy=0.0),
        one("topic", accuracy=0.0),
        one("sums", rouge_l=1.0, exact_match=1.0),
        one("topic", accuracy=0.0),
    ]
    table = task_table(scored)
    assert table == {
        "sums": {"rouge_l": 0.75, "exact_match": 0.5, "score": 0.75, "rows": 2.0},
        "topic": {"accuracy": 0.25, "score": 0.25, "rows": 4.0},
    }
    assert list(table) == ["sums", "topic"]
    assert task_table([]) == {}


def test_choose_takes_as_many_of_each_task_by_hash_whatever_the_order() -> None:
    sizes = {"a": 7, "b": 2, "c": 4}
    records = [Record(f"{t}{n}", t, "test", "x") for t, size in sizes.items() for n in range(size)]
    records += [Record(f"v{n}", "a", "validation", "x") for n in range(5)]

    def first(task: str, limit: int) -> set[str]:
        """By hand: the ids with the smallest hashes."""
        return set(sorted((f"{task}{n}" for n in range(sizes[task])), key=lambda i: derive(0, "evaluation", i))[:limit])

    chosen = choose(records, "test", 3)
    assert {r.id for r in chosen} == first("a", 3) | first("b", 3) | first("c", 3)
    assert len(chosen) == 3 + 2 + 3
    for seed in range(5):
        assert choose(random.Random(seed).sample(records, len(records)), "test", 3) == chosen
    # rows added elsewhere, as another site's are, change nothing for a task
    assert [r for r in chosen if r.task == "a"] == choose([r for r in records if r.task == "a"], "test", 3)
    assert len(choose(records, "test", 0)) == 13
    assert {r.id for r in choose(records, "validation", 0)} == {f"v{n}" for n in range(5)}
    assert {r.id for r in choose(records, "test", 2)} < {r.id for r in chosen}
