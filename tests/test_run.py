"""The main job end to end on a tiny model: equal to plain training, repeatable, resumable, loadable, loud when it fails."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import shapes
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from training import assert_loads_in_peft

import fedkeel.federation.server
from fedkeel import tables
from fedkeel.data.batches import batch_indices, collate
from fedkeel.data.format import Formatter
from fedkeel.data.sites import make_sites
from fedkeel.federation.client import Site
from fedkeel.federation.kept import Kept
from fedkeel.federation.server import FederationError, RoundResult
from fedkeel.federation.train import Round, learning_rate, steps_a_round, train_round
from fedkeel.model.lora import Model
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import Recipe, Train
from fedkeel.recipe.settings import ConfigError
from fedkeel.runs.dry import Dry
from fedkeel.runs.execute import execute
from fedkeel.runs.folder import RunError, RunFolder
from fedkeel.runs.legs import legs_of
from fedkeel.runs.prepare import Prepared, prepare
from fedkeel.types import Adapter, FedKeelError, Global


class Silent:
    """A Watch that keeps what it is told; `on_round` may raise to interrupt a run."""

    def __init__(self, on_round: Callable[[str, int], None] = lambda leg, done: None) -> None:
        self.notes: list[str] = []
        self.results: list[tuple[str, RoundResult]] = []
        self.total = self.work = 0.0
        self._on_round = on_round

    def begin(self, total_work: float) -> None:
        self.total = total_work

    def leg(self, name: str, detail: str) -> None:
        pass

    def advance(self, work: float) -> None:
        self.work += work

    def skip(self, work: float) -> None:
        self.work += work

    def round(self, leg: str, done: int, rounds: int, result: RoundResult) -> None:
        self.results.append((leg, result))
        self._on_round(leg, done)

    def note(self, text: str) -> None:
        self.notes.append(text)


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def go(
    overrides: list[str], watch: Silent | None = None, recipe: Path | None = None, **options: bool
) -> tuple[Recipe, RunFolder, Model]:
    meant = load_recipe(recipe, overrides)
    folder = RunFolder(Path(meant.out) / meant.name)
    model = execute(prepare(meant), folder, watch or Silent(), **options)
    return meant, folder, model


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows_of(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in folder.rows_file.read_text().splitlines()]


def without_time(rows: list[dict]) -> list[dict]:
    return [r for r in rows if r["unit"] != "seconds"]


@pytest.fixture(scope="module")
def uncut(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The tiny federation with all its legs, whole, for many tests to read."""
    return go([*tiny.overrides(tiny_base, tiny_data, tmp_path_factory.mktemp("uncut")), tiny.BASELINES])[1]


def assert_ends_as(resumed: RunFolder, whole: RunFolder) -> None:
    """The same adapter, rows and scores of rows."""
    assert same(adapter_of(resumed.path), adapter_of(whole.path))
    assert without_time(rows_of(resumed)) == without_time(rows_of(whole))
    assert (resumed.path / "scores.jsonl").read_text() == (whole.path / "scores.jsonl").read_text()


def test_one_site_is_plain_lora_training(tiny_overrides: list[str], tiny_base: Path) -> None:
    """The whole system with one site against a bare loop on transformers and peft, no code of FedKeel's in the loop but the
    choice of batches: logits over the vocabulary, labels of −100 elsewhere, transformers' own loss."""
    one_site = ["train.lr=1e-3", "partition.scheme=iid", "partition.sites=1", "evaluation.baselines=[]"]
    recipe, folder, _ = go([*tiny_overrides, *one_site])
    prepared = prepare(recipe)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_base)
    examples = Formatter(tokenizer, "causal", 128).encode_all(prepared.sites.rows["site-0"]["train"])
    start = Model(recipe.model, recipe.lora, recipe.seed).net.state_dict()
    plain = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32),
        peft.LoraConfig(
            r=4,
            lora_alpha=16,
            task_type="CAUSAL_LM",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        ),
    )
    plain.load_state_dict(start)
    trained = [p for p in plain.parameters() if p.requires_grad]
    for round in range(3):
        optimiser = torch.optim.AdamW(trained, weight_decay=0.0)
        for step in range(2 * round, 2 * round + 2):
            (chosen,) = batch_indices([e.length for e in examples], 4, recipe.seed, "site-0", range(step, step + 1))
            width = max(len(examples[i].ids) for i in chosen)
            ids, labels = torch.zeros(len(chosen), width, dtype=torch.long), torch.full((len(chosen), width), -100)
            for row, i in enumerate(chosen):
                for column, (token, counts) in enumerate(zip(examples[i].ids, examples[i].supervised, strict=True)):
                    ids[row, column] = token
                    labels[row, column] = token if counts else -100
            mask = (torch.arange(width) < torch.tensor([[len(examples[i].ids)] for i in chosen])).long()
            plain(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.param_groups[0]["lr"] = learning_rate(recipe.train, step, 6)
            optimiser.step()
            optimiser.zero_grad()
    expected = peft.get_peft_model_state_dict(plain)
    got = adapter_of(folder.path)
    assert got.keys() == expected.keys()
    assert max((got[k] - expected[k]).abs().max().item() for k in got) < 1e-6
    moved = max((expected[k] - start[k.replace(".weight", ".default.weight")]).abs().max().item() for k in got)
    assert moved > 2e-3, "the comparison would hold for a model that did not train"


def test_learning_rate_by_hand() -> None:
    train = Train(lr=1.0, warmup=0.2, final_lr=0.5, local_steps=5)
    assert [round(learning_rate(train, s, 10), 4) for s in range(10)] == [
        0.5,
        1.0,
        1.0,
        0.9375,
        0.875,
        0.8125,
        0.75,
        0.6875,
        0.625,
        0.5625,
    ]


def test_steps_a_round() -> None:
    assert steps_a_round(Train(local_steps=7), 3) == 7
    assert steps_a_round(Train(local_steps=0, local_epochs=2, batch_size=4), 9) == 6


def test_micro_batches_add_up(tiny_overrides: list[str]) -> None:
    """1 × 8 rows and 4 × 2 rows, of unequal numbers of supervised positions, end in the same adapter."""
    ends = []
    for micro in (8, 2):
        recipe = load_recipe(None, [*tiny_overrides, "train.batch_size=8", f"train.micro_batch_size={micro}"])
        prepared = prepare(recipe)
        model = Model(recipe.model, recipe.lora, recipe.seed)
        examples = Formatter(model.tokenizer, "causal", 128).encode_all(prepared.sites.rows["ward-0"]["train"])
        assert len({e.positions for e in examples}) > 1
        positions, stats = train_round(model, examples, Round("ward-0", 1, recipe, Global(0, model.read())))
        ends.append((model.read().tensors(), positions, stats["loss"]))
    (a, n_a, loss_a), (b, n_b, loss_b) = ends
    assert n_a == n_b
    assert loss_a == pytest.approx(loss_b, abs=1e-5)
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 2e-6


def test_same_seed_same_bits_and_file_order_means_nothing(tiny_overrides: list[str]) -> None:
    base = [*tiny_overrides, "evaluation.baselines=[]", "federation.rounds=2"]
    _, first, _ = go(base)
    _, again, _ = go([*base, "name=again"])
    _, turned, _ = go([*base, "name=turned", 'data.files=["reversed.jsonl"]'])
    _, other, _ = go([*base, "name=other", "seed=2"])
    assert same(adapter_of(first.path), adapter_of(again.path))
    assert same(adapter_of(first.path), adapter_of(turned.path))
    assert not same(adapter_of(first.path), adapter_of(other.path))
    scores = [[r["value"] for r in rows_of(f) if r["name"] in ("score", "loss")] for f in (first, again, turned)]
    assert scores[0] == scores[1] == scores[2]


@pytest.mark.parametrize(
    ("leg", "after"),
    [
        ("federated", 2),
        ("local/ward-1", 1),
        pytest.param("federated", 1, marks=pytest.mark.slow),
        pytest.param("centralised", 1, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bits(tiny_overrides: list[str], uncut: RunFolder, leg: str, after: int) -> None:
    """Interrupted before the checkpoint of that round is written: the round is done again, and every row stands once."""

    def interrupt(at: str, done: int) -> None:
        if (at, done) == (leg, after):
            raise KeyboardInterrupt

    given = [*tiny_overrides, tiny.BASELINES]
    with pytest.raises(KeyboardInterrupt):
        go(given, Silent(interrupt))
    watch = Silent()
    _, resumed, _ = go(given, watch, resume=True)
    assert watch.work == pytest.approx(watch.total)
    assert_ends_as(resumed, uncut)
    assert resumed.state().finished


def test_every_final_test_row_keeps_its_score(uncut: RunFolder) -> None:
    """Their mean by task is the score that the Rows tell; one line a row and leg, local legs under their site."""
    lines = [json.loads(line) for line in (uncut.path / "scores.jsonl").read_text().splitlines()]
    assert len({(line["method"], line["site"], line["id"]) for line in lines}) == len(lines)
    told = {
        (r["method"], r["site"], r["task"]): r["value"]
        for r in rows_of(uncut)
        if (r["name"], r["split"]) == ("score", "test") and r["task"]
    }
    by: dict[tuple[str, str, str], list[float]] = {}
    for line in lines:
        by.setdefault((line["method"], line["site"], line["task"]), []).append(line["score"])
    assert {m for m, _, _ in by} == {"base", "federated", "local", "centralised"}
    assert {key: sum(values) / len(values) for key, values in by.items()} == pytest.approx(told)


def killed_while_saving(overrides: list[str]) -> None:
    """A run in a process of its own that dies of kill -9 while rows of an unfinished unit are in the file already."""
    script = (
        "import os, signal, sys; sys.path.insert(0, 'tests')\n"
        "from test_run import go\n"
        "import fedkeel.runs.folder as folder\n"
        "real = folder.append_lines\n"
        "def append(path, lines):\n"
        "    size = real(path, lines)\n"
        "    if sum('bytes_up' in line for line in open(path)) > 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return size\n"
        "folder.append_lines = append\n"
        f"go({overrides!r})\n"
    )
    root = Path(__file__).parent.parent
    killed = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_bits(tiny_overrides: list[str], uncut: RunFolder, tmp_path: Path) -> None:
    """kill -9 while rows of an unfinished unit are already in the file: they are cut off again."""
    given = [*tiny_overrides, tiny.BASELINES]
    killed_while_saving(given)
    folder = RunFolder(tmp_path / "tiny")
    assert len(folder.rows_file.read_bytes()) > folder.state().rows_bytes
    _, resumed, _ = go(given, resume=True)
    assert_ends_as(resumed, uncut)


def test_folder_rules(tiny_overrides: list[str], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run to resume"):
        go(tiny_overrides, resume=True)
    _, folder, _ = go([*tiny_overrides, "evaluation.baselines=[]", "federation.rounds=1"])
    with pytest.raises(RunError, match=r"--resume.*--fresh"):
        go([*tiny_overrides, "evaluation.baselines=[]", "federation.rounds=1"])
    with pytest.raises(RunError, match=r"another recipe: train\.lr = 0\.01 became 0\.5"):
        go([*tiny_overrides, "evaluation.baselines=[]", "federation.rounds=1", "train.lr=0.5"], resume=True)
    before = adapter_of(folder.path)
    go([*tiny_overrides, "evaluation.baselines=[]", "federation.rounds=1", "seed=9"], fresh=True)
    assert not same(before, adapter_of(folder.path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="not a run of FedKeel"):
        go([*tiny_overrides, "name=mine"], fresh=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_the_adapter_loads_in_peft(tiny_overrides: list[str], tiny_base: Path) -> None:
    _, folder, model = go([*tiny_overrides, "evaluation.baselines=[]"])
    assert_loads_in_peft(folder.path / "adapter", model, tiny_base)


def test_rows_of_a_run(tiny_overrides: list[str], uncut: RunFolder) -> None:
    """Every leg is scored on the same rows, bytes are those of real messages, and svd states a smaller error than mean."""
    recipe = load_recipe(None, [*tiny_overrides, tiny.BASELINES])
    rows = rows_of(uncut)
    test = [r for r in rows if r["split"] == "test" and r["name"] == "rows"]
    counts = {(r["method"], r["site"]): {} for r in test}
    for r in test:
        counts[r["method"], r["site"]][r["task"]] = r["value"]
    assert set(counts) == {("base", ""), ("federated", ""), ("centralised", ""), *(("local", f"ward-{k}") for k in range(3))}
    assert len({tuple(sorted(c.items())) for c in counts.values()}) == 1
    told = Dry(prepare(recipe)).traffic
    for name, planned in (("bytes_down", told.down), ("bytes_up", told.up)):
        sent = [r["value"] for r in rows if r["name"] == name and r["method"] == "federated"]
        assert len(sent) == 9
        assert all(abs(b - planned) <= 200 for b in sent), (planned, sent)
    errors = {"mean": [r["value"] for r in rows if r["name"] == "aggregation_error" and r["method"] == "federated"]}
    _, exact, _ = go([*tiny_overrides, "federation.rule=svd", "evaluation.baselines=[]"])
    errors["svd"] = [r["value"] for r in rows_of(exact) if r["name"] == "aggregation_error"]
    assert all(s < m for s, m in zip(errors["svd"][:1], errors["mean"][:1], strict=True))
    assert not any(r["name"] == "failed" for r in rows)


def test_svd_at_full_rank_is_the_dense_sum(tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sites of rank 4 in a 32-wide model at rank 12: nothing is truncated, the rule is exact; `mean` is not."""
    watch, updates = Silent(), []

    def listening(rule: Any, reference: Adapter, came: Any, *more: Any) -> Any:
        updates.extend(came)
        return real(rule, reference, came, *more)

    real = fedkeel.federation.server._combine
    monkeypatch.setattr(fedkeel.federation.server, "_combine", listening)
    go([*tiny_overrides, "lora.rank=12", "federation.rule=svd", "federation.rounds=1", "evaluation.baselines=[]"], watch)
    (_, result) = watch.results[0]
    total = sum(u.positions for u in updates)
    # Ranks of the sites add up to 36, over the width of the model: compare on the modules where 12 can be enough
    for path, factors in result.state.adapter.lora.items():
        dense = sum(u.positions / total * u.adapter.lora[path].dense().double() for u in updates)
        values = torch.linalg.svdvals(dense)
        tail = values[12:].square().sum().sqrt()
        assert torch.linalg.matrix_norm(dense - factors.dense().double()).item() == pytest.approx(tail.item(), abs=1e-5)


def test_budgets_of_the_legs(tiny_overrides: list[str]) -> None:
    prepared = prepare(load_recipe(None, [*tiny_overrides, tiny.BASELINES]))
    legs = {leg.name: leg for leg in legs_of(prepared.cast)}
    assert list(legs) == ["base", "federated", "local/ward-0", "local/ward-1", "local/ward-2", "centralised"]
    assert legs["base"].rounds == 0
    stages = {name: leg.stages[0] for name, leg in legs.items()}
    assert all(len(leg.stages) == 1 for leg in legs.values())
    assert legs["federated"].rounds * stages["federated"].recipe.train.local_steps == 6
    assert (legs["local/ward-1"].rounds, stages["local/ward-1"].recipe.train.local_steps) == (1, 6)
    assert (legs["centralised"].rounds, stages["centralised"].recipe.train.local_steps) == (1, 18)
    assert stages["centralised"].rows == {"all": sum(len(held["train"]) for held in prepared.sites.rows.values())}
    assert stages["local/ward-1"].rows == {"ward-1": len(prepared.sites.rows["ward-1"]["train"])}


@pytest.mark.slow
def test_memory_does_not_grow_with_rounds(tiny_overrides: list[str]) -> None:
    """The number of live tensors after 2 rounds and after 6 is the same, and there is one base model."""

    def alive() -> tuple[int, int]:
        """Tensors and base models."""
        gc.collect()
        objects = gc.get_objects()
        return sum(isinstance(o, torch.Tensor) for o in objects), sum(isinstance(o, transformers.LlamaModel) for o in objects)

    _, before = alive()  # other tests of this process may keep models of their own
    live: dict[int, tuple[int, int]] = {}

    class Forgetful(Silent):
        def round(self, leg: str, done: int, rounds: int, result: RoundResult) -> None:
            del result
            live[done] = alive()

    go([*tiny_overrides, "federation.rounds=6", "evaluation.baselines=[]", "evaluation.validation_rows=1"], Forgetful())
    assert live[6][0] == live[3][0]
    assert {bases for _, bases in live.values()} == {before + 1}


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_site(tiny_overrides: list[str]) -> None:
    with pytest.raises(FederationError) as stopped:
        go([*tiny_overrides, "train.lr=1e30", "train.local_steps=6"])
    text = str(stopped.value)
    assert "round 1 stopped: 0 of 3 sites answered well" in text
    for site in ("ward-0", "ward-1", "ward-2"):
        assert f"site {site}: the loss became" in text
    assert "A lower train.lr" in text


def test_a_base_with_a_nan_is_named_and_not_the_learning_rate(
    tiny_overrides: list[str], tiny_base: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_base, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(FederationError) as caught:
        go([*tiny_overrides, f"model.base={broken}", "evaluation.baselines=[]"])
    assert "model.layers.1.mlp.up_proj.weight of the base" in str(caught.value)
    assert "train.lr" not in str(caught.value)


def test_quorum_goes_on_without_a_broken_site(tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import fedkeel.federation.local

    real = fedkeel.federation.local.answer

    def answer(payload: bytes, model: Model, site: Site, kept: Kept) -> bytes:
        if site.name == "ward-1":
            raise OSError("the disk of ward-1 is gone")
        return real(payload, model, site, kept)

    monkeypatch.setattr(fedkeel.federation.local, "answer", answer)
    base = [*tiny_overrides, "evaluation.baselines=[]", "federation.rounds=2"]
    with pytest.raises(FederationError, match=r"(?s)2 of 3 sites.*ward-1.*Traceback.*the disk of ward-1 is gone"):
        go(base)
    watch = Silent()
    _, folder, _ = go([*base, "federation.quorum=0.6"], watch, fresh=True)
    failed = [(r["round"], r["site"]) for r in rows_of(folder) if r["name"] == "failed"]
    assert failed == [(1, "ward-1"), (2, "ward-1")]
    told = [n for n in watch.notes if "ward-1" in n and "the quorum holds" in n]
    assert len(told) == 2, watch.notes


def test_full_disk_leaves_a_run_that_resumes(
    tiny_overrides: list[str], uncut: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedkeel.files
    from fedkeel.files import DiskError

    real, calls = fedkeel.files.os.fsync, [0]

    def fsync(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == 9:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(fedkeel.files.os, "fsync", fsync)
    given = [*tiny_overrides, tiny.BASELINES]
    with pytest.raises(DiskError, match="No space left on device"):
        go(given)
    monkeypatch.setattr(fedkeel.files.os, "fsync", real)
    _, resumed, _ = go(given, resume=True)
    assert_ends_as(resumed, uncut)
    assert not list(resumed.path.rglob("*.partial"))


def test_an_empty_site_is_named(tiny_overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"site-\d+.* would have no training row"):
        prepare(load_recipe(None, [*tiny_overrides, "partition.scheme=iid", "partition.sites=60"]))
    with pytest.raises(ConfigError, match=r"data\.site_column"):
        prepare(load_recipe(None, [*tiny_overrides, "data.site_column="]))


def test_a_recipe_that_cannot_run_leaves_no_folder_and_replaces_none(tiny_overrides: list[str], uncut: RunFolder) -> None:
    broken = [*tiny_overrides, "data.max_length=8"]
    with pytest.raises(FedKeelError, match=r"raise data\.max_length"):
        go(broken)
    recipe = load_recipe(None, broken)
    folder = RunFolder(Path(recipe.out) / recipe.name)
    assert not folder.path.exists()
    shutil.copytree(uncut.path, folder.path)
    before = rows_of(folder)
    with pytest.raises(FedKeelError, match=r"raise data\.max_length"):
        go(broken, fresh=True)
    assert rows_of(folder) == before


def test_a_label_never_seen_in_training_is_counted(tiny_overrides: list[str], tiny_data: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (tiny_data / "rows.jsonl").read_text().splitlines()]
    lines = [r for r in lines if r["task"] == "colour" and not (r["split"] == "train" and r["output"] == "blue")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    (tmp_path / "tasks.json").write_text((tiny_data / "tasks.json").read_text())
    held_out = sum(r["split"] == "test" and r["output"] == "blue" for r in lines)
    prepared = prepare(load_recipe(None, [*tiny_overrides, f"data.root={tmp_path}", "partition.scheme=iid"]))
    assert held_out > 0
    assert any(f"{held_out} test rows carry a label never seen in training (colour: blue)" in n for n in prepared.notes)


def test_over_long_rows_are_counted(tiny_overrides: list[str]) -> None:
    watch = Silent()
    go([*tiny_overrides, "data.max_length=40", "evaluation.baselines=[]", "federation.rounds=1"], watch)
    assert any("had their text shortened (data.max_length = 40 tokens)" in n for n in watch.notes)


def test_partition_serves_every_split(tiny_overrides: list[str]) -> None:
    """A site's test rows follow its training rows: what no Dirichlet site trains on, it is not tested on as its own."""
    recipe = load_recipe(None, [*tiny_overrides, "partition.scheme=dirichlet", "partition.sites=2", "partition.alpha=0.5"])
    prepared = prepare(recipe)
    everything = sorted(r.id for s in ("train", "validation", "test") for r in prepared.sites.all(s))
    assert len(everything) == len(set(everything)) == 72
    again = make_sites(
        sorted(prepared.sites.all("train") + prepared.sites.all("validation") + prepared.sites.all("test"), key=lambda r: r.id),
        recipe,
    )
    assert again == prepared.sites


def test_sampling_sites(tiny_overrides: list[str]) -> None:
    watch = Silent()
    go([*tiny_overrides, "federation.sites_per_round=2", "evaluation.baselines=[]"], watch)
    assert [len(result.updates) for _, result in watch.results] == [2, 2, 2]


def test_prepared_is_cheap_to_change(tiny_overrides: list[str]) -> None:
    """`collate` and `Formatter` agree with what a site counts: positions in a message are those of its batches."""
    watch = Silent()
    recipe, _, model = go([*tiny_overrides, "evaluation.baselines=[]", "federation.rounds=1"], watch)
    prepared: Prepared = prepare(recipe)
    for update in watch.results[0][1].updates:
        examples = Formatter(model.tokenizer, "causal", 128).encode_all(prepared.sites.rows[update.site]["train"])
        batches = batch_indices([e.length for e in examples], 4, recipe.seed, update.site, range(2))
        counted = sum(len(collate([examples[i] for i in b], "causal", 0).targets) for b in batches)
        assert update.positions == counted


def test_checkpoints_hold_every_round(tiny_overrides: list[str]) -> None:
    watch = Silent()
    _, folder, model = go([*tiny_overrides, "evaluation.baselines=[]"], watch)
    for _, result in watch.results:
        stored = folder.read_checkpoint("federated", result.state.round, model.read())
        assert same(stored.adapter.tensors(), dict(result.state.adapter.tensors()))
        assert (stored.round, stored.counts, stored.drift, stored.memory) == (
            result.state.round,
            result.state.counts,
            result.state.drift,
            None,
        )
    path = folder.checkpoint("federated", 2)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(RunError, match=r"round-0002\.fkl cannot be used.*checksum"):
        folder.read_checkpoint("federated", 2, model.read())
    other: Adapter = replace(model.read(), lora={})
    with pytest.raises(RunError, match="layout"):
        folder.read_checkpoint("federated", 1, other)


# ------------------------------------------------------------------------------------------------- one owner, one cargo


class Stop(Exception):
    """Ends a run in its middle."""


def stopped(overrides: list[str]) -> RunFolder:
    """A run that was killed after the second round of its federation."""

    def stop(leg: str, done: int) -> None:
        if (leg, done) == ("federated", 2):
            raise Stop

    with pytest.raises(Stop):
        go(overrides, Silent(stop))
    meant = load_recipe(None, overrides)
    return RunFolder(Path(meant.out) / meant.name)


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"fresh": True}])
def test_a_run_has_one_owner(how: dict[str, bool], tiny_overrides: list[str]) -> None:
    brief = [*tiny_overrides, "evaluation.baselines=[]"]
    folder = stopped(brief)
    before = {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}
    hold = (
        "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); sys.stdin.read()"
    )
    lock = folder.path.with_name(f".{folder.path.name}.lock")
    other = subprocess.Popen([sys.executable, "-c", hold, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout
    other.stdout.readline()
    try:
        with pytest.raises(RunError, match="is being worked on by process"):
            go(brief, **how)
    finally:
        other.communicate()
    assert {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()} == before
    assert go(brief, resume=True)[1].state().finished


def rewrite(data: Path, change: Callable[[list[str]], list[str]]) -> None:
    lines = (data / "rows.jsonl").read_text().splitlines(keepends=True)
    (data / "rows.jsonl").write_text("".join(change(lines)))


def replaced_once(old: str, new: str) -> Callable[[list[str]], list[str]]:
    return lambda lines: ["".join(lines).replace(old, new, 1)]


def reorder(data: Path, base: Path) -> str:
    rewrite(data, lambda lines: lines[::-1])
    return ""


def change_a_row(data: Path, base: Path) -> str:
    rewrite(data, replaced_once("the green dog", "the green  dog"))
    return "the rows of ward-1"


def take_a_test_row(data: Path, base: Path) -> str:
    def taken(lines: list[str]) -> list[str]:
        gone = next(n for n, line in enumerate(lines) if '"test"' in line and "ward-2" in line)
        return lines[:gone] + lines[gone + 1 :]

    rewrite(data, taken)
    return "the rows of ward-2"


def move_a_row(data: Path, base: Path) -> str:
    rewrite(data, replaced_once('"department": "ward-0"', '"department": "ward-1"'))
    return "the rows of ward-0, the rows of ward-1"


def change_the_base(data: Path, base: Path) -> str:
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return "the base"


@pytest.mark.parametrize(
    "change",
    shapes.quickly((change_a_row, change_the_base), [reorder, change_a_row, take_a_test_row, move_a_row, change_the_base]),
)
def test_a_run_goes_on_with_what_it_began_with_only(
    change: Callable[[Path, Path], str], tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    base, data = (shutil.copytree(p, tmp_path / p.name) for p in (tiny_base, tiny_data))
    overrides = [*tiny.overrides(base, data, tmp_path / "runs"), "evaluation.baselines=[]"]
    folder = stopped(overrides)
    before = folder.rows_file.read_bytes()
    told = change(data, base)
    if not told:
        assert go(overrides, resume=True)[1].state().finished
        return
    with pytest.raises(RunError, match=f"cannot be resumed: not as they were when it began: {told}\\. Put them back"):
        go(overrides, resume=True)
    assert folder.rows_file.read_bytes() == before
    assert go(overrides, fresh=True)[1].state().finished


def test_rows_longer_than_the_base_reads_are_refused_before_any_work(tiny_overrides: list[str]) -> None:
    long = [*tiny_overrides, "data.max_length=257"]
    prepared = prepare(load_recipe(None, long))
    for call in (lambda: Dry(prepared), lambda: go(long)):
        with pytest.raises(
            ConfigError, match=r"data\.max_length = 257, and .* was made for 256 tokens: set data\.max_length = 256"
        ):
            call()


def test_answers_that_leave_a_prompt_no_room_are_refused_before_any_work(tiny_overrides: list[str]) -> None:
    watch = Silent()
    with pytest.raises(
        FedKeelError, match=r"task echo\): its answer and the prompt's frame .*lower evaluation\.max_new_tokens = 128"
    ):
        go([*tiny_overrides, "evaluation.max_new_tokens=128", "evaluation.baselines=[]"], watch)
    assert watch.work == 0


def test_answers_longer_than_an_encoder_decoder_writes_are_refused_before_any_work(tiny_overrides: list[str]) -> None:
    long = [*tiny_overrides, f"model.base={shapes.base('bart')}", "evaluation.max_new_tokens=257"]
    prepared = prepare(load_recipe(None, long))
    for call in (lambda: Dry(prepared), lambda: go(long)):
        with pytest.raises(
            ConfigError, match=r"evaluation\.max_new_tokens = 257, and .* was made for 256 tokens: set it to 256 or less"
        ):
            call()


def test_what_changes_no_bit_may_change_on_resume(tiny_overrides: list[str], tmp_path: Path) -> None:
    brief = [*tiny_overrides, "evaluation.baselines=[]"]
    whole = go([*brief, "name=whole"])[1]
    folder = stopped(brief)
    sent = sum(r["value"] for r in rows_of(folder) if r["name"] in ("bytes_up", "bytes_down"))
    assert folder.exchanged() == sent > 0
    free = ["evaluation.batch_size=7", "model.cache_memory=1", "threads=1"]
    with pytest.raises(RunError, match=r"train\.batch_size = 4 became 5; only evaluation\.batch_size, .* may be"):
        go([*brief, "train.batch_size=5"], resume=True)
    resumed = go([*brief, *free], resume=True)[1]
    assert same(adapter_of(resumed.path), adapter_of(whole.path))
    assert load_recipe(resumed.path / "recipe.toml", []).evaluation.batch_size == 7


def test_the_order_of_rows_files_and_sites_changes_no_score(
    tiny_overrides: list[str], uncut: RunFolder, tmp_path: Path
) -> None:
    """The rows backwards, a file a department, named against the order of departments: every row of the run is the same, and
    so is the adapter."""
    folder = tmp_path / "other"
    folder.mkdir()
    shutil.copy(Path(next(o for o in tiny_overrides if o.startswith("data.root=")).partition("=")[2]) / "tasks.json", folder)
    for number in range(3):
        rows = [json.dumps(row) + "\n" for row in reversed(tiny.tiny_rows()) if row["department"] == f"ward-{number}"]
        (folder / f"{'cab'[number]}.jsonl").write_text("".join(rows))
    given = [*tiny_overrides, tiny.BASELINES, f"data.root={folder}", 'data.files=["*.jsonl"]']
    _, other, _ = go([*given, "name=tiny", f"out={tmp_path}"])
    assert_ends_as(other, uncut)


@pytest.mark.parametrize(
    ("held", "told"),
    [
        (None, r"scheme = 'odd' gave None; a list of each site's row numbers, or site -> row numbers, belongs there"),
        ({"a": 3}, "scheme = 'odd' gave {'a': 3}; a list of"),
        ([[0, 1], [2, 10**6]], r"scheme = 'odd' gave a site row 1000000 of \d+, counted from 0"),
    ],
)
def test_a_partition_of_ones_own_that_is_none_is_named(
    held: Any, told: str, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tables.PARTITIONS, "odd", replace(tables.PARTITIONS["iid"], name="odd", code=lambda deal: held))
    with pytest.raises(ConfigError, match=told):
        prepare(load_recipe(None, [*tiny_overrides, "partition.scheme=odd"]))
