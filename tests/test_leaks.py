"""No text, token or number of a single row is in what a site sends, in a run's folder or in what is printed.

A whole federation runs over rows of words that stand nowhere else; every message both ways is taken apart, every file of the
folder is read, all that is printed is kept. What does travel is listed here key by key.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import make_adapter
from shapes import quickly
from tiny import tiny_rows
from torch import Tensor
from typer.testing import CliRunner

import fedkeel.runs.here
from fedkeel.cli import app
from fedkeel.data.format import Example, Formatter
from fedkeel.engines.sitefile import read_site
from fedkeel.engines.store import WorkError
from fedkeel.engines.work import handle, localised
from fedkeel.exchange.codecs import make_codec, open_envelope
from fedkeel.exchange.messages import pack, shapes_of
from fedkeel.federation.local import LocalTransport
from fedkeel.federation.train import Log
from fedkeel.recipe.load import load_recipe, make_recipe, read_tree
from fedkeel.recipe.settings import to_toml
from fedkeel.types import Reply, Request

WINDOW = 6  # tokens in a row that are one text's
UP = {  # all that a site says beside the change of its adapter
    "schema", "kind", "round", "codec", "layout", "site", "positions", "stats", "seconds", "held", "tasks",
}  # fmt: skip
DOWN = {"schema", "kind", "round", "codec", "layout", "drift", "memory", "shifts", "tasks", "unsent", "heads"}
GATES = ("a", "b", "w_gold", "w_rest")
STATS = {"loss", "distill_loss", *(f"gate_{gate}_{what}" for gate in GATES for what in ("mean", "q1", "q2", "q3"))}


@dataclass
class Secrets:
    """words: of the rows' texts. ids: each row's tokens. losses: of single rows, in nats a position."""

    words: set[str] = field(default_factory=set)
    ids: list[Sequence[int]] = field(default_factory=list)
    losses: set[float] = field(default_factory=set)

    @cached_property
    def windows(self) -> set[tuple[int, ...]]:
        """Runs of tokens that not every row has: those of all are the template's."""
        per_row = [{tuple(ids[at : at + WINDOW]) for at in range(len(ids) - WINDOW + 1)} for ids in self.ids]
        return set.union(*per_row) - set.intersection(*per_row)

    @cached_property
    def written(self) -> list[tuple[bytes, tuple[int, ...]]]:
        """Some windows of each row, as they could stand in bytes: whole numbers of any width, or numbers of a text."""
        found = []
        rows = ([tuple(ids[at : at + WINDOW]) for at in range(0, len(ids) - WINDOW + 1, WINDOW)] for ids in self.ids)
        for window in sorted({w for row in rows for w in row} & self.windows):
            texts = (between.join(map(str, window)).encode() for between in (", ", ",", " "))
            binary = (np.array(window, kind).tobytes() for kind in ("<u2", "<i4", "<i8", "<f4"))
            found += [(one, window) for one in (*texts, *binary)]
        return found

    def in_bytes(self, content: bytes) -> list[str]:
        """What of them stands in bytes: words as text, tokens as whole numbers of any width, or as numbers of JSON."""
        found = [w for w in self.words if any(w.encode(code) in content for code in ("utf-8", "utf-16-le", "utf-32-le"))]
        return found + [f"tokens {window}" for one, window in self.written if one in content]

    def in_numbers(self, values: np.ndarray) -> list[str]:
        """What of them stands among numbers."""
        ordered, losses = np.sort(values), np.array(sorted(self.losses))
        near = np.searchsorted(ordered, losses * (1 - 1e-6)) < np.searchsorted(ordered, losses * (1 + 1e-6))
        found = [f"loss {loss}" for loss in losses[near]]
        if len(values) >= WINDOW and np.isfinite(values).all():
            told = {tuple(window) for window in np.lib.stride_tricks.sliding_window_view(values, WINDOW).tolist()}
            found += [f"tokens {window}" for window in self.windows if window in told]
        return found

    def in_payload(self, payload: bytes, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """What of them stands in a message: in its bytes, its JSON, its tensors as sent and as decoded."""
        header, sent = open_envelope(payload)
        sizes = {name: shape for name, shape in shapes.items() if any(n.split("#")[0] == name for n in sent)}
        plain = {name: t for name, t in sent.items() if name.split("#")[0] in sizes}
        decoded = make_codec(header["codec"]).decode(plain, sizes)
        found = self.in_bytes(payload) + self.in_bytes(json.dumps(header, ensure_ascii=False).encode())
        numbers = [np.array(numbers_of(header)), *(arrays(sent)), *(arrays(decoded))]
        return found + [one for values in numbers for one in self.in_numbers(values)]


def arrays(tensors: Mapping[str, Tensor]) -> list[np.ndarray]:
    return [t.double().numpy().ravel() for t in tensors.values()]


def numbers_of(value: Any) -> list[float]:
    """Every number that stands anywhere in a JSON value, also within a text."""
    if isinstance(value, dict | list):
        return [n for inner in (value.values() if isinstance(value, dict) else value) for n in numbers_of(inner)]
    try:
        return [float(value)] if not isinstance(value, bool) else []
    except (TypeError, ValueError):
        return []


def secret_rows() -> list[dict[str, str]]:
    """Of `tiny_rows`, each with a word in its question, and in its answer where that is free, that stands nowhere else."""
    rows = []
    for number, row in enumerate(tiny_rows()):
        more = {"id": f"zqid{number:03d}zq", "input": f"{row['input']} zqask{number:03d}zq"}
        rows.append({**row, **more, **({"output": f"zqsay{number:03d}zq"} if row["task"] == "echo" else {})})
    return rows


@dataclass
class Heard:
    """What passed between the server and its sites. shapes: of the adapter's tensors."""

    down: list[bytes] = field(default_factory=list)
    up: list[bytes] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


def listen(monkeypatch: pytest.MonkeyPatch) -> tuple[Heard, Secrets]:
    """Hear every message, and learn what no message may tell."""
    heard, secrets = Heard(), Secrets({f"zq{what}{n:03d}" for what in ("ask", "say", "id") for n in range(72)})

    class Listening(LocalTransport):
        def exchange(self, requests: Sequence[Request], deadline: float) -> list[Reply]:
            replies = super().exchange(requests, deadline)
            assert not [r.error for r in replies if r.error]
            heard.down += [r.payload for r in requests]
            heard.up += [r.payload for r in replies]
            heard.shapes = shapes_of(self._model.initial.tensors())
            return replies

    def encode_all(self: Formatter, rows: Any) -> list[Example]:
        encoded = real(self, rows)
        secrets.ids += [e.ids for e in encoded]
        return encoded

    def add(self: Log, name: str, mean: Tensor, positions: int) -> None:
        secrets.losses.add(float(mean.detach()))  # of one row: train.micro_batch_size = 1
        told(self, name, mean, positions)

    real, told = Formatter.encode_all, Log.add
    monkeypatch.setattr(fedkeel.runs.here, "LocalTransport", Listening)
    monkeypatch.setattr(Formatter, "encode_all", encode_all)
    monkeypatch.setattr(Log, "add", add)
    return heard, secrets


def run_it(overrides: list[str], tmp_path: Path, more: list[str]) -> tuple[Path, str]:
    """(the run's folder, all that it printed)."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in secret_rows()))
    (data / "tasks.json").write_text(json.dumps({"colour": {"labels": ["red", "green", "blue"]}}))
    few = ["federation.rounds=2", "evaluation.samples=0", "train.micro_batch_size=1", "track=tensorboard"]
    told = CliRunner().invoke(app, ["run", *overrides, *few, f"data.root={data}", *more])
    assert told.exit_code == 0, (told.output, told.exception)
    return tmp_path / "tiny", told.output


GUIDED = ["distill.weight=0.5", "evaluation.baselines=base"]
SETTINGS = {
    "plain": ["evaluation.baselines=[]"],
    "counts by label, codes and places": [*GUIDED, "distill.trust_by=label", "federation.codec_up=topk=0.1+int4"],
    "private": [
        "privacy.unit=site", "privacy.clip=0.1", "privacy.noise=1", "federation.weighting=uniform", "evaluation.baselines=[]",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", quickly(("counts by label, codes and places",), SETTINGS))
def test_nothing_of_a_row_is_in_a_message_a_file_or_the_log(
    name: str, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    heard, secrets = listen(monkeypatch)
    folder, printed = run_it(tiny_overrides, tmp_path, SETTINGS[name])
    assert len(heard.up) == len(heard.down) == 6
    assert len(secrets.windows) > 500
    assert len(secrets.losses) > 20
    for payload in (*heard.down, *heard.up):
        assert secrets.in_payload(payload, heard.shapes) == []
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert {"rows.jsonl", "state.json", "report.html", "report.md", "recipe.toml", "round-0002.fkl"} <= {p.name for p in files}
    assert any("tfevents" in p.name for p in files)
    for path in files:
        found = secrets.in_bytes(path.read_bytes())
        if path.name == "scores.jsonl":  # for paired comparisons: the rows' ids and scores, and no text
            found = [one for one in found if not one.startswith("zqid")]
        assert found == [], path
    values = np.array([json.loads(line)["value"] for line in (folder / "rows.jsonl").read_text().splitlines()])
    assert secrets.in_numbers(values) == []
    assert secrets.in_bytes((printed + caplog.text).encode()) == []
    assert not [loss for loss in secrets.losses if f"{loss:.5f}" in printed + caplog.text]


def test_what_does_travel(tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything on that sends more. What this lists is docs/privacy.md's list."""
    heard, _ = listen(monkeypatch)
    run_it(tiny_overrides, tmp_path, SETTINGS["counts by label, codes and places"])
    for payload in heard.down:
        header, sent = open_envelope(payload)
        assert set(header) <= DOWN, set(header) - DOWN
        assert set(sent) == set(heard.shapes)
    for payload in heard.up:
        header, sent = open_envelope(payload)
        assert set(header) == UP, set(header) ^ UP
        assert set(header["stats"]) <= STATS, set(header["stats"]) - STATS
        assert {name.split("#")[0] for name in sent} == set(heard.shapes)
        wire = make_codec(header["codec"]).wire(heard.shapes)
        assert {
            n: (t.dtype, tuple(t.shape)) for n, t in sent.items()
        } == wire  # whatever the rows: types and sizes are the recipe's
        counts = header["tasks"]
        assert all(type(n) is int and n > 8 for n in counts.values())
        assert header["positions"] > 8


def test_a_leak_would_be_seen() -> None:
    """Of each kind, planted: in a name, in the JSON, in whole numbers, in numbers, and behind a codec."""
    like = make_adapter(0)
    shapes = shapes_of(like.tensors())
    ids = [list(range(40, 60)), list(range(40, 47)) + list(range(300, 330))]
    secrets = Secrets({"zqask001"}, ids, {5.4321})

    def seen(change: Mapping[str, Tensor] = like.tensors(), codec: str = "fp32", **told: Any) -> list[str]:
        return secrets.in_payload(pack("update", 1, like, make_codec(codec).encode(change, 1), codec, **told), shapes)

    def planted(values: Sequence[float]) -> dict[str, Tensor]:
        tensors = {name: t.clone() for name, t in like.tensors().items()}
        tensors["layer.0.q.a"].view(-1)[3 : 3 + len(values)] = torch.tensor(values)
        return tensors

    assert seen() == []
    assert "zqask001" in seen(site="the zqask001zq")
    assert "zqask001" in seen(tasks={"zqask001": 3})
    assert any(one.startswith("tokens (304,") for one in seen(tasks=ids[1][10:20]))
    assert any(one.startswith("tokens (304,") for one in seen(planted(ids[1][10:20])))
    assert any(one.startswith("tokens (304,") for one in seen(planted([float(n) for n in ids[1][10:20]]), "topk=0.5"))
    assert not [one for one in seen(planted(ids[0][:6])) if "tokens" in one]  # of every row: the template's
    assert seen(planted([5.4321])) == ["loss 5.4321"] * 2  # as sent and as decoded
    assert seen(stats={"loss": 5.4321}) == ["loss 5.4321"]
    assert seen(seconds=f"{5.4321:012.4f}") == ["loss 5.4321"]
    assert math.isclose(numbers_of({"a": [True, "x", "5.4321"]})[0], 5.4321)


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (["data.files=/elsewhere/notes.jsonl"], "data.files = '/elsewhere/notes.jsonl' leaves data.root"),
        (["data.files=rows.jsonl,../notes.jsonl"], "data.files = '../notes.jsonl' leaves data.root"),
        (["data.files=C:\\notes.jsonl"], r"data.files = 'C:\\notes.jsonl' leaves data.root"),
        (["data.tasks_file=../notes.txt"], "data.tasks_file = '../notes.txt' leaves data.root"),
        (["data.tasks_file=~/notes.txt"], "data.tasks_file = '~/notes.txt' leaves data.root"),
        (["data.source=hub", "data.dataset=HERE"], "leaves data.root"),
    ],
)
def test_no_recipe_reads_where_a_site_did_not_say(
    sent: list[str], told: str, tiny_overrides: list[str], tiny_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "site.toml").write_text(f'name = "ward-0"\n[data]\nroot = "{tiny_data}"\n')
    site = read_site(tmp_path / "site.toml")
    text = to_toml(
        make_recipe(read_tree(None, [*tiny_overrides, *(key.replace("HERE", str(tmp_path)) for key in sent)]), data=False)
    )
    with pytest.raises(WorkError) as refused:
        localised(text, site)
    assert told in str(refused.value)
    assert "site.toml to say: set" in str(refused.value)


def test_what_a_site_names_itself_may_lie_anywhere(tiny_overrides: list[str], tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    files = f'files = ["{tiny_data}/rows.jsonl"]\ntasks_file = "{tiny_data}/tasks.json"\n'
    (tmp_path / "site.toml").write_text(f'name = "ward-0"\n[data]\nroot = "inside"\n{files}')
    recipe = localised(to_toml(make_recipe(read_tree(None, tiny_overrides))), read_site(tmp_path / "site.toml"))
    assert recipe.data.files == (f"{tiny_data}/rows.jsonl",)


def test_a_chat_template_that_was_sent_is_no_file_of_the_site(
    tiny_overrides: list[str], tiny_data: Path, tmp_path: Path
) -> None:
    """A path in it stays a path; what goes wrong with it tells of no file's text."""
    secret = tmp_path / "notes.txt"
    secret.write_text("Mrs Smith has the flu")
    (tmp_path / "site.toml").write_text(f'name = "ward-0"\n[data]\nroot = "{tiny_data}"\n')
    site = read_site(tmp_path / "site.toml")
    text = to_toml(load_recipe(None, tiny_overrides)).replace('chat_template = ""', f'chat_template = "{secret}"')
    assert localised(text, site).model.chat_template == str(secret)
    header = {"run": "r", "id": "0", "site": "ward-0", "kind": "hello", "recipe": text}
    answer, _ = handle(header, b"", site)
    assert "model.chat_template" in answer["error"]
    assert "Smith" not in answer["error"]
    # at home a template's file is read
    assert load_recipe(None, [*tiny_overrides, f"model.chat_template={secret}"]).model.chat_template == secret.read_text()
