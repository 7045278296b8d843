"""The layers: a file imports lower layers only. A new file belongs into the table below before its first commit."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "fedkeel"

LAYERS = (
    ("types",),
    ("rng", "files"),
    ("objective", "structure", "aggregate", "codecs", "partition", "metrics"),
    ("config", "pydocs", "sitefile"),
    ("sources", "track"),
    ("data", "messages", "sites"),
    ("model", "folder"),
    ("teacher",),
    ("client", "server", "evaluate"),
    ("damage",),
    ("local",),
    ("run",),
    ("work",),
    ("worker", "coordinate"),
    ("flower",),
    ("deploy",),
    ("sitecheck",),
    ("report",),
    ("measure",),
    ("suites",),
    ("display",),
    ("cli",),
)
FREE = ("__init__", "__main__")
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
PURE = LAYERS[2]
# what the pure packages may import beside the standard library
OUTSIDE = {name: {"torch", "numpy"} for name in PURE}
OUTSIDE["codecs"] |= {"safetensors"}
OUTSIDE["metrics"] |= {"rouge_score"}
SEEDING = {"seed", "manual_seed", "manual_seed_all", "default_rng", "RandomState", "set_seed", "seed_all"}


def unit(path: Path) -> str:
    """The name in the table of a file of the package: its top folder or its own name."""
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
            # `from fedkeel import run` names a module by its alias
            yield from (f"{module}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes, by its last names where it begins in a call."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(name: str, source: str, package: str = "fedkeel") -> list[str]:
    """What breaks the layers in a file that belongs to the unit `name`."""
    found = []
    tree = ast.parse(source)
    for full in imports(tree, package):
        top, *rest = full.split(".")
        if top == "pickle" or full.startswith(("torch.load", "torch.serialization")):
            found.append(f"{full}: pickle")
        if top == "peft" and name != "model":
            found.append(f"{full}: only model.py imports peft")
        if top in ("flwr", "ray") and name != "flower":
            found.append(f"{full}: only flower.py imports Flower")
        if top == "fedkeel":
            other = rest[0]
            if name in FREE or other == name or other == "__version__":
                continue
            if other not in LEVEL:
                found.append(f"{full}: not in the table of layers")
            elif LEVEL[other] >= LEVEL[name]:
                found.append(f"{full}: {other} is no lower layer than {name}")
        elif name in PURE and top not in sys.stdlib_module_names and top not in OUTSIDE[name]:
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


def test_every_file_has_a_layer() -> None:
    assert len(sources()) > 20
    assert {unit(p) for p in sources()} - set(FREE) - set(LEVEL) == set()
    assert len(LEVEL) == sum(map(len, LAYERS))


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_lower_layers_only(path: Path) -> None:
    package = ".".join(("fedkeel", *path.relative_to(PACKAGE).parts[:-1]))
    assert offences(unit(path), path.read_text(encoding="utf-8"), package) == []


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("types", "from fedkeel.files import write_atomic", 1),  # a sibling is no lower layer
        ("aggregate", "from fedkeel.codecs import CODECS", 1),
        ("aggregate", "from fedkeel.config import Federation", 1),
        ("aggregate", "import peft", 2),  # not for it, and only model.py
        ("aggregate", "from flwr.common import Parameters", 2),  # not for it, and only flower.py
        ("cli", "def f():\n    import flwr", 1),
        ("run", "import ray", 1),
        ("metrics", "import safetensors.torch", 1),
        ("server", "def f():\n    from fedkeel.model import Model, load\n    import fedkeel.run", 1),
        ("server", "from fedkeel import run", 1),
        ("server", "from . import run", 1),
        ("server", "from .client import answer", 1),
        ("data", "if TYPE_CHECKING:\n    from fedkeel.model import Model", 1),
        ("model", "def f():\n    from fedkeel import evaluate", 1),
        ("run", "import fedkeel.unheard_of", 1),
        ("codecs", "import pickle", 1),
        ("run", "def f():\n    from pickle import loads", 1),
        ("run", "import torch\ntorch.load('x')", 1),
        ("client", "import torch\ndef f():\n    torch.manual_seed(3)", 1),
        ("partition", "import numpy as np\nnp.random.default_rng(1)", 1),
        ("partition", "import numpy as np\nnp.random.seed(1)", 1),
        ("partition", "from numpy.random import default_rng", 1),
    ],
)
def test_what_breaks_the_layers_is_caught(name: str, source: str, found: int) -> None:
    assert len(offences(name, source)) == found


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("aggregate", "from fedkeel.aggregate.common import Aggregate\nfrom fedkeel.types import Adapter\nimport torch, math"),
        ("metrics", "def f():\n    from rouge_score.rouge_scorer import RougeScorer"),
        ("model", "import peft\nfrom fedkeel.data import Batch"),
        ("rng", "import numpy as np\nnp.random.default_rng(1)"),
        ("cli", "from fedkeel import __version__, run"),
        ("client", "from fedkeel.rng import seed_torch\nseed_torch(1)\nseed = 3"),
    ],
)
def test_what_keeps_the_layers_passes(name: str, source: str) -> None:
    assert offences(name, source) == []


def test_imports_count_wherever_they_stand_and_however_they_are_written() -> None:
    text = "import a.b as c\nfrom d import e, f\nclass G:\n    def h(self):\n        from . import i\n        from ..j import k"
    assert sorted(imports(ast.parse(text), "fedkeel.report")) == ["a.b", "d.e", "d.f", "fedkeel.j.k", "fedkeel.report.i"]
