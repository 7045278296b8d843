"""A model's score on held-out rows: by the likelihood of each label's text, or by greedy decoding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedkeel import tables
from fedkeel.data.batches import collate, padded
from fedkeel.data.format import Example, Formatter
from fedkeel.model.features import chances
from fedkeel.model.generate import generate
from fedkeel.model.lora import Model
from fedkeel.recipe.schema import Evaluation
from fedkeel.rng import derive
from fedkeel.scores.metrics import macro, mean
from fedkeel.scores.trie import over_trees, parts, tree
from fedkeel.types import Record

# Sequences scored at once behind cached prompts: bounds memory however many labels a task has.
SEQUENCES = 256


@dataclass(frozen=True)
class Scored:
    """One row's outcome. metrics: by name, see `tables.METRICS`. tokens: of a given free answer.

    distribution: the probability of each of the record's labels, in their order, with sum 1: softmax of a classifier's
    logits over the classes that the row allows, or of the log likelihoods of the labels' texts; empty for generation.
    """

    record: Record
    prediction: str
    metrics: dict[str, float]
    distribution: tuple[float, ...] = ()
    tokens: int = 0

    @property
    def score(self) -> float:
        """The metric that counts, in [0, 1]: accuracy; for free text ROUGE-L, or its token accuracy if none was generated."""
        return next((self.metrics[name] for name, m in tables.METRICS.items() if m.counts and name in self.metrics), 0.0)


def judged(of: str, *told: Any) -> dict[str, float]:
    """Every metric of one kind on one answer. of, told: see `tables.Metric`."""
    return {name: float(m.load()(*told)) for name, m in tables.METRICS.items() if m.of == of}


def weight_of(name: str, scored: Scored) -> float:
    """What a row counts in the mean of a metric."""
    return float(scored.tokens) if tables.by_token(name) else 1.0


def choose(records: Sequence[Record], split: str, limit: int) -> list[Record]:
    """The rows of `split`, at most `limit` a task (0: all): the first by a hash of their ids, so the same for every method."""
    ordered = sorted((r for r in records if r.split == split), key=lambda r: (r.task, derive(0, "evaluation", r.id)))
    kept, count = [], 0
    for index, record in enumerate(ordered):
        count = count + 1 if index and ordered[index - 1].task == record.task else 1
        if not limit or count <= limit:
            kept.append(record)
    return kept


@torch.no_grad()
def score(
    model: Model,
    formatter: Formatter,
    records: Sequence[Record],
    config: Evaluation,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[Scored]:
    """Score every record, in the order given. advance: called with the number of rows after each batch."""
    model.train(False)
    labelled = [r for r in records if r.labels]
    free = [r for r in records if not r.labels]
    found: dict[str, Scored] = {}
    if model.beside.alone:
        _by_head(model, formatter, [r for r in labelled if r.task in model.beside.heads], found, advance)
        labelled = [r for r in labelled if r.task not in model.beside.heads]
    with model.autocast():
        if model.kind == "classifier":
            _classify(model, formatter, labelled, config, found, advance)
        else:
            _by_likelihood(model, formatter, labelled, config, found, advance)
            if config.generate:
                _generate(model, formatter, free, config, found, advance)
            _free_text(model, formatter, free, config, found, lambda rows: None if config.generate else advance(rows))
    return [found[r.id] for r in records if r.id in found]


def _classify(
    model: Model,
    formatter: Formatter,
    records: Sequence[Record],
    config: Evaluation,
    found: dict[str, Scored],
    advance: Callable[[int], None],
) -> None:
    pairs = sorted(((formatter.encode(r), r) for r in records), key=lambda p: (p[0].length, p[1].id))
    for start in range(0, len(pairs), config.batch_size):
        chunk = pairs[start : start + config.batch_size]
        batch = collate([e for e, _ in chunk], model.kind, model.tokenizer.pad_token_id, len(model.classes))
        logits = model.forward(batch).logits.float()
        for row, features in _beside(model, [(e.prompt, r) for e, r in chunk]):
            example, record = chunk[row]
            at = torch.tensor(example.allowed, device=logits.device)
            logits[row, at] = model.beside.together(logits[row, at], record.task, record.labels, features)
        chances = logits.softmax(-1).tolist()
        for (example, record), index, row in zip(chunk, logits.argmax(-1).tolist(), chances, strict=True):
            prediction = model.classes[index]
            distribution = tuple(row[label] for label in example.allowed)
            found[record.id] = Scored(record, prediction, judged("labels", prediction, (record.output,)), distribution)
        advance(len(chunk))


def _by_head(
    model: Model,
    formatter: Formatter,
    records: Sequence[Record],
    found: dict[str, Scored],
    advance: Callable[[int], None],
) -> None:
    """By the analytic classifiers alone, without a pass of the whole model."""
    prompts = [_prompt(model, formatter, record) for record in records]
    for record, features in zip(records, model.features(prompts) if prompts else (), strict=True):
        (shares,) = chances(model.beside.heads[record.task], features[None], record.labels).tolist()
        prediction = record.labels[max(range(len(shares)), key=shares.__getitem__)]
        found[record.id] = Scored(record, prediction, judged("labels", prediction, (record.output,)), tuple(shares))
        advance(1)


def _prompt(model: Model, formatter: Formatter, record: Record) -> Sequence[int]:
    """What the model reads of a row with labels before its answer."""
    if model.kind == "classifier":
        return formatter.encode(record).prompt
    return formatter.prompt_ids(record, max(map(len, formatter.label_ids(record))))


def _beside(model: Model, rows: Sequence[tuple[Sequence[int], Record]]) -> list[tuple[int, Tensor]]:
    """(index, features of its prompt) of the rows whose task has a head that is served beside the adapter."""
    headed = [n for n, (_, record) in enumerate(rows) if record.task in model.beside.heads]
    return list(zip(headed, model.features([rows[n][0] for n in headed]), strict=True)) if headed else []


@torch.no_grad()
def label_log_likelihoods(
    model: Model, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """log p(answer | prompt) in nats, for each prompt and each of its candidate answers, end token included.

    Where the architecture lets it (`tables.Architecture.tree`) all candidates of a row are one tree behind its prompt, see
    `trie`. Elsewhere the prompts run once, and the candidates batched behind their cached keys and values (an encoder-decoder:
    behind its encoder's output); where a model keeps something else, such as a recurrent state, each pair runs whole. Must
    equal a plain forward of every (prompt, answer) pair; a test holds it to that.
    """
    if model.takes_trees:
        return over_trees(model, [tree(p, a) for p, a in zip(prompts, answers, strict=True)], [len(a) for a in answers])
    flat = [(row, answer) for row, options in enumerate(answers) for answer in options]
    score = _behind_encoder if model.kind == "seq2seq" else _behind_prompt if model.keeps_keys else _whole
    values = iter(score(model, prompts, flat))
    return [[next(values) for _ in options] for options in answers]


def _pick(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[n, tokens[n]], float32."""
    return logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def _chunks(flat: Sequence[Any]) -> list[tuple[int, Sequence[Any]]]:
    return [(start, flat[start : start + SEQUENCES]) for start in range(0, len(flat), SEQUENCES)]


def _behind_prompt(model: Model, prompts: Sequence[Sequence[int]], flat: Sequence[tuple[int, Sequence[int]]]) -> list[float]:
    pad, device = model.tokenizer.pad_token_id, model.device
    ids, mask = padded(prompts, pad, device, left=True)
    lengths = mask.sum(1)
    positions = model.accepts("position_ids")
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": True}
    if positions:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    rows = torch.arange(len(prompts), device=device)
    first, output = model.logits_at(inputs, rows, torch.full_like(rows, ids.shape[1] - 1))
    which = torch.tensor([row for row, _ in flat], device=device)
    totals = _pick(first[which], torch.tensor([a[0] for _, a in flat], device=device))
    longer = [n for n, (_, answer) in enumerate(flat) if len(answer) > 1]
    for _, chunk in _chunks(longer):
        index = torch.tensor(chunk, device=device)
        tokens, real = padded([flat[n][1] for n in chunk], pad, device)
        step, keep = tokens[:, :-1], real[:, 1:].bool()
        cache = copy.deepcopy(output.past_key_values)
        cache.batch_select_indices(which[index])
        inputs = {"input_ids": step, "past_key_values": cache, "use_cache": True}
        inputs["attention_mask"] = torch.cat([mask[which[index]], real[:, :-1]], 1)
        if positions:
            inputs["position_ids"] = lengths[which[index], None] + torch.arange(step.shape[1], device=device)
        at, columns = keep.nonzero(as_tuple=True)
        logits, _ = model.logits_at(inputs, at, columns)
        totals.index_add_(0, index[at], _pick(logits, tokens[:, 1:][keep]))
    return totals.tolist()


def _whole(model: Model, prompts: Sequence[Sequence[int]], flat: Sequence[tuple[int, Sequence[int]]]) -> list[float]:
    pairs = [([*prompts[row], *answer], len(answer)) for row, answer in flat]
    order = sorted(range(len(pairs)), key=lambda n: len(pairs[n][0]))
    totals = torch.zeros(len(flat), device=model.device)
    for start, stop in parts([len(pairs[n][0]) for n in order], len(prompts)):
        chunk = order[start:stop]
        ids, mask = padded([pairs[n][0] for n in chunk], model.tokenizer.pad_token_id, model.device)
        places = [
            (at, column) for at, n in enumerate(chunk) for column in range(len(pairs[n][0]) - pairs[n][1], len(pairs[n][0]))
        ]
        at, columns = (torch.tensor(column, device=model.device) for column in zip(*places, strict=True))
        logits, _ = model.logits_at({"input_ids": ids, "attention_mask": mask, "use_cache": False}, at, columns - 1)
        totals.index_add_(0, torch.tensor(chunk, device=model.device)[at], _pick(logits, ids[at, columns]))
    return totals.tolist()


def _behind_encoder(model: Model, prompts: Sequence[Sequence[int]], flat: Sequence[tuple[int, Sequence[int]]]) -> list[float]:
    pad, device = model.tokenizer.pad_token_id, model.device
    ids, mask = padded(prompts, pad, device)
    encoder = model.net.get_encoder()
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    which = torch.tensor([row for row, _ in flat], device=device)
    totals = torch.zeros(len(flat), device=device)
    for start, chunk in _chunks(flat):
        tokens, real = padded([answer for _, answer in chunk], pad, device)
        at, columns = real.nonzero(as_tuple=True)
        rows = which[start : start + len(chunk)]
        inputs: dict[str, Any] = {
            "encoder_outputs": (hidden[rows],),
            "attention_mask": mask[rows],
            "decoder_input_ids": model.shift_right(tokens),
            "use_cache": False,
        }
        logits, _ = model.logits_at(inputs, at, columns)
        totals[start : start + len(chunk)].index_add_(0, at, _pick(logits, tokens[real.bool()]))
    return totals.tolist()


def _by_likelihood(
    model: Model,
    formatter: Formatter,
    records: Sequence[Record],
    config: Evaluation,
    found: dict[str, Scored],
    advance: Callable[[int], None],
) -> None:
    encoded = []
    for record in records:
        answers = formatter.label_ids(record)
        encoded.append((formatter.prompt_ids(record, max(map(len, answers))), answers, record))
    encoded.sort(key=lambda e: (len(e[0]), e[2].id))
    for start in range(0, len(encoded), config.batch_size):
        chunk = encoded[start : start + config.batch_size]
        values = label_log_likelihoods(model, [e[0] for e in chunk], [e[1] for e in chunk])
        for row, features in _beside(model, [(prompt, record) for prompt, _, record in chunk]):
            record = chunk[row][2]
            values[row] = model.beside.together(torch.tensor(values[row]), record.task, record.labels, features).tolist()
        for (_, _, record), scores in zip(chunk, values, strict=True):
            prediction = record.labels[max(range(len(scores)), key=scores.__getitem__)]
            distribution = tuple(torch.tensor(scores, dtype=torch.float64).softmax(0).tolist())
            found[record.id] = Scored(record, prediction, judged("labels", prediction, (record.output,)), distribution)
        advance(len(chunk))


def answered(
    model: Model, formatter: Formatter, records: Sequence[Record], config: Evaluation
) -> Iterator[list[tuple[Record, tuple[int, ...], list[int]]]]:
    """Batches of (record, prompt, the likeliest tokens behind it, filled up behind their end), shortest prompts first."""
    encoded = [(formatter.prompt_ids(r, config.max_new_tokens), r) for r in records]
    encoded.sort(key=lambda e: (len(e[0]), e[1].id))
    while encoded:
        # a state that runs on through padding is another one
        alike = model.kind == "seq2seq" or model.keeps_keys
        chunk = [e for e in encoded[: config.batch_size] if alike or len(e[0]) == len(encoded[0][0])]
        del encoded[: len(chunk)]
        prompts, pad = [p for p, _ in chunk], model.tokenizer.pad_token_id
        # an encoder may count positions from its first column
        ids, mask = padded(prompts, pad, model.device, left=model.kind != "seq2seq")
        ends = sorted(set().union(*(formatter.ends(r) for _, r in chunk)))
        new = generate(model, (ids, mask), ends, config.max_new_tokens).tolist()
        yield [(record, prompt, tokens) for (prompt, record), tokens in zip(chunk, new, strict=True)]


def _generate(
    model: Model,
    formatter: Formatter,
    records: Sequence[Record],
    config: Evaluation,
    found: dict[str, Scored],
    advance: Callable[[int], None],
) -> None:
    for batch in answered(model, formatter, records, config):
        for record, _, tokens in batch:
            text = formatter.said(record, tokens)
            references = record.references or (record.output,)
            found[record.id] = Scored(record, text, judged("text", text, references))
        advance(len(batch))


def _free_text(
    model: Model,
    formatter: Formatter,
    records: Sequence[Record],
    config: Evaluation,
    found: dict[str, Scored],
    advance: Callable[[int], None],
) -> None:
    """How well each record's own answer is foretold, beside what was generated for it."""
    examples = [formatter.given(record, config.max_new_tokens) for record in records]
    pairs = sorted(zip(examples, records, strict=True), key=lambda p: (p[0].length, p[1].id))
    for start, stop in parts([e.positions for e, _ in pairs], config.batch_size):
        chunk = pairs[start:stop]
        for (example, record), (nats, hits) in zip(chunk, _foretold(model, [e for e, _ in chunk]), strict=True):
            tokens = example.positions
            metrics = judged("given", nats, hits, tokens)
            before = found.get(record.id)
            if before is not None:  # what was generated counts, and its score
                metrics = before.metrics | {name: v for name, v in metrics.items() if not tables.METRICS[name].counts}
            found[record.id] = Scored(record, before.prediction if before else "", metrics, tokens=tokens)
        advance(len(chunk))


@torch.no_grad()
def row_nats(model: Model, examples: Sequence[Example], size: int) -> torch.Tensor:
    """Nats of each example's own answer, (rows,) float64, summed over its positions. size: rows at once."""
    found: list[float] = []
    for start in range(0, len(examples), size):
        with model.autocast():
            found += [nats for nats, _ in _foretold(model, examples[start : start + size])]
    return torch.tensor(found, dtype=torch.float64)


def _foretold(model: Model, examples: Sequence[Example]) -> list[tuple[float, int]]:
    """Of each example: the nats of its supervised tokens, and how many of them are the likeliest."""
    forward = model.forward(collate(examples, model.kind, model.tokenizer.pad_token_id, len(model.classes)))
    logits, targets = forward.logits.float(), forward.targets
    nats = logits.logsumexp(-1) - logits.gather(1, targets[:, None])[:, 0]
    sums, hits = [0.0] * len(examples), [0] * len(examples)
    for row, value, hit in zip(forward.rows.tolist(), nats.tolist(), (logits.argmax(-1) == targets).tolist(), strict=True):
        sums[row] += value
        hits[row] += hit
    return list(zip(sums, hits, strict=True))


def overall(scored: Sequence[Scored]) -> float:
    """The mean over tasks of their `score`, each task counting the same."""
    return macro({task: metrics["score"] for task, metrics in task_table(scored).items()})


def over_tasks(table: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the tasks that have it, each task counting the same. table: of `task_table`."""
    found = {}
    for name in ("score", *tables.METRICS):
        per_task = {task: metrics[name] for task, metrics in table.items() if name in metrics}
        if per_task:
            found[name] = macro(per_task)
    return found


def task_table(scored: Sequence[Scored]) -> dict[str, dict[str, float]]:
    """Per task: the mean of each metric over its rows, of `nats` over their tokens, and `score`, see `Scored`, and `rows`."""
    tasks: dict[str, list[Scored]] = {}
    for one in scored:
        tasks.setdefault(one.record.task, []).append(one)
    table = {}
    for task, rows in sorted(tasks.items()):
        names = sorted({name for r in rows for name in r.metrics})
        means = {}
        for name in names:
            told = [(weight_of(name, r), r.metrics[name]) for r in rows if name in r.metrics]
            means[name] = sum(weight * value for weight, value in told) / sum(weight for weight, _ in told)
        table[task] = {**means, "score": mean([r.score for r in rows]), "rows": float(len(rows))}
    return table
