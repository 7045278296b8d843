"""Recipes: every documented failure with its words, overrides, and the way out to TOML and back."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkeel import tables
from fedkeel.recipe.load import load_recipe, with_threads
from fedkeel.recipe.schema import Data, Evaluation, Federation, LoraConfig, Partition, Recipe
from fedkeel.recipe.settings import ConfigError, known_keys, to_toml


def read(recipe: Recipe, key: str) -> Any:
    """The value at a dotted key."""
    kind, _, rest = key.partition(".")
    if kind in tables.OWN:
        entry, _, name = rest.partition(".")
        return getattr(recipe.options(kind, entry), name)
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize(
    ("override", "told"),
    [
        # unknown keys, with the nearest known one
        ("lora.rnak=4", "unknown key 'lora.rnak'; did you mean 'lora.rank'?"),
        ("federation.quorm=1", "unknown key 'federation.quorm'; did you mean 'federation.quorum'?"),
        ("rank=4", "unknown key 'rank'; did you mean 'lora.rank'?"),
        ("train.rank=4", "unknown key 'train.rank'; did you mean 'lora.rank'?"),
        ("trian.lr=1", "unknown key 'trian'; did you mean 'train.lr'?"),
        ("qqq=1", "unknown key 'qqq'"),
        # wrong types
        ("lora.rank=4.0", "lora.rank = 4.0: int belongs here, not float"),
        ("lora.rank=four", "lora.rank = 'four': int belongs here, not str"),
        ("lora.rank=true", "lora.rank = True: int belongs here, not bool"),
        ("train.lr=true", "train.lr = True: float belongs here, not bool"),
        ("lora.rslora=1", "lora.rslora = 1: bool belongs here, not int"),
        ("lora.rslora=True", "lora.rslora = 'True': bool belongs here, not str"),
        ("lora.targets=[1, 2]", "lora.targets = [1, 2]: a list of strings belongs here"),
        ("data.tasks=3", "data.tasks = 3: a list of strings belongs here"),
        ("train=5", "train is a table of keys, not 5; write train.KEY=VALUE"),
        # out of range
        ("lora.rank=0", "lora.rank = 0: must be at least 1"),
        ("lora.alpha=0", "lora.alpha = 0.0: must be above 0"),
        ("lora.dropout=1", "lora.dropout = 1.0: must be at least 0 and at most 0.99"),
        ("train.lr=-1e-3", "train.lr = -0.001: must be above 0"),
        ("train.lr=nan", "train.lr = nan: must be above 0"),
        ("train.warmup=1.5", "train.warmup = 1.5: must be at least 0 and at most 1"),
        ("federation.quorum=0", "federation.quorum = 0.0: must be above 0 and at most 1"),
        ("federation.quorum=1.01", "federation.quorum = 1.01: must be above 0 and at most 1"),
        ("federation.rounds=0", "federation.rounds = 0: must be at least 1"),
        ("partition.alpha=inf", "partition.alpha = inf: must be above 0 and at most 1000000.0"),
        ("seed=-1", "seed = -1: must be at least 0"),
        # choices
        (
            "federation.rule=meen",
            "federation.rule = 'meen': one of mean, freeze_a, alternate, svd, stack, residual, share_a, share_b, median, "
            "trimmed, clipped, centred, krum belongs here; did you mean 'mean'?",
        ),
        (
            "federation.codec_up=zip",
            "federation.codec_up = 'zip': one of fp32, bf16, fp16, int8, int4, or topk=SHARE with 0 < SHARE",
        ),
        ("partition.scheme=by_task", "did you mean 'by-task'?"),
        ("model.kind=casual", "did you mean 'causal'?"),
        (
            "evaluation.baselines=base,centralized",
            "evaluation.baselines = 'centralized': one of base, analytic, local, centralised belongs here; did you mean 'cen",
        ),
        # what only fits together
        ("train.local_epochs=1", "train.local_steps = 10 and train.local_epochs = 1: set exactly one above 0"),
        ("train.local_steps=0", "train.local_steps = 0 and train.local_epochs = 0: set exactly one above 0"),
        ("train.micro_batch_size=17", "train.micro_batch_size = 17 is over train.batch_size = 16"),
        ("data.source=jsonl", "data.root is not set: name the folder that holds the data, as in data.root=/path/to/data"),
        ("data.source=hub", "data.dataset is not set"),
        ("name=../up", "name = '../up': a plain folder name belongs here"),
        ("name=", "name = '': a plain folder name belongs here"),
        ("structure.mode=self", "structure.mode = 'self' compares a disturbed pass with a clean one, and no structure"),
        ("structure.head=0.1", "unknown key 'structure.head'; did you mean 'structure.heads'?"),
        ("stream.average=1", "stream.average = 1.0: must be at least 0 and at most 0.99"),
        ("stream.replay=2", "stream.replay = 2 keeps rows of earlier stages, and there is one stage"),
        ("name=.", "name = '.': a plain folder name belongs here"),
        # not an override at all
        ("recipe", "'recipe' is neither a recipe file nor key=value"),
        ("=3", "'=3' is neither a recipe file nor key=value"),
    ],
)
def test_what_cannot_be_right_is_refused_in_these_words(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, [override])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["lora.rank=4"], "lora.rank", 4),
        (["seed=1_000"], "seed", 1000),
        (["train.lr=1e-3"], "train.lr", 1e-3),
        (["train.lr=1"], "train.lr", 1.0),
        (["federation.max_update_norm=inf"], "federation.max_update_norm", float("inf")),
        (["lora.rslora=true"], "lora.rslora", True),
        ([" lora.rank = 4 "], "lora.rank", 4),
        (['lora.targets=["q_proj", "v_proj"]'], "lora.targets", ("q_proj", "v_proj")),
        (["lora.targets=q_proj,v_proj"], "lora.targets", ("q_proj", "v_proj")),
        (["lora.targets=q_proj"], "lora.targets", ("q_proj",)),
        (["evaluation.baselines="], "evaluation.baselines", ()),
        (["evaluation.baselines=[]"], "evaluation.baselines", ()),
        (["evidence.serve_from=0.5, 1e-2,2"], "evidence.serve_from", (0.5, 0.01, 2.0)),
        (["lora.site_ranks= 4, 8", "federation.rule=svd"], "lora.site_ranks", (4, 8)),
        (["federation.rule=svd"], "federation.rule", "svd"),
        (['federation.rule="svd"'], "federation.rule", "svd"),
        (["model.base=/models/a b=c"], "model.base", "/models/a b=c"),
        (["model.base=org/model-1.5"], "model.base", "org/model-1.5"),
        (["name=7"], "name", "7"),
        (["name=007"], "name", "007"),
        (["name=true"], "name", "true"),
        (["out=2024-01-02"], "out", "2024-01-02"),
        (["data.subset=[1, 2]"], "data.subset", "[1, 2]"),
        (["seed=2", "seed=3"], "seed", 3),
        (["train.local_epochs=2", "train.local_steps=0"], "train.local_epochs", 2),
    ],
)
def test_overrides_are_read_as_meant(overrides: list[str], key: str, value: Any) -> None:
    got = read(load_recipe(None, overrides), key)
    assert got == value
    assert type(got) is type(value)


def test_an_override_changes_nothing_else() -> None:
    recipe = load_recipe(None, ["lora.rank=4"])
    assert replace(recipe, lora=LoraConfig()) == Recipe() == load_recipe(None)


def test_a_file_is_overridden_by_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('name = "müller"\n[train]\nlr = 1\nbatch_size = 4\n', encoding="utf-8")
    recipe = load_recipe(path, ["train.batch_size=8"])
    assert (recipe.name, recipe.train.lr, recipe.train.batch_size) == ("müller", 1.0, 8)
    assert recipe.federation == Federation()


def test_a_missing_recipe_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "quickstart.toml").write_text("")
    with pytest.raises(ConfigError, match=r"recipe not found: .*quikstart\.toml; did you mean quickstart\.toml\?"):
        load_recipe(tmp_path / "quikstart.toml")
    with pytest.raises(ConfigError, match=r"recipe not found: .*other\.toml$"):
        load_recipe(tmp_path / "nowhere" / "other.toml")


@pytest.mark.parametrize("content", [b"[train\nlr = 1", b"lr = = 1", b'name = "\xff"', b"seed = 1\nseed = 2"])
def test_a_malformed_recipe_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.toml: ."):
        load_recipe(path)
    with pytest.raises(ConfigError, match="is a folder, and a recipe belongs here"):
        load_recipe(tmp_path)


def test_an_unknown_table_in_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("[training]\nlr = 1\n")
    with pytest.raises(ConfigError, match="unknown key 'training'; did you mean"):
        load_recipe(path)
    path.write_text("train = 3\n")
    with pytest.raises(ConfigError, match=r"train\.lr: 'train' is a value, not a table"):
        load_recipe(path, ["train.lr=1"])


def test_data_files_are_looked_for_before_anything_heavy(tmp_path: Path) -> None:
    there = ["data.source=jsonl", f"data.root={tmp_path}"]
    with pytest.raises(ConfigError, match=r"data\.files is empty"):
        load_recipe(None, there)
    with pytest.raises(ConfigError, match=rf"data file not found: {tmp_path}/rows\.jsonl \(data\.root = '{tmp_path}'\)"):
        load_recipe(None, [*there, "data.files=rows.jsonl"])
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"data file not found: .*tasks\.json"):
        load_recipe(None, [*there, "data.files=rows.jsonl", "data.tasks_file=tasks.json"])
    assert load_recipe(None, [*there, "data.files=rows.jsonl"]).data.files == ("rows.jsonl",)


ORDERS = {
    "task_orders": {"order1": ["d", "a", "y", "n"], "order4": ["m", "d", "c", "a", "y"]},
    "streams": {"random1": ["n", "y", "a", "d"]},
    "tasks": {},
}


@pytest.fixture
def ordered(tmp_path: Path) -> list[str]:
    """key=value of a recipe whose data.tasks_file names three orders."""
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "tasks.json").write_text(json.dumps(ORDERS))
    return ["data.source=jsonl", f"data.root={tmp_path}", "data.files=rows.jsonl", "data.tasks_file=tasks.json"]


@pytest.mark.parametrize(
    ("overrides", "stages"),
    [
        (["stream.order=order1"], ["d", "a", "y", "n"]),
        (["stream.order=random1"], ["n", "y", "a", "d"]),
        (["stream.order=order4", "stream.tasks_a_stage=2"], ["m + d", "c + a", "y"]),
        (["stream.order=order4", "stream.tasks_a_stage=9"], ["m + d + c + a + y"]),
        # the order's sequence, not that of data.tasks; a task that the order lacks is no stage
        (["stream.order=order4", "stream.tasks_a_stage=2", "data.tasks=y,c,d,z"], ["d + c", "y"]),
        (["stream.order=order1", 'stream.stages=["d", "a", "y", "n"]'], ["d", "a", "y", "n"]),
    ],
)
def test_an_order_becomes_stages(ordered: list[str], tmp_path: Path, overrides: list[str], stages: list[str]) -> None:
    recipe = load_recipe(None, [*ordered, *overrides])
    assert list(recipe.stream.stages) == stages
    assert there_and_back(recipe, tmp_path) == recipe


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["order=ordr1"], "stream.order = 'ordr1' is not in {}; did you mean 'order1'? known: order1, order4, random1"),
        (["order=x"], "stream.order = 'x' is not in {}; known: order1, order4, random1"),
        (
            ["order=order1", "stages=d,a"],
            "stream.order = 'order1', stream.tasks_a_stage = 1 means stages ['d', 'a', 'y', 'n'], "
            "and stream.stages is ['d', 'a']: set one of stream.order and stream.stages",
        ),
        (["order=order1", "tasks_a_stage=2", "stages=d,a,y,n"], "means stages ['d + a', 'y + n'], and stream.stages is ['d'"),
        (["tasks_a_stage=2"], "stream.tasks_a_stage = 2 groups the tasks of stream.order, which is not set"),
    ],
)
def test_orders_that_cannot_be(ordered: list[str], tmp_path: Path, overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, [*ordered, *(f"stream.{override}" for override in overrides)])
    assert told.format(tmp_path / "tasks.json") in str(caught.value)


def test_an_order_needs_a_file_that_holds_it(ordered: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stream\.order = 'order1' of .*tasks\.json has none of data\.tasks = \['q'\]"):
        load_recipe(None, [*ordered, "stream.order=order1", "data.tasks=q"])
    with pytest.raises(ConfigError, match=r"looked up in data\.tasks_file, which is not set"):
        load_recipe(None, [*ordered, "stream.order=order1", "data.tasks_file="])
    for about, told in (
        ("{", r"tasks\.json \(data\.tasks_file, for stream\.order\) cannot be read"),
        ('{"a": {}}', "it has none, under any of task_orders, streams"),
        ('{"streams": ["a"]}', "under 'streams' belongs an object"),
        ('{"streams": {"order1": []}}', r"streams\.order1 is not a list of tasks"),
        ('{"streams": {"x": ["a"]}, "task_orders": {"x": ["b"]}}', "names the order 'x' twice"),
    ):
        (tmp_path / "tasks.json").write_text(about)
        with pytest.raises(ConfigError, match=told):
            load_recipe(None, [*ordered, "stream.order=order1"])


def test_the_choices_are_the_keys_of_the_tables() -> None:
    choices = {f.name: f.metadata.get("choices") for cls in (Federation, Partition, Data, Evaluation) for f in fields(cls)}
    assert choices["rule"] is tables.RULES
    assert choices["weighting"] is tables.WEIGHTINGS
    assert choices["optimiser"] is tables.OPTIMISERS
    assert choices["scheme"] is tables.PARTITIONS
    assert choices["source"] is tables.SOURCES
    assert choices["baselines"] is tables.BASELINES
    assert Evaluation().baselines == ("base", "local", "centralised")  # the analytic one says nothing of free text


def test_every_default_is_in_its_own_range() -> None:
    for key in known_keys(Recipe):
        section, _, name = key.partition(".")
        if section == "structure" and name in tables.STRUCTURES:
            assert load_recipe(None, [f"{key}=0.0"]) == Recipe()
            continue
        default = read(Recipe(), key)
        if not isinstance(default, str):
            text = ",".join(default) if isinstance(default, tuple) else str(default).lower()
            assert read(load_recipe(None, [f"{key}={text}"]), key) == default


def there_and_back(recipe: Recipe, folder: Path) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    return load_recipe(path)


def test_the_default_recipe_survives_toml(tmp_path: Path) -> None:
    assert there_and_back(Recipe(), tmp_path) == Recipe()
    assert tomllib.loads(to_toml(Recipe())).keys() == asdict(Recipe()).keys() - {"own"}


ODD = "quote \" backslash \\ both \\\" tab \t newline \n return \r bell \x07 escape \x1b delete \x7f nul \0 ÄΩ漢🙂 # = [x] '''"


def test_an_odd_recipe_survives_toml(tmp_path: Path) -> None:
    recipe = replace(
        Recipe(),
        name="sites of Zürich",
        seed=2**70,
        lora=LoraConfig(rslora=True, targets=(ODD, "", "plain"), alpha=1e-300),
        data=Data(instruction=ODD, drop_labels=("a,b", '"', "\\")),
        federation=Federation(max_update_norm=1e22, quorum=1 / 3),
        evaluation=Evaluation(baselines=()),
    )
    assert there_and_back(recipe, tmp_path) == recipe
    assert read(load_recipe(None, ["federation.max_update_norm=inf"]), "federation.max_update_norm") == float("inf")


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_any_text_survives_toml(text: str) -> None:
    recipe = replace(Recipe(), data=Data(instruction=text))
    assert tomllib.loads(to_toml(recipe))["data"]["instruction"] == text


def test_reading_a_recipe_imports_nothing_heavy() -> None:
    code = (
        "import sys; from fedkeel.recipe.load import load_recipe; load_recipe(None, ['lora.rank=4']);"
        "print(sorted({'torch', 'numpy', 'transformers', 'peft', 'safetensors', 'altair', 'vl_convert'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_override_is_one_key() -> None:
    """TOML's line break inside an override starts no second key; the whole text is the value, and refused as such."""
    with pytest.raises(ConfigError, match="seed = '3"):
        load_recipe(None, ["seed=3\nname=4"])


def test_two_ascents_before_a_step_are_refused() -> None:
    with pytest.raises(ConfigError, match="the gradients of two points"):
        load_recipe(None, ["train.sam=0.1", "structure.adversary=0.1"])


@pytest.mark.parametrize(("given", "threads"), [("3", 3), ("5,2", 5), ("", 2), ("0", 2), ("many", 2)])
def test_threads_are_those_of_the_environment_where_a_recipe_names_none(
    given: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedkeel.recipe.load.cores", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert with_threads(load_recipe(None)).threads == threads
    assert with_threads(load_recipe(None, ["threads=7"])).threads == 7


def test_a_recipe_with_a_byte_order_mark_and_a_folder_in_its_place(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("\ufeff[train]\nlr = 0.5\n", encoding="utf-8")
    assert load_recipe(recipe, []).train.lr == 0.5
    with pytest.raises(ConfigError, match=r"is a folder, and a recipe belongs here$"):
        load_recipe(tmp_path, [])
    (tmp_path / "recipe.toml").write_text("")
    with pytest.raises(ConfigError, match=r"to go on with a run:  fedkeel run .*recipe\.toml --resume"):
        load_recipe(tmp_path, [])
