"""Write docs/keys.md, the reference of every key of a recipe, from the schema.

    python tools/keys_page.py

`tests/test_docs.py` fails where page and schema disagree.
"""

from __future__ import annotations

from pathlib import Path

from fedkeel.files import write_atomic
from fedkeel.recipe.reference import Key, Section, sections

PAGE = Path(__file__).resolve().parent.parent / "docs" / "keys.md"
HEAD = """# Every key of a recipe

Made from the schema by `python tools/keys_page.py`; `fedkeel keys [SECTION]` prints the same. A key is written in its section,
or dotted on the command line: `train.lr=1e-3`. What keys demand of each other is checked before any work, and the error says
what would be right. What they are for: [recipes.md](recipes.md); the method's formulas: [method.md](method.md); words:
[glossary.md](glossary.md).
"""


def page() -> str:
    """The page as the schema gives it."""
    return "\n".join([HEAD, *(_section(section) for section in sections())])


def _section(section: Section) -> str:
    title = f"## [{section.name}]" if section.name else "## At the top"
    lines = ["| key | type | default | unit | meaning |", "|---|---|---|---|---|", *map(_line, section.keys)]
    return f"{title}\n\n{section.about}\n\n" + "\n".join(lines) + "\n"


def _line(key: Key) -> str:
    colon = ": " if key.allowed.startswith("`") else ", " if key.allowed else ""
    cells = (f"`{key.name.rpartition('.')[2]}`", f"{key.kind}{colon}{key.allowed}", f"`{key.default}`", key.unit, key.about)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    write_atomic(PAGE, page())
