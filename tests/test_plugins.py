"""A stranger's package adds one of each kind from outside (tests/stranger), and a recipe uses them all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fedkeel import tables
from fedkeel.recipe.load import make_recipe, plain
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import tree_of

STRANGER = Path(__file__).parent / "stranger"
QUIZ = [("the cat", "sings"), ("a dog", "runs"), ("old tree", "sleeps"), ("the bird", "sings"), ("river", "runs")]
RECIPE = """
name = "theirs"
threads = 1
track = ["lines"]
[model]
base = "{base}"
precision = "fp32"
[lora]
rank = 4
[data]
source = "jsonl"
root = "{data}"
files = ["quiz.jsonl"]
max_length = 64
[partition]
scheme = "alternating"
[scheme.alternating]
names = ["here", "there", "beyond"]
[train]
local_steps = 10
lr = 0.02
batch_size = 4
[structure]
blink = 0.25
heads = 0.25
[term.flat]
weight = 0.01
power = 1.5
[federation]
rounds = 2
rule = "first"
codec_up = "mirror"
[evaluation]
baselines = ["base", "local"]
max_new_tokens = 3
"""


# the command, several times in one process: what a stranger adds is there in each
COMMANDS = "import sys; from fedkeel.cli import app; [app(words.split(), standalone_mode=False) for words in sys.argv[1:]]"


def started(words: list[str], cwd: Path, *outside: Path) -> subprocess.CompletedProcess[str]:
    """A fresh Python with these folders on its path."""
    path = os.pathsep.join([*map(str, outside), *(p for p in sys.path if p.endswith("src"))])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)


def fedkeel(*arguments: str, cwd: Path, outside: Path | None = STRANGER) -> subprocess.CompletedProcess[str]:
    return started(["-m", "fedkeel", *arguments], cwd, *([outside] if outside else []))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder with a recipe of strangers' names, its rows, and a base of an architecture that FedKeel has no line for."""
    import torch
    from transformers import AutoTokenizer, Starcoder2Config, Starcoder2ForCausalLM

    folder = tmp_path_factory.mktemp("theirs")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = Starcoder2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    Starcoder2ForCausalLM(config).save_pretrained(folder / "base")
    rows = [{"question": f"{q} {n}", "answers": [a]} for n in range(12) for q, a in QUIZ]
    (folder / "quiz.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "recipe.toml").write_text(RECIPE.format(base=folder / "base", data=folder))
    return folder


@pytest.fixture(scope="module")
def theirs(work: Path) -> Path:
    """The folder of the run, measured and reported."""
    commands = ["run recipe.toml --no-report", "measure runs/theirs --families mute", "report runs/theirs"]
    done = started(["-c", COMMANDS, *commands], work, STRANGER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "‖BA‖" in done.stdout
    return work / "runs" / "theirs"


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_of_each_kind_from_outside(theirs: Path) -> None:
    rows = rows_in(theirs / "rows.jsonl")
    trained = {r["site"] for r in rows if (r["name"], r["method"]) == ("loss", "federated")}
    assert trained == {"here", "there", "beyond"}
    flat = [r for r in rows if r["name"] == "flat_loss"]
    assert {r["method"] for r in flat} == {"federated"}  # a baseline takes no term
    assert all(r["value"] > 0 for r in flat)
    assert {r["value"] for r in rows if (r["name"], r["method"]) == ("aggregation_error", "federated")} == {0.5}
    assert any(r["name"] == "first_letter" and r["split"] == "test" for r in rows)
    maps = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in load_file(theirs / "adapter/adapter_model.safetensors")}
    assert maps == {"q_proj", "v_proj", "c_fc"}
    assert 'codec_up = "mirror"' in (theirs / "recipe.toml").read_text()
    assert ["federated/validation/score", 1] in rows_in(theirs / "points.jsonl")
    measured = {r["name"]: r["value"] for r in rows_in(theirs / "measures.jsonl")}
    factors = load_file(theirs / "adapter/adapter_model.safetensors")
    paths = {name.rpartition(".lora_")[0] for name in factors}
    config = json.loads((theirs / "adapter/adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    products = [scale * factors[f"{p}.lora_B.weight"] @ factors[f"{p}.lora_A.weight"] for p in paths]
    by_hand = sum(float(product.square().sum()) for product in products)
    assert measured["adapter_weight"] == pytest.approx(by_hand, rel=1e-5)
    scores = {r["method"]: r["value"] for r in rows if r["name"] == "score" and r["split"] == "test" and not r["task"]}
    assert "factor on branches" in (theirs / "report.html").read_text()
    assert measured["damage/clean"] == scores["federated"] > measured["damage/mute/0/score"] == scores["base"]


def test_help_and_mistakes_know_them(work: Path) -> None:
    wrong = fedkeel("run", "recipe.toml", "federation.rule=firts", "--dry-run", cwd=work)
    assert "did you mean 'first'?" in wrong.stderr + wrong.stdout
    wrong = fedkeel("run", "recipe.toml", "term.flat.pover=2", "--dry-run", cwd=work)
    assert "unknown key 'term.flat.pover'; did you mean 'term.flat.power'?" in wrong.stderr + wrong.stdout


def test_without_the_package_the_recipe_is_refused_by_name(work: Path) -> None:
    done = fedkeel("run", "recipe.toml", cwd=work, outside=None)
    assert done.returncode == 1
    assert "track = 'lines': one of tensorboard, wandb, mlflow belongs here" in done.stderr + done.stdout


def test_a_package_that_fails_is_named(work: Path, tmp_path: Path) -> None:
    (tmp_path / "broken-0.1.dist-info").mkdir()
    (tmp_path / "broken-0.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 0.1\n")
    (tmp_path / "broken-0.1.dist-info/entry_points.txt").write_text("[fedkeel]\nbroken = broken:register\n")
    (tmp_path / "broken.py").write_text("def register():\n    raise RuntimeError('not today')\n")
    done = fedkeel("run", "recipe.toml", "--dry-run", cwd=work, outside=tmp_path)
    assert done.returncode == 1
    assert "the plug-in 'broken' (broken:register) cannot be used: RuntimeError('not today')" in done.stderr + done.stdout


# ------------------------------------------------------------------------------------------------------- what a baseline drops


SWITCHED = {"structure.mode": "self", "structure.hold": True, "evidence.task": "restricted", "stream.slices": True}


# of each two, both cannot be on
@pytest.mark.parametrize(
    "alone",
    [
        {"train.sam", "evidence.serve", "stream.average"},
        {"structure.adversary", "evidence.serve_from", "stream.average_from"},
    ],
)
def test_a_baseline_has_every_switch_off_a_strangers_too(alone: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables.TERMS, "flat", tables.Term("stranger:flat"))
    monkeypatch.setitem(tables.STRUCTURES, "blink", tables.Structure("stranger:blink"))
    tree: dict[str, Any] = {}
    pairs = {
        "train.sam",
        "structure.adversary",
        "evidence.serve",
        "evidence.serve_from",
        "stream.average",
        "stream.average_from",
    }
    switches = {*tables.switches()} - pairs | alone
    assert {"term.flat.weight", "structure.blink"} <= switches
    for key in switches:
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = SWITCHED.get(key, 0.25)
    tree["stream"]["stages"] = ["a", "b"]
    tree["model"] = {"feature_depths": [1.0]}  # that a switch asks for, and is none
    recipe = make_recipe(tree)
    before, after, default = (settings_of(one) for one in (recipe, plain(recipe), Recipe()))
    for key in switches:
        assert before[key] != default.get(key, 0.0), key
        assert after.get(key, 0.0) == default.get(key, 0.0), key
    assert {key for key in before if before[key] != after.get(key)} == switches


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> value."""

    def flat(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in tree.items():
            found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return found

    return flat(tree_of(recipe), "")
