"""What the docs show is what the software does: the reference of keys, links, and the walk of docs/your-data.md."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import pytest
from test_run import adapter_of, same
from typer.testing import CliRunner

import docs_site
import keys_page
from fedkeel.cli import app
from fedkeel.recipe.reference import sections
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import known_keys, toml_value, tree_of

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "results").rglob("README.md")])


def test_every_key_is_in_the_reference_once_with_its_meaning_and_default() -> None:
    found = [key for section in sections() for key in section.keys]
    assert sorted(key.name for key in found) == sorted(known_keys(Recipe))
    tree = tree_of(Recipe())
    for key in found:
        section, _, name = key.name.rpartition(".")
        kind, _, entry = section.partition(".")
        held = asdict(Recipe().options(kind, entry)) if entry else tree[section] if section else tree
        value = held[name]
        assert key.default == toml_value(value), key
        assert len(key.about) >= 3, key
        assert key.kind


def test_the_page_of_keys_is_what_the_schema_says() -> None:
    assert keys_page.PAGE.read_text(encoding="utf-8") == keys_page.page(), "python tools/keys_page.py"


def test_the_command_tells_the_same() -> None:
    told = CliRunner().invoke(app, ["keys", "lora"])
    assert told.exit_code == 0
    assert "lora.rank" in told.output
    assert "train.lr" not in told.output
    wrong = CliRunner().invoke(app, ["keys", "lroa"])
    assert "there is no section 'lroa'" in str(wrong.exception)


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    found: dict[str, int] = {}
    made = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        name = slug(heading)
        made.add(f"{name}-{found[name]}" if name in found else name)
        found[name] = found.get(name, 0) + 1
    return made


@pytest.mark.parametrize("path", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_no_link_is_broken(path: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        to = (path.parent / file).resolve() if file else path
        if not to.exists() or (anchor and to.suffix == ".md" and anchor not in anchors(to)):
            broken.append(target)
    assert not broken


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page whose fence names the language."""
    parts = re.split(r"^```(.*)\n", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [text for named, text in zip(parts[1::4], parts[2::4], strict=True) if named == language]


@pytest.mark.slow
def test_your_data_in_ten_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's own data, recipe, commands and snippets, its rounds cut to two."""
    monkeypatch.chdir(tmp_path)
    make, load, python = blocks("your-data.md", "python")
    exec(compile(make, "make", "exec"), {})
    assert sorted(p.name for p in Path("mail").iterdir()) == ["harbour.csv", "north.csv", "south.csv"]
    (recipe,) = blocks("your-data.md", "toml")
    Path("mail.toml").write_text(recipe)
    few = ["federation.rounds=2", "federation.patience=1", "train.local_steps=2", "threads=1", "evaluation.test_rows=20"]
    commands = [
        line.partition("#")[0].split()[1:]
        for block in blocks("your-data.md", "")
        for line in block.splitlines()
        if line.startswith("fedkeel ") and '"' not in line
    ]
    assert [c[0] for c in commands] == ["run", "doctor", "doctor", "run", "doctor", "export"]
    for command in commands:
        told = CliRunner().invoke(app, [*command, *(few if command[1] == "mail.toml" else [])])
        assert told.exit_code == 0, (command, told.output, told.exception)
        if "--dry-run" in command:
            assert "north" in told.output
    assert "federated" in Path("runs/mail/report.md").read_text()
    assert {"report.html", "adapter", "best", "rows.jsonl"} <= {p.name for p in Path("runs/mail").iterdir()}
    asked = CliRunner().invoke(app, ["ask", "runs/mail", "I lost my card", "--task", "default"])
    assert re.search(r"federated: (card|loan|account|transfer) \(\d+%\)", asked.output), asked.output
    held: dict[str, object] = {}
    exec(compile(load, "load", "exec"), held)
    from safetensors.torch import load_file

    assert same(load_file("mail-adapter/adapter_model.safetensors"), adapter_of(Path("runs/mail")))
    trained = [n for n, p in held["model"].named_parameters() if "lora_B" in n and p.abs().sum() > 0]  # type: ignore[attr-defined]
    assert trained
    rows = [{"text": f"my card {n}", "label": "card" if n % 2 else "loan"} for n in range(40)]
    quick = python.replace('"mail.toml"', '{"federation.rounds": 1, "train.local_steps": 1, "name": "mine", "threads": 1}')
    exec(compile(quick, "python", "exec"), {"frame": rows, "rows": rows})
    assert Path("runs/mine/best").is_dir()


def test_pages_of_the_site_link_as_those_of_the_repository() -> None:
    picture = "![d](../results/main-job/x.svg)"
    text = f"[a](../README.md#two-commands) [b](../results/suites) [c](method.md) {picture} `[e](no.md)` [f](#g)"
    with pytest.raises(SystemExit, match=r"docs/keys.md: there is no results/main-job/x\.svg"):
        docs_site.linked("docs/keys.md", text)
    told, pages, files = docs_site.linked("docs/keys.md", text.replace("x.svg", "clinc150-minilm/curve.svg"))
    picture = picture.replace("x.svg", "clinc150-minilm/curve.svg")
    assert told == f"[a](../index.md#two-commands) b [c](method.md) {picture} `[e](no.md)` [f](#g)"
    assert pages == ["README.md", "docs/method.md"]
    assert files == ["results/main-job/clinc150-minilm/curve.svg"]


def test_every_page_of_the_docs_is_in_the_sites_contents() -> None:
    named = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")} <= named
