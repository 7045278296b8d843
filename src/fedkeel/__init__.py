"""FedKeel: federated fine-tuning of language models that keeps its course when the sites' data differ.

From Python: `run` a recipe over rows of your own, `load` a finished run; both give a `Result`. Nothing heavy is imported until
one of these is asked for.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["FedKeelError", "Recipe", "Record", "Result", "load", "run"]

_WHERE = {
    "FedKeelError": "types", "Recipe": "recipe.schema", "Record": "types", "Result": "api", "load": "api", "run": "api",
}  # fmt: skip

# Threads of torch that wait for each other otherwise spin: beside any other busy process that made a run on two cores
# 15 times as long, and on idle ones no shorter. It is read once, when torch is loaded; who set it already is heard.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from fedkeel.api import Result, load, run
    from fedkeel.recipe.schema import Recipe
    from fedkeel.types import FedKeelError, Record


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
