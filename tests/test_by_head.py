"""Class scores of an encoder by the analytic classifiers, and the weight that validation rows choose for what is served."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import shapes
import tiny
import torch
import transformers
from safetensors.torch import load_file
from test_run import Silent, go, rows_of, same, without_time
from test_run import adapter_of as exported
from test_stream import GROUPS, LABELS, stream_data  # noqa: F401 - a fixture
from training import CLASSES, setting, whole_batch
from typer.testing import CliRunner

from fedkeel.cli import app
from fedkeel.data.batches import collate
from fedkeel.data.format import Example, Formatter
from fedkeel.exchange.codecs import EnvelopeError, open_envelope, seal
from fedkeel.exchange.messages import pack_global, unpack_global
from fedkeel.federation.evidence import known_sums
from fedkeel.method.objective import anchor
from fedkeel.model.bases import ADAPTER_FILES, ModelError
from fedkeel.model.export import save_adapter
from fedkeel.model.features import scores_of
from fedkeel.model.load import load_tokenizer
from fedkeel.model.lora import Model
from fedkeel.recipe.load import load_recipe, plain
from fedkeel.recipe.settings import ConfigError
from fedkeel.runs.ask import Ask
from fedkeel.runs.folder import RunError, RunFolder
from fedkeel.runs.legs import Leg
from fedkeel.runs.prepare import prepare
from fedkeel.runs.rounds import Loop
from fedkeel.runs.served import trained_model
from fedkeel.runs.state import State
from fedkeel.scores.evaluate import choose, score
from fedkeel.types import Adapter, Global, Head, Row

WEIGHTS = (0.0, 0.25, 4.0)
SHARES = (0.25, 0.0, 0.75)


def known(model: Model, examples: Sequence[Example]) -> dict[str, Head]:
    return {task: anchor.head_of(sums, 0.1) for task, sums in known_sums(model.features, examples, 0).items()}


def by_hand(model: Model, heads: dict[str, Head], example: Example) -> torch.Tensor:
    """a (W x + w₀) of one row of a plain pass, and −inf where its task has no such class."""
    with torch.no_grad():
        hidden = model.net(input_ids=torch.tensor([example.ids])).last_hidden_state[0].double()
    pooled = hidden.mean(0)
    x = (pooled - pooled.mean()) / (pooled - pooled.mean()).square().mean().sqrt()
    head, logits = heads[example.task], torch.full((len(CLASSES),), -torch.inf, dtype=torch.float64)
    for at in example.allowed:
        if CLASSES[at] in head.labels:
            *w, w0 = (64 * head.weight[head.labels.index(CLASSES[at])].double()).tolist()
            logits[at] = head.scale * (sum(a * b for a, b in zip(w, x.tolist(), strict=True)) + w0)
        else:
            logits[at] = 0
    return logits


def test_scores_are_the_classifiers_on_the_adapted_states() -> None:
    model, examples = setting("bert", head="analytic", precision="fp32")
    heads = known(model, examples)
    model.know(heads)
    logits = model.forward(whole_batch(model, examples)).logits
    assert len({e.task for e in examples}) == 2
    for row, example in zip(logits, examples, strict=True):
        torch.testing.assert_close(row.double(), by_hand(model, heads, example), rtol=1e-4, atol=1e-4)


def test_before_training_they_are_the_classifiers_own() -> None:
    """On the frozen base, up to the grid of the features."""
    model, examples = setting("bert", head="analytic", precision="fp32")
    heads = known(model, examples)
    assert model.initial is not None
    model.write(model.initial)
    model.know(heads)
    logits = model.forward(whole_batch(model, examples)).logits
    for row, example in zip(logits, examples, strict=True):
        head = heads[example.task]
        told = head.scale * scores_of(head, model.features([example.prompt]), example.labels)[0]
        torch.testing.assert_close(row[list(example.allowed)], told, rtol=0, atol=0.02 * head.scale)


def states_by_hand(model: Model, ids: Sequence[int], behind: int) -> torch.Tensor:
    """(tokens, d) behind that many blocks, of a plain pass over one row."""
    base = model.net.get_base_model().base_model
    hidden = base(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return (hidden.hidden_states[behind] if behind < shapes.LAYERS else hidden.last_hidden_state)[0].double()


def standard(part: torch.Tensor) -> torch.Tensor:
    return (part - part.mean()) / part.std(correction=0)


LAYERED = pytest.mark.parametrize("layers", [(), ("1-1",)], ids=["all", "upper"])


@torch.no_grad()
@LAYERED
@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("cache", [1024, 0])
def test_features_of_several_depths_stand_side_by_side(name: str, layers: tuple[str, ...], cache: int) -> None:
    more: dict[str, Any] = {"head": "analytic"} if name == "bert" else {}
    more |= {"cache_memory": cache, "cache_disk": cache}
    model, examples = setting(name, precision="fp32", feature_depths=(1.0, 0.5, 0.6), layers=layers, **more)
    assert model.depths == (1, 2)
    told = model.features([e.prompt for e in examples]).double() / 64
    with model.net.disable_adapter():
        for row, example in zip(told, examples, strict=True):
            states = [states_by_hand(model, example.prompt, behind) for behind in (1, 2)]
            last = [s[-1:] for s in states] if name == "llama" else [s[:0] for s in states]
            parts = [p for s, end in zip(states, last, strict=True) for p in (s.mean(0), *end)]
            expected = torch.cat([standard(p) for p in parts]).clamp(-8, 8)
            assert row.shape == (len(expected) + 1,)
            assert (row[:-1] - expected).abs().max() <= 1 / 64
            assert row[-1] == 1


@torch.no_grad()
@LAYERED
def test_scores_of_several_depths_are_of_the_adapted_states_there(layers: tuple[str, ...], tmp_path: Path) -> None:
    """In the run's model, and in plain PEFT with what is exported."""
    model, examples = setting("bert", head="analytic", precision="fp32", feature_depths=(0.5, 1.0), layers=layers)
    heads = known(model, examples)
    model.know(heads)
    batch = whole_batch(model, examples)
    logits = model.forward(batch).logits
    with model.remembering():
        torch.testing.assert_close(model.forward(batch).logits, logits, rtol=1e-4, atol=1e-4)
    save_adapter(model, tmp_path)
    about, weights = (
        json.loads((tmp_path / "fedkeel_classes.json").read_text()),
        load_file(tmp_path / "label_heads.safetensors"),
    )
    assert about["depths"] == [0.5, 1.0]
    net = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(model.config.base), tmp_path).eval()
    for row, example in zip(logits, examples, strict=True):
        x = torch.cat([standard(states_by_hand(model, example.ids, behind).mean(0)) for behind in (1, 2)])
        hidden = net(input_ids=torch.tensor([example.ids]), output_hidden_states=True)
        theirs = [hidden.hidden_states[1][0].mean(0), hidden.last_hidden_state[0].mean(0)]
        head, weight = heads[example.task], weights[example.task]
        for at in example.allowed:
            if CLASSES[at] not in head.labels:
                assert row[at] == 0
                continue
            *w, w0 = (64 * head.weight[head.labels.index(CLASSES[at])].double()).tolist()
            assert row[at].item() == pytest.approx(
                head.scale * (float(torch.tensor(w, dtype=x.dtype) @ x) + w0), rel=1e-3, abs=1e-3
            )
            n = about["labels"][example.task].index(CLASSES[at])
            plain = weight[n, :-1] @ torch.cat([standard(t) for t in theirs]) + weight[n, -1]
            assert row[at].item() == pytest.approx(float(plain), rel=1e-3, abs=1e-3)


def test_depths_that_cannot_be_seen_are_told() -> None:
    with pytest.raises(ModelError, match=r"feature_depths says nothing to .* the encoder's last are seen"):
        shapes.make("t5", feature_depths=(0.5,))
    with pytest.raises(ConfigError, match=r"model\.feature_depths = 1\.5: must be above 0 and at most 1"):
        load_recipe(None, ["model.feature_depths=[0.5, 1.5]"])
    with pytest.raises(ConfigError, match="says where the analytic anchor looks, and nothing asks for it"):
        load_recipe(None, ["model.feature_depths=[0.5, 1]"])
    with pytest.raises(ConfigError, match=r"model\.feature_depths = 0\.0"):
        load_recipe(None, ["model.feature_depths=[0, 1]"])
    with pytest.raises(ConfigError, match="an early exit has no states of the depths above"):
        load_recipe(None, ["model.feature_depths=[0.5, 1]", "model.head=analytic", "exit.weight=0.3"])
    model = shapes.make("llama", layers=("1-1",), feature_depths=(0.5,))
    model.first = 2
    with pytest.raises(ModelError, match=r"behind block 1 of 2, which .* keeps none of: the lowest that it sees are 1"):
        model.features([[5, 6]])


def test_the_last_states_are_what_it_sees_by_itself() -> None:
    one, examples = setting("bert", head="analytic")
    other, _ = setting("bert", head="analytic", feature_depths=(1.0,))
    prompts = [e.prompt for e in examples]
    assert torch.equal(one.features(prompts), other.features(prompts))


def test_a_task_without_classifier_goes_by_its_labels_words() -> None:
    model, examples = setting("bert", head="analytic")
    batch = whole_batch(model, examples)
    words = model.forward(batch).logits
    heads = known(model, examples)
    model.know({"topic": heads["topic"]})
    some = model.forward(batch).logits
    for example, one, other in zip(examples, words, some, strict=True):
        assert torch.equal(one, other) == (example.task != "topic")
    model.know({})
    assert torch.equal(model.forward(batch).logits, words)


def test_a_label_without_evidence_scores_nothing() -> None:
    model, examples = setting("bert", head="analytic")
    few = known(model, [e for e in examples if e.label != "science"])
    assert "science" not in few["topic"].labels
    model.know(few)
    logits = model.forward(whole_batch(model, examples)).logits
    at = CLASSES.index("science")
    assert all(row[at] == 0 for row, e in zip(logits, examples, strict=True) if e.task == "topic")


def test_other_heads_know_nothing_of_it() -> None:
    model, examples = setting("bert")
    model.know(known(model, examples))
    assert model.by_head is None
    with pytest.raises(
        ModelError, match=r"model\.head = 'analytic' scores the classes of an encoder, and .* is a causal model"
    ):
        shapes.make("llama", head="analytic")


def test_features_are_the_last_states_whatever_the_adapter() -> None:
    model, examples = setting("bert", head="analytic", precision="fp32")
    told = model.features([e.prompt for e in examples]).double() / 64
    with model.net.disable_adapter(), torch.no_grad():
        for row, example in zip(told, examples, strict=True):
            pooled = model.net(input_ids=torch.tensor([example.prompt])).last_hidden_state[0].double().mean(0)
            x = (pooled - pooled.mean()) / pooled.std(correction=0)
            assert (row[:-1] - x).abs().max() <= 1 / 64
            assert row[-1] == 1


def test_what_is_exported_scores_in_plain_peft(tmp_path: Path) -> None:
    model, examples = setting("bert", head="analytic", precision="fp32")
    model.know(known(model, examples))
    logits = model.forward(whole_batch(model, examples)).logits
    save_adapter(model, tmp_path)
    about = json.loads((tmp_path / "fedkeel_classes.json").read_text())
    assert (about["head"], about["classes"]) == ("analytic", list(CLASSES))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(ADAPTER_FILES)
    net = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(model.config.base), tmp_path).eval()
    heads = load_file(tmp_path / "label_heads.safetensors")
    for row, example in zip(logits, examples, strict=True):
        with torch.no_grad():
            x = net(input_ids=torch.tensor([example.ids])).last_hidden_state[0].mean(0)
        x = (x - x.mean()) / x.std(correction=0)
        weight, labels = heads[example.task], about["labels"][example.task]
        scores = dict(zip(labels, (weight[:, :-1] @ x + weight[:, -1]).tolist(), strict=True))
        for at in example.allowed:
            assert row[at].item() == pytest.approx(scores.get(CLASSES[at], 0.0), rel=1e-3, abs=1e-3)


# --------------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def encoder(stream_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], RunFolder]:  # noqa: F811
    """A stream of a growing label set on an encoder, scored by the classifiers; the weight of the served one is chosen, and the
    share of the stage before."""
    given = [
        *tiny.overrides(Path(shapes.base("bert")), stream_data, tmp_path_factory.mktemp("by_head")),
        "data.site_column=ward", "federation.rounds=2", "train.local_steps=2", "evaluation.validation_rows=4",
        "model.head=analytic", f"evidence.serve_from={list(WEIGHTS)}", f"stream.average_from={list(SHARES)}",
        'evaluation.baselines=["base", "analytic", "local", "centralised"]', *GROUPS,
    ]  # fmt: skip
    return given, go(given)[1]


def test_every_leg_that_trains_has_classifiers_of_its_own_rows(encoder: tuple[list[str], RunFolder]) -> None:
    overrides, folder = encoder
    prepared = prepare(load_recipe(None, overrides))
    rows = {r.id: site for site, held in prepared.stages[1].rows.items() for r in held["train"]}
    sites = {site: sum(of == site for of in rows.values()) for site in sorted(set(rows.values()))}
    first = {site: len(held["train"]) for site, held in prepared.stages[0].rows.items()}
    for leg in ("federated", "analytic", "centralised", *(f"local/{site}" for site in sites)):
        (sums,) = folder.read_known(leg, 2).values()
        mine = leg.removeprefix("local/")
        wanted = sites[mine] + first[mine] if leg.startswith("local/") else sum(sites.values()) + sum(first.values())
        assert sum(sums.rows.values()) == wanted, leg
    assert not folder.knows("base")


@pytest.mark.slow
def test_a_run_goes_on_in_the_same_bits(encoder: tuple[list[str], RunFolder], tmp_path: Path) -> None:
    overrides, whole = encoder

    def stop(leg: str, done: int) -> None:
        if (leg, done) == ("federated", 3):
            raise KeyboardInterrupt

    here = [*overrides, f"out={tmp_path}"]
    with pytest.raises(KeyboardInterrupt):
        go(here, Silent(stop))
    resumed = go(here, resume=True)[1]
    assert same(exported(resumed.path), exported(whole.path))
    assert without_time(rows_of(resumed)) == without_time(rows_of(whole))


def test_what_was_chosen_is_there_between_two_stages_too(
    tiny_overrides: list[str],
    stream_data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped behind the choice of the first stage; and the curve of the second goes by it in a run that was not."""
    given = [
        *tiny_overrides, f"data.root={stream_data}", "data.site_column=ward", "federation.rounds=1", "train.local_steps=2",
        "evaluation.validation_rows=6", "evidence.serve_from=[0, 30]", *GROUPS,
    ]  # fmt: skip
    judged: list[float | None] = []
    real = Loop._curve

    def curve(self: Loop, leg: Leg, stage: int, current: Global) -> None:
        if stage:
            judged.append(current.serve)
        real(self, leg, stage, current)

    monkeypatch.setattr(Loop, "_curve", curve)
    whole = go(given)[1]
    (chosen,) = [r["value"] for r in rows_of(whole) if (r["name"], r["stage"]) == ("serve", 0)]
    assert judged == [chosen] == [30]
    save = RunFolder.save

    def stop(self: RunFolder, state: State, rows: Sequence[Row]) -> State:
        state = save(self, state, rows)
        if (state.leg, state.round, state.tested) == ("federated", 1, 1):
            raise KeyboardInterrupt
        return state

    here = [*given, f"out={tmp_path / 'cut'}"]
    with monkeypatch.context() as once:
        once.setattr(RunFolder, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            go(here)
    resumed = go(here, resume=True)[1]
    assert judged == [30, 30]
    assert same(exported(resumed.path), exported(whole.path))
    assert without_time(rows_of(resumed)) == without_time(rows_of(whole))


@pytest.mark.slow
def test_over_a_grid_as_in_this_process(encoder: tuple[list[str], RunFolder], tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="the extra fedkeel[flower] is not installed")
    from test_engines_agree import over_grid

    overrides, here = encoder
    there = over_grid([*overrides, f"out={tmp_path}"], tmp_path)
    assert same(exported(here.path), exported(there.path))
    assert without_time(rows_of(here)) == without_time(rows_of(there))


@pytest.mark.slow
def test_progress_ends_where_it_said(encoder: tuple[list[str], RunFolder], tmp_path: Path) -> None:
    watch = Silent()
    go([*encoder[0], f"out={tmp_path}"], watch)
    assert watch.work == pytest.approx(watch.total)


def test_the_weight_is_the_one_that_validation_rows_prefer(encoder: tuple[list[str], RunFolder]) -> None:
    """Each as if the recipe had said it; of equal ones the first."""
    overrides, folder = encoder
    told = [r for r in rows_of(folder) if r["method"] == "federated" and r["stage"] == 1]
    recipe = load_recipe(None, overrides)
    validation = choose(prepare(recipe).stages[1].all("validation"), "validation", recipe.evaluation.validation_rows)
    formatter = Formatter(load_tokenizer(recipe.model), "classifier", recipe.data.max_length, classes=tuple(sorted(LABELS)))
    found = []
    for weight in WEIGHTS:
        alone = load_recipe(None, [*overrides, f"evidence.serve={weight}", "evidence.serve_from=[]"])
        model = trained_model(alone, folder.path)
        assert model.classes == formatter.classes
        scored = score(model, formatter, validation, recipe.evaluation)
        found.append(sum(s.score for s in scored) / len(scored))
        (row,) = [r for r in told if r["name"] == f"score_at_serve_{weight:g}"]
        assert row["value"] == pytest.approx(found[-1])
    (chosen,) = [r["value"] for r in told if r["name"] == "serve"]
    assert chosen == WEIGHTS[found.index(max(found))]
    assert trained_model(recipe, folder.path).beside.weight == chosen


def test_the_share_is_the_one_that_validation_rows_prefer(encoder: tuple[list[str], RunFolder]) -> None:
    """Each as if the recipe had said it, beside the head's weight of the stage before; the first has nothing to choose."""
    overrides, folder = encoder
    told = [r for r in rows_of(folder) if r["method"] == "federated"]
    (before,) = [r["value"] for r in told if (r["name"], r["stage"]) == ("serve", 0)]
    recipe = load_recipe(None, overrides)
    validation = choose(prepare(recipe).stages[1].all("validation"), "validation", recipe.evaluation.validation_rows)
    formatter = Formatter(load_tokenizer(recipe.model), "classifier", recipe.data.max_length, classes=tuple(sorted(LABELS)))
    found, adapters = [], []
    for share in SHARES:
        said = [f"stream.average={share}", "stream.average_from=[]", f"evidence.serve={before}", "evidence.serve_from=[]"]
        model = trained_model(load_recipe(None, [*overrides, *said]), folder.path)
        adapters.append(model.read().tensors())
        scored = score(model, formatter, validation, recipe.evaluation)
        found.append(sum(s.score for s in scored) / len(scored))
        (row,) = [r for r in told if r["name"] == f"score_at_average_{share:g}"]
        assert row["value"] == pytest.approx(found[-1])
    (chosen,) = [r for r in told if r["name"] == "average"]
    assert (chosen["stage"], chosen["value"]) == (1, SHARES[found.index(max(found))])
    served = trained_model(recipe, folder.path).read().tensors()
    assert same(dict(served), dict(adapters[SHARES.index(chosen["value"])]))
    assert not same(dict(adapters[0]), dict(adapters[1]))
    exact = load_recipe(None, [*overrides, f"stream.average={chosen['value']}", "stream.average_from=[]"])
    best = [dict(trained_model(one, folder.path, "best").read().tensors()) for one in (recipe, exact)]
    assert same(*best)


def test_what_is_chosen_goes_into_the_next_stage_and_no_other(tiny_overrides: list[str], tmp_path: Path) -> None:
    """Three stages, whose shares the checkpoints of their ends tell; blended by hand."""
    from fedkeel.runs.served import served

    like = load_recipe(None, [*tiny_overrides, "stream.stages=colour,echo", "stream.average_from=0.5,0.75"])
    ends = [Adapter({}, {"x": torch.full((2,), float(value))}) for value in (1, 2, 4)]
    folder = RunFolder(tmp_path / "run")
    for stage, (end, share) in enumerate(zip(ends, (None, 0.75, 0.25), strict=True), 1):
        folder.write_checkpoint("federated", Global(2 * stage, end, average=share), {})

    def at(stage: int, *more: str) -> float:
        stream = load_recipe(None, [*tiny_overrides, "stream.stages=colour,echo", "stream.average_from=0.5,0.75", *more]).stream
        return float(served(folder, "federated", 2, stage, stream, ends[0]).dense["x"][0])

    assert like.stream.averages
    assert at(0) == 1
    assert at(1) == 0.75 * 1 + 0.25 * 2
    assert at(2) == 0.25 * 1.25 + 0.75 * 4
    assert at(2, "stream.average_from=[]", "stream.average=0.5") == 0.5 * (0.5 * 1 + 0.5 * 2) + 0.5 * 4
    assert at(2, "stream.average_from=[]") == 4


def test_who_says_a_weight_means_it(encoder: tuple[list[str], RunFolder]) -> None:
    """Although the run had some to choose from; and the table says what was scored."""
    folder = encoder[1].path
    told = []
    for said in (["evidence.serve=0"], ["evidence.serve=0", "evidence.serve_from=[]"], ["evidence.serve=4"]):
        found = CliRunner().invoke(app, ["evaluate", str(folder), *said])
        assert found.exit_code == 0, found.output
        told.append(" ".join(found.output.partition(": federated adapter")[2].split()))
    assert told[0] == told[1]
    assert "beside it" not in told[0]
    assert "with the analytic head beside it, weight 4," in told[2]


def test_of_a_run_that_chose_no_weight_none_is_guessed(encoder: tuple[list[str], RunFolder], tmp_path: Path) -> None:
    overrides = [*encoder[0], f"out={tmp_path}", "evidence.serve_from=[]", "federation.rounds=1", "evaluation.baselines=[]"]
    overrides.append("stream.average_from=[]")
    folder = go(overrides)[1]
    with pytest.raises(RunError, match=r"stream\.average_from = \[0\.5\]: .* chose no share .* as in stream\.average = 0\.25"):
        trained_model(load_recipe(None, [*overrides, "stream.average_from=[0.5]"]), folder.path)
    with pytest.raises(RunError, match=r"evidence\.serve_from = \[0\.5\]: .* chose no weight .* as in evidence\.serve = 1"):
        trained_model(load_recipe(None, [*overrides, "evidence.serve_from=[0.5]"]), folder.path)
    assert trained_model(load_recipe(None, [*overrides, "evidence.serve=2"]), folder.path).beside.weight == 2


def test_the_chosen_weight_travels_with_what_is_scored_and_not_with_what_is_trained() -> None:
    model, _ = setting("bert")
    like = model.initial
    assert like is not None
    _, back = unpack_global(pack_global("checkpoint", Global(3, like, serve=0.25)), "checkpoint", like)
    assert back.serve == 0.25
    assert unpack_global(pack_global("checkpoint", Global(3, like)), "checkpoint", like)[1].serve is None
    assert unpack_global(pack_global("checkpoint", Global(3, like, average=0.75)), "checkpoint", like)[1].average == 0.75
    header, tensors = open_envelope(pack_global("checkpoint", Global(3, like, serve=0.25)))
    with pytest.raises(EnvelopeError, match=r"reports average = 1\.0"):
        unpack_global(seal({**header, "average": 1.0}, tensors), "checkpoint", like)
    for wrong in (-1.0, 1, "2", True):
        with pytest.raises(EnvelopeError, match="reports serve = "):
            unpack_global(seal({**header, "serve": wrong}, tensors), "checkpoint", like)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["model.head=analytic", "federation.rule=residual"], "model.head = 'analytic': the anchor looks through the frozen"),
        (["evidence.serve_from=[1, 2]", "evidence.serve=1"], "one of the two says what is served"),
        (["stream.average_from=[0.5]", "stream.average=0.5"], "one of the two says what is served"),
        (["stream.average_from=[1]"], "at most 0.99"),
        (["stream.average_from=[0.5]"], "averages over stages, and there is one"),
        (["stream.average_from=[0.5]", "federation.rule=svd"], "stream.average_from averages factors of several rounds"),
        (["evidence.serve_from=[-1]"], "must be at least 0"),
        (["evidence.serve_from=0.5,x"], "evidence.serve_from = '0.5,x': a list of numbers belongs here"),
        (
            ["model.head=analytic", "privacy.unit=site", "privacy.noise=1", "federation.weighting=uniform"],
            "model.head = 'analytic': sites send sums over their rows, without noise",
        ),
        (["model.head=analytic", "privacy.masks=true", "federation.weighting=uniform"], "would need more"),
    ],
)
def test_what_it_cannot_go_with_is_refused(keys: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, keys)
    assert said in str(caught.value)


def test_only_what_is_served_has_a_weight_chosen(encoder: tuple[list[str], RunFolder]) -> None:
    chosen = [r["method"] for r in rows_of(encoder[1]) if r["name"] == "serve" or "_at_serve_" in r["name"]]
    assert chosen == ["federated"] * 2 * (1 + len(WEIGHTS))


def test_without_validation_rows_there_is_nothing_to_choose_by(tiny_overrides: list[str]) -> None:
    halves = ["data.validation_share=0", 'data.files=["unsplit.jsonl"]']
    root = Path(next(o for o in tiny_overrides if o.startswith("data.root=")).removeprefix("data.root="))
    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
    (root / "unsplit.jsonl").write_text("".join(json.dumps({k: v for k, v in r.items() if k != "split"}) + "\n" for r in rows))
    with pytest.raises(ConfigError, match=r"evidence\.serve_from = \[1\.0, 2\.0\]: a stage has no validation row to choose by"):
        go([*tiny_overrides, *halves, "evidence.serve_from=[1, 2]"])


def test_a_baseline_serves_nothing_beside_its_adapter() -> None:
    given = load_recipe(None, ["evidence.serve_from=0.5,1"])
    assert given.evidence.serve_from == (0.5, 1.0)
    assert plain(given).evidence.serve_from == ()


def test_heads_of_all_tasks_go_down_where_classes_are_scored_by_them() -> None:
    from fedkeel.federation.server import Roster, message

    model, examples = setting("bert", head="analytic")
    recipe = load_recipe(None, [])
    assert model.initial is not None
    heads = known(model, examples)
    older = {task: replace(head, stage=n) for n, (task, head) in enumerate(sorted(heads.items()))}
    for by_head, wanted in ((True, set(heads)), (False, set())):
        roster = Roster(["a"], recipe.federation, 1, by_head=by_head)
        sent = message(Global(2, model.initial, heads=older, serve=1.0), roster, {}, 0)
        _, back = unpack_global(sent.payload, "global", model.initial)
        assert set(back.heads) == wanted
        assert back.serve is None


def test_ask_scores_by_the_classifiers_and_the_base_by_words(encoder: tuple[list[str], RunFolder]) -> None:
    overrides, folder = encoder
    asked = Ask(load_recipe(None, [*overrides, "evidence.serve_from=[]"]), folder.path)
    model, text = asked.model, "how much is on my account"
    example = Example(
        "a", "intent", tuple(model.tokenizer(text)["input_ids"]), target=0, allowed=tuple(range(len(model.classes)))
    )
    batch = collate([example], "classifier", model.tokenizer.pad_token_id, len(model.classes))
    for who, known in (("federated", True), ("base", False)):
        if not known:
            assert model.initial is not None
            model.write(model.initial)
            model.know({})
        shares = model.forward(batch).logits[0].softmax(0).detach()
        best = int(shares.argmax())
        told = asked.answer(who, [("user", text)], 1, told=lambda text: None)
        assert told.startswith(f"{model.classes[best]} ({float(shares[best]):.0%})"), who
