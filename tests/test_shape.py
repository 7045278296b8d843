"""The shape of the code: functions that are read at a glance."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "fedkeel"
LINES, PARAMETERS = 60, 6  # of a function, at most
COMMANDS = ("command", "callback")  # methods of a typer application: each option of a command is a parameter


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The names of a function's parameters but `self` and `cls`."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return [one.arg for one in named if one.arg not in ("self", "cls")]


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    called = [node.func for node in function.decorator_list if isinstance(node, ast.Call)]
    return any(isinstance(one, ast.Attribute) and one.attr in COMMANDS for one in called)


def too_large(source: str) -> list[str]:
    """The functions of a file that are too long or take too many parameters. Lines of those inside count to both."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines, taken = node.end_lineno - node.lineno + 1, len(parameters(node))
            if lines > LINES:
                found.append(f"{node.name}: {lines} lines")
            if taken > PARAMETERS and not is_command(node):
                found.append(f"{node.name}: {taken} parameters")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_are_short_and_take_few_things(path: Path) -> None:
    assert too_large(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(a, /, b, *, c, d, e, f): ...", []),
        ("def f(a, b, c, d, e, f, *more): ...", ["f: 7 parameters"]),
        ("class G:\n    def f(self, a, b, c, d, e, f): ...", []),
        ("class G:\n    async def f(self, a, b, c, d, e, f, **more): ...", ["f: 7 parameters"]),
        ("@app.command()\ndef f(a, b, c, d, e, f, g): ...", []),
        ("@cache\ndef f(a, b, c, d, e, f, g): ...", ["f: 7 parameters"]),
        ("def f():\n" + 59 * "    pass\n", []),
        ("@app.command()\ndef f():\n" + 60 * "    pass\n", ["f: 61 lines"]),
        ("def f():\n    '''" + 58 * "\n" + "'''\n    def g():\n        pass", ["f: 62 lines"]),
    ],
)
def test_what_is_too_large_is_caught(source: str, found: list[str]) -> None:
    assert too_large(source) == found
