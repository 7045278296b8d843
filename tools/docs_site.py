"""Gather the docs' pages, and what they show, in build/site/pages, for MkDocs to build a site of: `make docs`.

Pages are the README and every Markdown file that a page links to, in the places they have in the repository, so that links hold
as they stand; the README becomes the first page. Pictures and small text files that pages link to come along. What is linked to
and is no such file, as a folder, becomes plain text: the site has nothing to show there.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "build" / "site" / "pages"
SHOWN = {".svg", ".png", ".toml", ".txt", ".py", ".ipynb", ".sh"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.DOTALL | re.MULTILINE)


def gather() -> list[str]:
    """Write all pages anew; their paths, as in the repository."""
    shutil.rmtree(PAGES, ignore_errors=True)
    todo, done = ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))], []
    while todo:
        page = todo.pop()
        if page not in done:
            done.append(page)
            text, pages, files = linked(page, (ROOT / page).read_text(encoding="utf-8"))
            todo += pages
            _write(placed(page), text.encode())
            for file in files:
                _write(file, (ROOT / file).read_bytes())
    return done


def placed(page: str) -> str:
    """Where a page of the repository stands on the site."""
    return "index.md" if page == "README.md" else page


def linked(page: str, text: str) -> tuple[str, list[str], list[str]]:
    """A page's text with its links as the site has them, and the pages and files that it links to."""
    pages: list[str] = []
    files: list[str] = []

    def one(found: re.Match[str]) -> str:
        mark, words, target = found.groups()
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path:
            return found[0]
        to = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
        if (ROOT / to).is_file() and to.endswith(".md"):
            pages.append(to)
            here = posixpath.relpath(placed(to), posixpath.dirname(page) or ".")
            return f"[{words}]({here}{'#' * bool(anchor)}{anchor})"
        if (ROOT / to).is_file() and Path(to).suffix in SHOWN:
            files.append(to)
            return found[0]
        if not (ROOT / to).exists():
            raise SystemExit(f"{page}: there is no {to}")
        return words if not mark else found[0]

    parts = CODE.split(text)
    return "".join(p if n % 2 else LINK.sub(one, p) for n, p in enumerate(parts)), pages, files


def _write(path: str, content: bytes) -> None:
    target = PAGES / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)


if __name__ == "__main__":
    print(f"{len(gather())} pages")
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    sys.exit(subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"], cwd=ROOT, env=quiet).returncode)
