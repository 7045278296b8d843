"""No pickle is ever run: neither one that a member sends, nor one that lies in a folder, nor by a line of the package."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers
from builders import crafted, make_adapter
from safetensors.torch import save
from test_run import go
from typer.testing import CliRunner

from fedkeel.cli import app
from fedkeel.engines.coordinate import Away
from fedkeel.exchange.codecs import EnvelopeError, open_envelope
from fedkeel.exchange.messages import pack_tensors, unpack, unpack_global, unpack_shift
from fedkeel.federation.server import FederationError
from fedkeel.model.bases import ModelError
from fedkeel.model.lora import Model
from fedkeel.recipe.load import load_recipe
from fedkeel.runs.folder import RunError, RunFolder
from fedkeel.types import Global

PACKAGE = Path(__file__).parents[1] / "src" / "fedkeel"
LIKE = make_adapter(0)


class Bomb:
    """Once unpickled, it has made a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def bombs(mark: Path) -> list[bytes]:
    """A pickle as it is, and as torch.save packs one."""
    packed = io.BytesIO()
    torch.save({"model.embed_tokens.weight": Bomb(mark)}, packed)
    return [pickle.dumps(Bomb(mark)), packed.getvalue()]


KINDS = pytest.mark.parametrize("kind", [0, 1], ids=["pickle", "torch"])


@KINDS
def test_the_bombs_are_live(kind: int, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(bombs(tmp_path / "mark")[kind])
    if kind:
        torch.load(tmp_path / "x.pt", weights_only=False)
    else:
        pickle.loads((tmp_path / "x.pt").read_bytes())
    assert (tmp_path / "mark").exists()


@KINDS
def test_a_pickle_for_a_message_is_refused(kind: int, tmp_path: Path) -> None:
    bomb = bombs(tmp_path / "mark")[kind]
    for payload in (bomb, crafted(bomb)):
        for read in (
            open_envelope,
            unpack_shift,
            lambda told: unpack(told, "update", 1, LIKE),
            lambda told: unpack_global(told, "global", LIKE),
        ):
            with pytest.raises(EnvelopeError, match=r"not a FedKeel message: it begins with|bytes of JSON in a body of"):
                read(payload)
    assert not (tmp_path / "mark").exists()


@KINDS
def test_a_pickle_for_a_checkpoint_is_refused(kind: int, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.write_checkpoint("federated", Global(1, LIKE), {"a": {"x": torch.zeros(2)}})
    bomb, kept = bombs(tmp_path / "mark")[kind], tmp_path / "run/checkpoints/federated/kept-0001/0.fkl"
    kept.write_bytes(bomb)
    with pytest.raises(RunError, match="kept-0001 cannot be used: not a FedKeel message"):
        folder.read_kept("federated", 1, LIKE)
    folder.checkpoint("federated", 1).write_bytes(bomb)
    with pytest.raises(RunError, match=r"round-0001\.fkl cannot be used: not a FedKeel message"):
        folder.read_checkpoint("federated", 1, LIKE)
    assert not (tmp_path / "mark").exists()


@KINDS
def test_a_base_of_a_pickle_that_does_more_than_hold_tensors_is_refused(kind: int, tiny_base: Path, tmp_path: Path) -> None:
    base, mark = tmp_path / "base", tmp_path / "mark"
    shutil.copytree(tiny_base, base)
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(bombs(mark)[kind])
    recipe = load_recipe(None, [f"model.base={base}"])
    with pytest.raises(ModelError, match=rf"'{base}' cannot be loaded: its pickled weights .* nothing of them was run"):
        Model(recipe.model, recipe.lora, 1)
    assert not mark.exists()


def plant(folder: Path, mark: Path) -> list[Path]:
    """Pickles under every name that some library reads."""
    names = ["pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "round-0001.pt", "data.pkl"]
    for name in names:
        (folder / name).write_bytes(bombs(mark)[1])
    return [folder / name for name in names]


def test_pickles_that_lie_about_are_not_looked_at(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    """In the base's folder before the run, in the run's, its checkpoints' and its adapter's after it."""
    base, mark = tmp_path / "base", tmp_path / "mark"
    shutil.copytree(tiny_base, base)
    plant(base, mark)
    few = ["evaluation.baselines=base", "federation.rounds=1", "train.local_steps=1", "evaluation.test_rows=2"]
    _, folder, _ = go([*tiny.overrides(base, tiny_data, tmp_path / "out"), *few])
    for where in (folder.path, folder.path / "adapter", folder.path / "checkpoints" / "federated"):
        plant(where, mark)
    run = str(folder.path)
    for told in (
        ["evaluate", run],
        ["ask", run, "what?"],
        ["report", run],
        ["export", run, str(tmp_path / "made"), "--merged"],
    ):
        found = CliRunner().invoke(app, told)
        assert found.exit_code == 0, (told, found.output, found.exception)
    assert sorted(p.suffix for p in (tmp_path / "made").iterdir() if p.suffix not in (".json", ".jinja", ".md")) == [
        ".safetensors"
    ]
    whole = transformers.AutoModelForCausalLM.from_pretrained(base)
    peft.PeftModel.from_pretrained(whole, folder.path / "adapter")
    (folder.path / "adapter" / "adapter_model.safetensors").unlink()
    for told in (["evaluate", run], ["ask", run, "what?"], ["export", run, str(tmp_path / "more")]):
        found = CliRunner().invoke(app, told)
        assert "adapter_model.safetensors is missing" in str(found.exception), told
    assert not mark.exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"adapter_model.bin": b"x"}, "'adapter_model.bin' is no file of a PEFT folder"),
        ({"training_args.bin": b"x"}, "'training_args.bin' is no file of a PEFT folder"),
        ({"modeling_x.py": b"x"}, "'modeling_x.py' is no file of a PEFT folder"),
        ({"adapter_model.safetensors": b"\x80\x04pickle."}, "header"),
        ({"adapter_config.json": b"\x80\x04"}, "utf-8"),
        ({"adapter_config.json": b"[]"}, "list indices"),
        ({"adapter_config.json": b"[" * 100_000}, "recursion"),
    ],
)
def test_a_site_that_is_asked_for_the_adapter_sends_nothing_else(more: dict[str, bytes], told: str, tmp_path: Path) -> None:
    """What it sends is written to the coordinator's disk, and passed on from there."""
    tensors = {f"base_model.model.{path}.lora_A.weight": m.a for path, m in LIKE.lora.items()}
    tensors |= {f"base_model.model.{path}.lora_B.weight": m.b for path, m in LIKE.lora.items()}
    tensors |= {f"base_model.model.{path}": t for path, t in LIKE.dense.items()}
    good = {"adapter_model.safetensors": save(tensors), "adapter_config.json": b"{}"}

    def answer(files: dict[str, bytes]) -> tuple[dict[str, Any], bytes]:
        return {}, pack_tensors({n: torch.frombuffer(bytearray(b), dtype=torch.uint8) for n, b in files.items()}, kind="export")

    def exported(hostile: Sequence[str], folder: Path) -> None:
        sites = SimpleNamespace(
            ask=lambda kind, asked, deadline: {s: answer(good | (more if s in hostile else {})) for s in asked}
        )
        recipe = load_recipe(None, ["model.base=keel-nano"])
        watch = SimpleNamespace(note=notes.append)
        away = SimpleNamespace(
            fine=lambda: ["a", "b"], sites=sites, recipe=recipe, watch=watch, folder=SimpleNamespace(path=folder)
        )
        Away._export(away, "adapter", Global(1, LIKE))  # type: ignore[arg-type]

    notes: list[str] = []
    exported(["a"], tmp_path / "one")
    (note,) = notes
    assert note.startswith("adapter/ is as site b wrote it, and no other site alike:\n--- a: ")
    assert sorted(p.name for p in (tmp_path / "one/adapter").iterdir()) == sorted(good)
    assert json.loads((tmp_path / "one/adapter/adapter_config.json").read_text()) == {"base_model_name_or_path": "keel-nano"}
    with pytest.raises(FederationError, match="no site could write the adapter") as refused:
        exported(["a", "b"], tmp_path / "two")
    assert str(refused.value).count("\n--- ") == 2
    assert told in str(refused.value)
    assert not (tmp_path / "two/adapter").exists()


# --------------------------------------------------------------------------------------------------- the package's sources


UNPICKLE = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "pandas.read_pickle"}
RUN = {"eval", "exec", "compile", "__import__"}


def unsafe(source: str) -> list[str]:
    """What in a file could run what it reads: unpickling, evaluation of text, code of a hub's repository."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [name for name in names if name.split(".")[0] in UNPICKLE or name in UNPICKLE or name == "torch.load"]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {one.arg: ast.unparse(one.value) for one in node.keywords if one.arg}
        if called in RUN or called.startswith("builtins."):
            found.append(called)
        if called == "torch.load" and given.get("weights_only") != "True":
            found.append(called)
        if called.endswith(("read_pickle", "jit.load", "import_ir_module", "hub.load")):
            found.append(called)
        found += [f"{key}={given[key]}" for key in ("trust_remote_code", "allow_pickle") if given.get(key, "False") != "False"]
    for node in ast.walk(ast.parse(source)):  # options that stand in a mapping, and are given on from there
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            found += [
                key.value
                for key, value in pairs
                if isinstance(key, ast.Constant)
                and key.value in ("trust_remote_code", "allow_pickle")
                and ast.unparse(value) != "False"
            ]
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_line_of_the_package_runs_what_it_reads(path: Path) -> None:
    assert unsafe(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["pickle"]),
        ("def f():\n    from marshal import loads", ["marshal", "marshal.loads"]),
        ("import shelve, dill, joblib.numpy_pickle", ["shelve", "dill", "joblib.numpy_pickle"]),
        ("from pandas import read_pickle", ["pandas.read_pickle"]),
        ("from torch import load", ["torch.load"]),
        ("eval('1')\nexec('x')\nbuiltins.exec('x')\n__import__('x')", ["eval", "exec", "builtins.exec", "__import__"]),
        ("torch.load(p)\ntorch.load(p, weights_only=False)\ntorch.load(p, weights_only=w)", ["torch.load"] * 3),
        ("f(trust_remote_code=True)\nf(trust_remote_code=ours)", ["trust_remote_code=True", "trust_remote_code=ours"]),
        ("f(**{'trust_remote_code': True})\nnp.load(p, allow_pickle=True)", ["allow_pickle=True", "trust_remote_code"]),
        ("model.eval()\nre.compile('x')\nf(trust_remote_code=False)\ntorch.load(p, weights_only=True)", []),
        ("{'trust_remote_code': False}\nimport json\nsafetensors.torch.load(p)", []),
    ],
)
def test_what_would_run_what_it_reads_is_caught(source: str, found: list[str]) -> None:
    assert unsafe(source) == found
