"""The command as a user types it: fast where it can be, one clear paragraph where something is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import shapes
import tiny
import torch
import transformers
import typer
from safetensors.torch import load_file, save_file
from test_run import go
from typer.testing import CliRunner

from fedkeel.cli import app, main
from fedkeel.display import Display
from fedkeel.recipe.load import load_recipe
from fedkeel.runs.folder import RunError
from fedkeel.types import FedKeelError

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
Done = subprocess.CompletedProcess[str]
Command = Callable[..., Done]


def process(*arguments: str) -> Done:
    """The command as a process of its own."""
    code = "from fedkeel.cli import main; main()"
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command in this process, which has imported torch already."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> Done:
        monkeypatch.setattr("sys.argv", ["fedkeel", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return Done(arguments, int(end.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture(params=["here", pytest.param("process", marks=pytest.mark.slow)])
def fedkeel(request: pytest.FixtureRequest, here: Command) -> Command:
    """The command in this process, and again as one of its own where there is time for it."""
    return here if request.param == "here" else process


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["run", "train.lrr=1"], ["--version"]])
def test_help_and_typos_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import atexit, sys\n"
        "heavy = ('torch', 'transformers', 'peft', 'numpy', 'datasets', 'altair', 'vl_convert')\n"
        "atexit.register(lambda: print('HEAVY', [m for m in heavy if m in sys.modules]))\n"
        "from fedkeel.cli import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and command, of those that are no group of others."""
    for name, one in group.commands.items():
        yield from commands(one, (*path, name)) if hasattr(one, "commands") else [((*path, name), one)]


def test_help_says_what_every_argument_is(here: Command) -> None:
    """As typer and click of these releases show it together."""

    def plain(text: str) -> str:
        return "".join(text.replace("│", "").split())

    seen = 0
    for path, command in commands(typer.main.get_command(app)):
        shown = plain(here(*path, "--help").stdout)
        for parameter in command.params:
            assert parameter.help, (path, parameter.name)
            assert plain(parameter.help) in shown, (path, parameter.name)
            seen += parameter.param_type_name == "argument"
    assert seen >= 20


def assert_one_paragraph(done: Done, told: str) -> None:
    assert done.returncode == 1
    assert told in done.stderr
    assert done.stderr.startswith("fedkeel: ")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().split("\n")) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "train.lrr=1"], "unknown key 'train.lrr'; did you mean 'train.lr'?"),
        (["run", "recipes/quikstart.toml"], "recipe not found: recipes/quikstart.toml; did you mean quickstart.toml?"),
        (["run", "recipes/clinc150.toml"], "data.root is not set"),
        (["run", "recipes/clinc150.toml", "data.root=/nowhere"], "data file not found: /nowhere/intents/clinc150.jsonl.gz"),
        (["run", "federation.rule=medium"], "federation.rule = 'medium': one of mean, freeze_a, alternate, svd"),
        (["run", "--engine", "flower"], "--engine flower: one of local, flower-sim belongs here"),
        (["evaluate", "runs/never"], "is missing: runs/never is not a run whose federation has ended"),
    ],
)
def test_mistakes_are_one_paragraph_and_exit_1(arguments: list[str], told: str) -> None:
    assert_one_paragraph(process(*arguments), told)


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("./nowhere", "model.base = './nowhere': no such folder"),
        ("nobody/nothing", "model.base = 'nobody/nothing' cannot be loaded"),
    ],
)
def test_mistakes_that_libraries_find_are_one_paragraph_too(
    base: str, told: str, fedkeel: Command, tiny_overrides: list[str]
) -> None:
    assert_one_paragraph(fedkeel("run", *tiny_overrides, f"model.base={base}"), told)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_well_formed(path: Path, tmp_path: Path) -> None:
    """Its files need not be here: empty ones stand in for the names it lists, and an order of tasks for a published one."""
    listed = re.findall(r'"((?:cl15|intents|superni)/[^"]+)"', path.read_text())
    for name in listed:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"task_orders": {"order1": ["dbpedia", "amazon", "yahoo", "agnews"]}}')
    recipe = load_recipe(path, [f"data.root={tmp_path}"] if listed else [])
    assert recipe.name == path.stem


def test_dry_run_shows_the_plan_and_does_nothing(fedkeel: Command, tiny_overrides: list[str], tmp_path: Path) -> None:
    done = fedkeel("run", *tiny_overrides, "--dry-run")
    assert done.returncode == 0, done.stderr
    for part in ("rank = 4", "ward-0", "ward-2", "frozen parameters", "trainable parameters", "bytes", "a round"):
        assert part in done.stdout
    # per layer: q, o 32x32, k, v 32x16, gate, up, down 32x64, rank 4: 4 * (64 + 64 + 48 + 48 + 3 * 96)
    assert f"{2 * 4 * (64 + 64 + 48 + 48 + 3 * 96):,} (" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_smollm2_recipe_with_local_stand_ins(fedkeel: Command, tiny_base: Path, tmp_path: Path) -> None:
    """The hub recipe as it is, but for two names: a folder in Hugging Face layout and a folder of chats."""
    pytest.importorskip("datasets", reason="the hub source needs the extra `hub`")
    (tmp_path / "chats").mkdir()
    for split, count in (("train", 40), ("test", 8)):
        rows = [
            {"messages": [{"role": "user", "content": f"hello {k} {split}"}, {"role": "assistant", "content": f"hi {k}"}]}
            for k in range(count)
        ]
        (tmp_path / "chats" / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = fedkeel(
        "run",
        "recipes/hub-chat.toml",
        f"model.base={tiny_base}",
        f"data.dataset={tmp_path / 'chats'}",
        "data.subset=",
        "data.max_length=256",
        "--dry-run",
    )
    assert done.returncode == 0, done.stderr
    counts = [
        list(map(int, re.findall(r"\d+", line.split("│", 1)[1]))) for line in done.stdout.splitlines() if "│ site-" in line
    ]
    assert [c[0] for c in counts] == [0, 1, 2, 3]
    assert sum(c[1] + c[2] for c in counts) == 40
    assert sum(c[3] for c in counts) == 8


def test_run_evaluate_export(fedkeel: Command, tiny_overrides: list[str], tiny_base: Path, tmp_path: Path) -> None:
    """From text to a merged model: the table, the report, the scores of `evaluate`, and logits of what `export` wrote."""
    done = fedkeel("run", *tiny_overrides, tiny.BASELINES)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "tiny"
    for part in ("base", "local", "federated", "centralised", "report.html", "adapter"):
        assert part in done.stdout
    names = {p.name for p in folder.iterdir()}
    assert {"recipe.toml", "rows.jsonl", "env.json", "state.json", "adapter", "checkpoints", "report.html", "table.md"} <= names

    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    stored = {r["task"]: r["value"] for r in rows if (r["method"], r["name"], r["split"]) == ("federated", "score", "test")}
    evaluated = fedkeel("evaluate", str(folder), "--predictions", str(tmp_path / "p.jsonl"))
    assert evaluated.returncode == 0, evaluated.stderr
    for task in ("colour", "echo"):
        line = next(line for line in evaluated.stdout.splitlines() if f"│ {task}" in line)
        assert f"{100 * stored[task]:.1f}" in line
    predicted = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    correct = [p["accuracy"] for p in predicted if p["task"] == "colour"]
    assert sum(correct) / len(correct) == pytest.approx(stored["colour"])

    for planted in ("pytorch_model.bin", "evil.py"):
        (folder / "adapter" / planted).write_text("import os")
    exported = fedkeel("export", str(folder), str(tmp_path / "adapter"))
    assert exported.returncode == 0
    assert "did not write, and it is left out: evil.py, pytorch_model.bin" in " ".join(exported.stdout.split())
    assert {"adapter_config.json", "adapter_model.safetensors"} < {p.name for p in (tmp_path / "adapter").iterdir()}
    assert not list((tmp_path / "adapter").glob("*.py")) + list((tmp_path / "adapter").glob("*.bin"))
    assert fedkeel("export", str(folder), str(tmp_path / "merged"), "--merged").returncode == 0
    import peft

    ids = torch.arange(5, 30)[None]
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=ids).logits
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (merged(input_ids=ids).logits - adapted).abs().max().item() < 1e-5
    again = fedkeel("export", str(folder), str(tmp_path / "merged"), "--merged")
    assert again.returncode == 1
    assert "exists; name a folder that does not" in again.stderr
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


ADAPTER = "adapter/adapter_model.safetensors"


def test_resume_from_the_command_line(
    here: Command, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle (SIGINT), then --resume, ends in the adapter of a run that was never stopped."""
    brief = [*tiny_overrides, "evaluation.baselines=[]"]
    assert here("run", *brief, "name=whole").returncode == 0
    with monkeypatch.context() as patch:
        patch.setattr(Display, "round", lambda self, leg, done, *more: done == 2 and signal.raise_signal(signal.SIGINT))
        stopped = here("run", *brief)
    assert_stopped(stopped, tmp_path / "tiny")
    resumed = here("run", *brief, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "tiny" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


def assert_stopped(done: Done, folder: Path) -> None:
    assert done.returncode == 130, done.stderr
    assert "stopped; continue with: fedkeel run" in done.stdout
    assert not json.loads((folder / "state.json").read_text())["finished"]


@pytest.mark.slow
def test_a_process_stops_and_resumes_from_the_command_line(tiny_overrides: list[str], tmp_path: Path) -> None:
    """The same of processes, the signal from outside."""
    whole = process("run", *tiny_overrides, "name=whole", "federation.rounds=12")
    assert whole.returncode == 0, whole.stderr
    arguments = [*tiny_overrides, "federation.rounds=12"]
    command = [sys.executable, "-c", "from fedkeel.cli import main; main()", "run", *arguments]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    state = tmp_path / "tiny" / "state.json"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (state.exists() and json.loads(state.read_text())["round"] >= 2):
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert_stopped(Done(command, running.returncode, out, err), tmp_path / "tiny")
    resumed = process("run", *arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "tiny" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


def test_names_with_brackets_are_shown_as_they_are(here: Command, tiny_overrides: list[str], tmp_path: Path) -> None:
    """In tables, notes, errors and a live line; nothing of a name is markup."""
    odd = {"ward-0": "[red]Ward[x]", "ward-1": "bold]", "ward-2": "[link=x]b"}
    rows = [{**r, "department": odd[r["department"]], "task": f"[{r['task']}]"} for r in tiny.tiny_rows()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rest = ['data.tasks_file=""', "name=[x]", "federation.rounds=1", tiny.BASELINES]
    overrides = [*tiny_overrides, f"data.root={tmp_path}", *rest]
    dry = here("run", "--dry-run", *overrides)
    done = here("run", *overrides)
    for told in (dry, done):
        assert told.returncode == 0, told.stderr
        for name in odd.values():
            assert name in told.stdout
    assert "[colour]" in done.stdout
    assert here("evaluate", str(tmp_path / "[x]")).returncode == 0
    assert "[x]" in here("run", *overrides).stderr
    assert here("export", str(tmp_path / "[x]"), str(tmp_path / "[y]")).returncode == 0


def test_a_live_line_takes_any_name() -> None:
    from io import StringIO

    from rich.console import Console

    from fedkeel.display import Display

    shown = StringIO()
    screen = Console(file=shown, force_terminal=True, width=120)
    with Display(screen, 2) as display:
        display.leg("local/[/red]x[y", "site [/b]")
        display.note("[/red]")
    assert "local/[/red]x[y" in shown.getvalue()


def test_a_run_is_not_resumed_and_replaced_at_once_nor_put_where_no_folder_can_be(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    both = CliRunner().invoke(app, ["run", *tiny_overrides, "--resume", "--fresh"])
    assert isinstance(both.exception, FedKeelError)
    assert "give one of the two" in str(both.exception)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"out = .*file.* cannot be made: "):
        go([*tiny_overrides, f"out={tmp_path / 'file' / 'below'}"])


def test_another_base_than_the_runs_is_refused(tiny_overrides: list[str], tiny_base: Path, tmp_path: Path) -> None:
    """By its words, or its weights; elsewhere the same one is the same."""
    _, folder, _ = go([*tiny_overrides, "evaluation.baselines=[]", "federation.rounds=1", "train.local_steps=1"])
    moved, changed = (shutil.copytree(tiny_base, tmp_path / name) for name in ("moved", "changed"))
    weights = load_file(changed / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    for base, command, told in (
        (shapes.base("llama"), ["export", str(tmp_path / "x")], "its tokenizer or chat template is another"),
        (str(tmp_path / "none"), ["export", str(tmp_path / "x")], "none"),
        (str(changed), ["export", str(tmp_path / "x"), "--merged"], "its weights are others"),
        (str(moved), ["export", str(tmp_path / "y"), "--merged"], ""),
    ):
        found = CliRunner().invoke(app, [command[0], str(folder.path), *command[1:], "--base", base])
        assert (found.exit_code == 0) == (not told)
        assert told in str(found.exception)
    assert not (tmp_path / "x").exists()
