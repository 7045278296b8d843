"""The rooms of the house: a folder is a room, and imports run one way from room to room."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "fedkeel"

# from the ground up: a room imports those before it, and files of its own
ROOMS = (
    ("types",),
    ("rng", "files", "tables"),
    ("recipe",),
    ("data",),
    ("model",),
    ("method",),
    ("exchange",),
    ("scores",),
    ("federation",),
    ("runs",),
    ("engines",),
    ("deploy",),
    ("evidence",),
    ("display", "api"),
    ("cli",),
)
FREE = ("__init__", "__main__")
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}
# what rooms of mathematics may import beside the standard library and the rooms below
EXCHANGE = {"torch", "safetensors", "numpy", "cryptography"}  # sums mod 2³² are numpy's, and keys no business of ours
OUTSIDE = {"method": {"torch"}, "exchange": EXCHANGE, "recipe": set(), "tables": set(), "types": {"torch"}}
SEEDING = {"seed", "manual_seed", "manual_seed_all", "default_rng", "RandomState", "set_seed", "seed_all"}


def unit(path: Path) -> str:
    """The room of a file of the package: its top folder, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Full names of all that is imported anywhere in a file of `package`, also inside functions and `if TYPE_CHECKING`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            # `from fedkeel import runs` names a module by its alias
            yield from (f"{module}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes, by its last names where it begins in a call."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(name: str, source: str, package: str = "fedkeel") -> list[str]:
    """What breaks the order of rooms in a file of the room `name`."""
    found = []
    tree = ast.parse(source)
    for full in imports(tree, package):
        top, *rest = full.split(".")
        if top == "pickle" or full.startswith(("torch.load", "torch.serialization")):
            found.append(f"{full}: pickle")
        if top == "peft" and name != "model":
            found.append(f"{full}: only the room model imports peft")
        if top in ("flwr", "ray") and package != "fedkeel.engines.flower":
            found.append(f"{full}: only engines/flower imports Flower")
        if top == "fedkeel":
            other = rest[0]
            if name in FREE or other == name or other == "__version__":
                continue
            if other not in LEVEL:
                found.append(f"{full}: in no room")
            elif LEVEL[other] >= LEVEL[name]:
                found.append(f"{full}: {other} is no room below {name}")
        elif name in OUTSIDE and top not in sys.stdlib_module_names and top not in OUTSIDE[name]:
            found.append(f"{full}: not for {name}")
        if name != "rng" and rest and rest[-1] in SEEDING:
            found.append(f"{full}: only rng.py seeds")
    for node in ast.walk(tree):
        called = dotted(node.func) if isinstance(node, ast.Call) else ""
        if name != "rng" and called.rpartition(".")[2] in SEEDING and "." in called:
            found.append(f"{called}: only rng.py seeds")
        if called == "torch.load":
            found.append(f"{called}: pickle")
    return found


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_every_file_has_a_room() -> None:
    assert len(sources()) > 20
    assert {unit(p) for p in sources()} - set(FREE) - set(LEVEL) == set()
    assert len(LEVEL) == sum(map(len, ROOMS))


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_rooms_below_only(path: Path) -> None:
    package = ".".join(("fedkeel", *path.relative_to(PACKAGE).parts[:-1]))
    assert offences(unit(path), path.read_text(encoding="utf-8"), package) == []


def test_the_parts_of_the_method_do_not_know_each_other() -> None:
    parts = ("objective", "structure", "aggregate")
    for part in parts:
        for path in (PACKAGE / "method" / part).glob("*.py"):
            named = list(imports(ast.parse(path.read_text(encoding="utf-8")), f"fedkeel.method.{part}"))
            assert not [n for n in named for other in parts if other != part and n.startswith(f"fedkeel.method.{other}")], path


def module(path: Path) -> str:
    return ".".join(("fedkeel", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def test_no_file_needs_itself() -> None:
    """Imports make no circle, file by file, also those inside functions."""
    files = {module(path): path for path in sources()}
    needs = {}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        told = {full if full in files else full.rpartition(".")[0] for full in imports(ast.parse(path.read_text()), package)}
        needs[name] = (told & set(files)) - {name}
    while free := [name for name, of in needs.items() if not of & set(needs)]:
        for name in free:
            del needs[name]
    assert not needs, {name: sorted(of & set(needs)) for name, of in needs.items()}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def borrowed(source: str) -> list[str]:
    """Private names of FedKeel's that a file takes from elsewhere: imports of them, and reads of attributes that it does not
    itself define. Those of other libraries are another matter (a public call may be lacking); `net` is a model of theirs."""
    nodes = list(ast.walk(ast.parse(source)))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    others, found = {"net"}, []
    for node in nodes:
        if isinstance(node, ast.Import):
            others |= {(one.asname or one.name).split(".")[0] for one in node.names if one.name.split(".")[0] != "fedkeel"}
        elif isinstance(node, ast.ImportFrom):
            ours = node.level or (node.module or "").split(".")[0] == "fedkeel"
            found += [one.name for one in node.names if ours and private(one.name)]
            others |= {one.asname or one.name for one in node.names if not ours}
    for node in nodes:
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
            whole = dotted(node)
            if whole.split(".")[0] not in others:
                found.append(whole)
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_private_name_stays_in_its_file(path: Path) -> None:
    assert borrowed(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from fedkeel.model.load import _load, quiet", ["_load"]),
        ("def f():\n    from ..model.load import _load as load", ["_load"]),
        ("from fedkeel.model import load\nload._load(1)", ["load._load"]),
        ("import fedkeel.model.load\nfedkeel.model.load._load(1)", ["fedkeel.model.load._load"]),
        ("import fedkeel.model.load as at\nat._load(1)", ["at._load"]),
        ("def f(model):\n    return model._lora", ["model._lora"]),
        ("from __future__ import annotations\nimport torch\ntorch.cpu._is_avx512_supported()", []),
        ("class A:\n    def f(self, other):\n        self._x = 1\n        return other._x + other.__len__()", []),
        ("def _f(): ...\n_f()", []),
    ],
)
def test_a_borrowed_private_name_is_caught(source: str, found: list[str]) -> None:
    assert borrowed(source) == found


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("types", "from fedkeel.files import write_atomic", 1),  # a sibling is no room below
        ("method", "from fedkeel.exchange.codecs import CODECS", 1),
        ("recipe", "import torch", 1),
        ("method", "import peft", 2),  # not for it, and only for model
        ("method", "from flwr.common import Parameters", 2),  # not for it, and only for engines/flower
        ("cli", "def f():\n    import flwr", 1),
        ("runs", "import ray", 1),
        ("exchange", "import transformers", 1),
        ("federation", "def f():\n    from fedkeel.model import Model, load\n    import fedkeel.runs", 1),
        ("federation", "from fedkeel import runs", 1),
        ("federation", "from .. import run", 1),
        ("federation", "from ..run import legs", 1),
        ("data", "if TYPE_CHECKING:\n    from fedkeel.model import Model", 1),
        ("model", "def f():\n    from fedkeel import scores", 1),
        ("runs", "import fedkeel.unheard_of", 1),
        ("exchange", "import pickle", 1),
        ("runs", "def f():\n    from pickle import loads", 1),
        ("runs", "import torch\ntorch.load('x')", 1),
        ("federation", "import torch\ndef f():\n    torch.manual_seed(3)", 1),
        ("data", "import numpy as np\nnp.random.default_rng(1)", 1),
        ("data", "import numpy as np\nnp.random.seed(1)", 1),
        ("data", "from numpy.random import default_rng", 1),
    ],
)
def test_what_breaks_the_order_is_caught(name: str, source: str, found: int) -> None:
    assert len(offences(name, source, f"fedkeel.{name}")) == found


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (
            "method",
            "from fedkeel.method.aggregate.common import Aggregate\nfrom fedkeel.types import Adapter\nimport torch, math",
        ),
        ("scores", "def f():\n    from rouge_score.rouge_scorer import RougeScorer"),
        ("model", "import peft\nfrom fedkeel.data.batches import Batch"),
        ("rng", "import numpy as np\nnp.random.default_rng(1)"),
        ("cli", "from fedkeel import __version__, runs"),
        ("federation", "from fedkeel.rng import seed_torch\nseed_torch(1)\nseed = 3"),
    ],
)
def test_what_keeps_the_order_passes(name: str, source: str) -> None:
    assert offences(name, source) == []


def test_imports_count_wherever_they_stand_and_however_they_are_written() -> None:
    text = "import a.b as c\nfrom d import e, f\nclass G:\n    def h(self):\n        from . import i\n        from ..j import k"
    assert sorted(imports(ast.parse(text), "fedkeel.run")) == ["a.b", "d.e", "d.f", "fedkeel.j.k", "fedkeel.run.i"]
