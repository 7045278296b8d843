"""Every parser that meets bytes or files from outside, against random bytes and altered valid inputs: the right thing comes
back, or an error of ours that names the file; no other exception, no hang, and no more memory than a small input asks for.

`pytest -m slow tests/test_fuzz.py` tries over 100,000 cases; a day's run a few hundred each. test_hostile.py knows the
envelope's inside better; here it is one parser of many.
"""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import SHAPES, crafted, make_adapter, numbers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_coordinate import HELLO

from fedkeel.data.sources import load_records
from fedkeel.deploy.manifest import read_manifest
from fedkeel.engines.coordinate import read_sums as read_scores
from fedkeel.engines.coordinate import vetted
from fedkeel.engines.hello import HelloError, read_hello
from fedkeel.engines.sitefile import read_members, read_site
from fedkeel.evidence.suites.plan import PLANS, load_plan
from fedkeel.exchange.codecs import EnvelopeError
from fedkeel.exchange.messages import pack, pack_global, pack_tensors, unpack_global, unpack_shift
from fedkeel.exchange.sums import pack_foretold, pack_known, pack_sums, read_foretold, read_sums
from fedkeel.federation.screen import Expected, screen
from fedkeel.method.objective.anchor import SCALES, SumsError, added, head_of, sums_of
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.reference import sections
from fedkeel.recipe.schema import Data, Recipe
from fedkeel.recipe.settings import known_keys, to_toml
from fedkeel.runs.folder import RunError, RunFolder
from fedkeel.types import FedKeelError, Global, Reply

ROOT = Path(__file__).parents[1]
SECONDS, MEMORY = 5.0, 2**28  # of one case; of all cases of a parser together, in bytes
FEW, MANY = 120, 9000  # cases of a parser; of some a part

# What parsers have stumbled over: deep nesting, numbers of too many digits, names no system has, dates, half characters.
DEEP = 3000
COMMON = [
    b"",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\n",
    b'"',
    b"'",
    b",",
    b"{",
    b"}",
    b"[",
    b"[" * DEEP,
    b"9" * 5000,
    b"-1",
    b"1e999",
]
TOML = [
    *(b"true", b"0", b"-1", b"7", b"1e9", b"nan", b"-inf", b"0x7fffffffffffffffffff", b"1979-05-27", b"07:32:00", b"[]", b"{}"),
    *(
        b'""',
        b'"x"',
        b'"~nobody-of-this-name/x"',
        b'"\\u0000"',
        b'"' + b"n" * 300 + b'"',
        b"[[1], 2]",
        b"[1979-05-27]",
        b"[[1979-05-27]]",
    ),
    *(
        b'["x"]',
        b'["a=b"]',
        b'["/"]',
        b"{x = 1}",
        b"[{x = 1}]",
        b"9" * 5000,
        b"[" * DEEP,
        b'"../.."',
        b'"{{"',
        b'"*"',
        b'"a\\u2028b"',
    ),
    *(
        b'"topk=nan"',
        b'"topk=1e-400+int4"',
        b'"int4+topk=0.5"',
        b'"fp32+fp32"',
        b'[""]',
        b"4294967296",
        b'"a\\nb"',
        b'"\\u202e"',
    ),
]
JSON = [
    *(b"null", b"true", b"0", b"-1", b"0.5", b"1e999", b"NaN", b'""', b'"x"', b"[]", b"{}", b"[null]", b"[[]]", b'{"a": {}}'),
    *(
        b'"\\ud800"',
        b'"\\u0000"',
        b"9" * 5000,
        b"[" * DEEP,
        b'"' + b"n" * 300 + b'"',
        b'"test"',
        b'"../x"',
        b"2305843009213693952",
    ),
    *(
        b'{"\\ud800": 1}',
        b'["x"]',
        b'[{"role": "user", "content": "x"}]',
        b'{"x": [1, 2]}',
        b"18446744073709551617",
        b'[{"x": 1}]',
    ),
]

MORE = 7  # single bytes, beside a parser's tokens

Edit = tuple[str, float, float, int]


def edits(tokens: Sequence[bytes]) -> st.SearchStrategy[list[Edit]]:
    """Up to three changes: what, where and how far as shares of the length, and which of `tokens`, or of a few bytes."""
    what = st.sampled_from(["flip", "cut", "splice", "repeat", "insert", "value", "value", "value"])
    share = st.floats(0, 1, exclude_max=True)
    return st.lists(st.tuples(what, share, share, st.integers(0, len(tokens) + MORE)), min_size=1, max_size=3)


def value_at(body: bytes, at: int) -> tuple[int, int]:
    """Where the value begins and ends of the line of TOML, or the member of JSON, that position `at` is in."""
    begin = max(body.rfind(b"=", 0, at), body.rfind(b":", 0, at)) + 1
    ends = [end for end in (body.find(c, begin) for c in (b"\n", b", ", b"}")) if end >= 0]
    return begin, min(ends, default=len(body))


def altered(body: bytes, todo: Sequence[Edit], tokens: Sequence[bytes]) -> bytes:
    """`body` after the changes. A splice is of a piece of itself, a value is replaced whole."""
    for what, share, far, which in todo:
        at = int(share * len(body))
        end = at + int(far**3 * (len(body) - at))  # short pieces are the more telling
        token = tokens[which] if which < len(tokens) else bytes([31 * (which - len(tokens))])
        if what == "flip" and body:
            body = body[:at] + bytes([body[at] ^ 1 << which % 8]) + body[at + 1 :]
        elif what == "cut":
            body = body[:at] + body[end:]
        elif what == "splice":
            to = which * len(body) // (len(tokens) + MORE + 1)
            body = body[:to] + body[at:end] + body[to:]
        elif what == "repeat":
            body = body[:end] + body[at:end] * (1 + which % 9) + body[end:]
        elif what == "insert":
            body = body[:at] + token + body[at:]
        else:
            begin, over = value_at(body, at)
            body = body[:begin] + b" " + token + body[over:]
    return body


@dataclass(frozen=True)
class Parser:
    """valid: inputs that are read as they stand. tokens: that are put into them. read: raises for what cannot be read; what it
    gives back is what the valid input gives. refuses: the kinds of error that it may raise. named: parts of the error's text,
    one of which must be there."""

    valid: Sequence[bytes]
    tokens: Sequence[bytes]
    read: Callable[[bytes], Any]
    refuses: tuple[type[Exception], ...] = (FedKeelError,)
    named: Collection[str] = ()

    def outcome(self, body: bytes) -> str:
        """`taken` or `refused`; anything else fails the test."""
        begin, told = time.perf_counter(), None
        try:
            self.read(body)
        except self.refuses as error:
            told = str(error)
        assert time.perf_counter() - begin < SECONDS
        if told is None:
            return "taken"
        assert told.strip()
        assert not self.named or any(name in told for name in self.named), f"names nothing: {told}"
        return "refused"


def fuzz(parser: Parser, cases: int) -> None:
    """`cases` altered inputs, and a tenth as many of random bytes."""
    for body in parser.valid:
        assert parser.outcome(body) == "taken"
    seen: Counter[str] = Counter()
    quiet = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @settings(max_examples=cases, **quiet)
    @given(st.sampled_from(parser.valid), edits(parser.tokens))
    def changed(body: bytes, todo: list[Edit]) -> None:
        seen[parser.outcome(altered(body, todo, parser.tokens))] += 1

    @settings(max_examples=max(20, cases // 10), **quiet)
    @given(st.binary(max_size=200))
    def random(body: bytes) -> None:
        parser.outcome(body)

    changed()
    random()
    assert min(seen["taken"], seen["refused"]) > cases // 100, seen  # neither all noise nor all harmless
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MEMORY


counts = pytest.mark.parametrize("cases", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])


# ------------------------------------------------------------------------------------------------------------- messages


LIKE = make_adapter(0)
TOLD = {"positions": 3, "stats": {"loss": 1.0}, "seconds": "00000001.000", "tasks": {"a": 2}, "held": 0, "site": "a"}
STATE = Global(
    2, LIKE, memory=make_adapter(1), drift={"0": 0.5}, shifts=[{"layer.0.q": (numbers(1, 10, 2), numbers(2, 2, 14))}]
)


def sealed(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """The checksum made right, as any sender can: what the fuzz alters is the body."""
    return lambda body: read(crafted(body))


def update_of(payload: bytes) -> None:
    found = screen(Reply("a", payload), Expected(1, LIKE))
    assert found.positions >= 1
    assert all(torch.isfinite(t).all() and t.shape == LIKE.tensors()[n].shape for n, t in found.adapter.tensors().items())


def global_of(payload: bytes) -> None:
    _, found = unpack_global(payload, "global", LIKE)
    for adapter in (found.adapter, found.memory or LIKE):
        assert all(torch.isfinite(t).all() and t.shape == LIKE.tensors()[n].shape for n, t in adapter.tensors().items())
    for entry in found.shifts:
        for path, (left, right) in entry.items():
            assert (left @ right).shape == SHAPES[path]


@counts
def test_updates(cases: int) -> None:
    valid = [pack("update", 1, LIKE, LIKE.tensors(), "fp32", **TOLD)[36:]]
    fuzz(Parser(valid, [*COMMON, *JSON], sealed(update_of), (EnvelopeError,)), cases)


@counts
def test_global_states(cases: int) -> None:
    fuzz(Parser([pack_global("global", STATE, since=0)[36:]], [*COMMON, *JSON], sealed(global_of), (EnvelopeError,)), cases)


SUMS = {"t": sums_of(torch.tensor([[3, -2, 64], [1, 5, 64], [0, 2, 64]]), ["a", "b", "a"])}


def known_of(payload: bytes) -> None:
    found = read_sums(Reply("a", payload), 0, 0, LIKE)
    for task, sums in found.items():
        twice = added([sums, sums])
        assert int(twice.gram.abs().max()) < 2**62
        with suppress(SumsError):
            assert torch.isfinite(head_of(twice, 0.0).weight).all()
        assert pack_known({task: twice})


@counts
def test_sums_of_rows(cases: int) -> None:
    fuzz(Parser([pack_sums("a", 0, LIKE, SUMS)[36:]], [*COMMON, *JSON], sealed(known_of), (EnvelopeError,)), cases)


def foretold_of(payload: bytes) -> None:
    found = read_foretold(Reply("a", payload), 0, LIKE, SUMS)
    assert pack_known({task: added([sums, sums]) for task, sums in found.items()})


@counts
def test_outcomes_of_the_trial(cases: int) -> None:
    valid = pack_foretold("a", 0, LIKE, {"t": ({"a": 1, "b": 1}, [0.5] * len(SCALES))})[36:]
    fuzz(Parser([valid], [*COMMON, *JSON], sealed(foretold_of), (EnvelopeError,)), cases)


@counts
def test_hellos(cases: int) -> None:
    """As `courier` reads an answer: JSON first."""
    pytest.importorskip("flwr", reason="the extra fedkeel[flower] is not installed")
    from fedkeel.engines.flower.courier import FlowerError, unpack

    valid = json.dumps({"hello": HELLO}).encode()

    def read(body: bytes) -> None:
        content: Any = {"fedkeel": {"header": body.decode(errors="replace")}}
        found = read_hello(unpack(SimpleNamespace(content=content))[0].get("hello"))
        assert found.trained(0) >= 0 <= found.held(0, "train")
        assert vetted(dict(found.one), found) in ("", "refused before training: it has no training row")

    fuzz(Parser([valid], [*COMMON, *JSON, b"[" * 200_000], read, (HelloError, FlowerError)), cases)


@counts
def test_scores_of_a_site(cases: int) -> None:
    """What is taken can be added up, told and written."""
    valid = json.dumps({"sums": {"0": {"t": {"score": [1.5, 2], "accuracy": [1.0, 2], "nats": [30.0, 7]}}}}).encode()

    def read(body: bytes) -> None:
        for tasks in read_scores(json.loads(body), 2, 5, 64).values():
            for measures in tasks.values():
                for name, (total, count) in measures.items():
                    assert 0 <= total / count <= (1e6 if name == "nats" else 1)

    errors = (KeyError, TypeError, ValueError, AttributeError, RecursionError)  # as `Away.score` takes them
    fuzz(Parser([valid], [*COMMON, *JSON], read, errors), cases)


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was cut off after its second round."""
    folder = RunFolder(tmp_path_factory.mktemp("run") / "run")
    state = folder.open(Recipe(), False, False, {"the base": "0"})
    for round in (1, 2):
        kept = {site: {"residual.x": numbers(round, 3)} for site in ("a", "b")}
        now = Global(
            round, LIKE, counts={"a": {"x": 1}}, shifts=[*STATE.shifts] * round, held={"a": 1}, optimiser={"m": numbers(3, 2)}
        )
        folder.write_checkpoint("federated", now, kept)
        state = folder.save(replace(state, leg="federated", round=round), [])
    return folder.path


def resumed(path: Path) -> None:
    """What `--resume` reads of a folder before a model is asked."""
    folder = RunFolder(path)
    state = folder.open(Recipe(), True, False, {"the base": "0"})
    leg, round = state.leg, state.round
    if not round:
        return
    found = folder.read_checkpoint(leg, round, LIKE)
    assert found.round >= 0
    for entry in found.shifts:
        for name, (left, right) in entry.items():
            assert (left @ right).shape == SHAPES[name]
    folder.read_kept(leg, round, LIKE)
    folder.exchanged()


@counts
@pytest.mark.parametrize(
    "name",
    [
        "state.json",
        "recipe.toml",
        "checkpoints/federated/round-0002.fkl",
        "checkpoints/federated/shift-0001.fkl",
        "checkpoints/federated/kept-0002/optimiser.fkl",
    ],
)
def test_a_runs_folder(run: Path, name: str, cases: int, tmp_path: Path) -> None:
    """One file altered, a checksum made right; the round before is whole, and may be gone on from."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    state, recipe = (run / "state.json").read_bytes(), (run / "recipe.toml").read_bytes()

    def read(body: bytes) -> None:
        (copy / "state.json").write_bytes(state)
        (copy / "recipe.toml").write_bytes(recipe)
        (copy / name).write_bytes(crafted(body) if name.endswith(".fkl") else body)
        resumed(copy)
        if name.endswith(".fkl"):  # also where `open` went back to the round before
            RunFolder(copy).read_checkpoint("federated", 2, LIKE)
            RunFolder(copy).read_kept("federated", 2, LIKE)

    whole = (run / name).read_bytes()
    body = whole[36:] if name.endswith(".fkl") else whole
    tokens = [*COMMON, *(TOML if name.endswith(".toml") else JSON)]
    fuzz(Parser([body], tokens, read, (FedKeelError,), [str(copy)]), cases if name == "state.json" else cases // 4)


# ------------------------------------------------------------------------------------------------------- recipes and plans


def file_reader(path: Path, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    def from_bytes(body: bytes) -> Any:
        path.write_bytes(body)
        return read(path)

    return from_bytes


KEYS = {*known_keys(Recipe), *(section.name for section in sections())}


@counts
def test_recipes(cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with a value is told by its key, as it may come from an override."""
    monkeypatch.chdir(tmp_path)
    short = b'name = "x"\n[model]\nchat_template = "none"\n[data]\nsource = "files"\nroot = "."\nfiles = ["r.toml"]\n'
    valid = [to_toml(Recipe()).encode(), (ROOT / "recipes" / "quickstart.toml").read_bytes(), short]

    def read(path: Path) -> None:
        assert isinstance(load_recipe(path), Recipe)

    fuzz(Parser(valid, [*COMMON, *TOML], file_reader(tmp_path / "r.toml", read), named=[str(tmp_path), *KEYS]), cases)


@counts
def test_overrides(cases: int) -> None:
    valid = [
        f"{key}={value}".encode() for key, value in {"seed": 3, "lora.rank": 4, "name": "x", "stream.stages": '["a"]'}.items()
    ]

    def read(body: bytes) -> None:
        load_recipe(None, [body.decode("utf-8", "surrogateescape")])

    fuzz(Parser(valid, [*COMMON, *TOML, b"name", b"out", b".", b"model", b"chat_template="], read), cases)


@counts
def test_plans(cases: int, tmp_path: Path) -> None:
    short = b'[streams.a]\nset = ["a=b"]\n[methods.m]\nset = []\n[knobs]\n"train.lr" = [0.1]\n"stream.stages" = [["a"]]\n'
    valid = [*((PLANS / f"{n}.toml").read_bytes() for n in ("sensitivity", "main")), short]

    def read(path: Path) -> None:
        plan = load_plan(str(path))
        assert plan.reference in plan.methods
        for stream in plan.streams.values():
            stream.settings()

    fuzz(Parser(valid, [*COMMON, *TOML], file_reader(tmp_path / "p.toml", read), named=[str(tmp_path / "p.toml")]), cases)


# ------------------------------------------------------------------------------------------------------------------ rows


ROWS = [
    {"id": 1, "split": "train", "text": "a, b", "label": "no_yes", "ward": "north"},
    {"split": "train", "instruction": "Say.", "input": "x", "output": "y", "history": [["a", "b"]], "ward": "south"},
    {"split": "test", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}], "ward": "w"},
]
TASKS = {
    "tasks": {"default": {"instruction": "Do.", "labels": [], "label_domain": {"x": "y"}}, "b": {"labels": ["c", "d"]}},
    "references": {"1": ["no yes", "no"]},
}


@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.csv", "tasks.json"])
@counts
def test_rows(kind: str, cases: int, tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    table = 'id,split,text,label,ward\n1,train,"a, ""b""",x,north\n2,train,"c\nd",y,south\n3,test,e,x,north\n'
    content = {"rows.jsonl": lines, "rows.csv": table, "tasks.json": json.dumps(TASKS)}
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    rows = kind if kind != "tasks.json" else "rows.jsonl"
    config = Data(source="files", root=str(tmp_path), files=(rows,), tasks_file="tasks.json", site_column="ward")

    def read(path: Path) -> None:
        for record in load_records(config, 1):
            assert all(type(text) is str for text in (record.id, record.instruction, *record.references, *record.labels))
            repr(record).encode()
            json.dumps([record.id, record.task, record.input, record.site, record.group], ensure_ascii=False).encode()

    fuzz(
        Parser([content[kind].encode()], [*COMMON, *JSON], file_reader(tmp_path / kind, read), named=[str(tmp_path)]),
        cases if kind == "rows.jsonl" else cases // 2,
    )


# ------------------------------------------------------------------------------------------------------------ deployments


SITE = b"""name = "north"
state = "state"
device = "cpu"
threads = 2
recipe_sha256 = "ab"
[model]
base = "./base"
[data]
root = "rows"
files = ["a.jsonl"]
[worker]
warm = true
socket = "/run/x.sock"
key = "k"
idle = 60.0
"""
MANIFEST = json.dumps(
    dict.fromkeys(("fedkeel", "coordinator", "recipe", "base", "base_sha256", "tokenizer_sha256"), "x") | {"sites": ["a", "b"]}
).encode()


@counts
def test_site_files(cases: int, tmp_path: Path) -> None:
    def read(path: Path) -> None:
        site = read_site(path)
        assert site.name
        assert site.threads >= 1
        assert site.socket.is_absolute()

    fuzz(Parser([SITE], [*COMMON, *TOML], file_reader(tmp_path / "s.toml", read), named=[str(tmp_path / "s.toml")]), cases)


@counts
def test_member_lists(cases: int, tmp_path: Path) -> None:
    valid, tokens = b"123 north\n18446744073709551615 the south\n", [*COMMON, "\u0663".encode(), b" ", "²".encode(), b"0x1 a"]
    fuzz(
        Parser([valid], tokens, file_reader(tmp_path / "members", read_members), named=[str(tmp_path / "members")]), cases // 2
    )


@counts
def test_manifests(cases: int, tmp_path: Path) -> None:
    def read(path: Path) -> None:
        assert all(type(read_manifest(path)[key]) is str for key in ("coordinator", "recipe", "base"))

    fuzz(
        Parser([MANIFEST], [*COMMON, *JSON], file_reader(tmp_path / "m.json", read), named=[str(tmp_path / "m.json")]),
        cases // 2,
    )


# ------------------------------------------------------------------------------------------------ what was found this way


DEEP_TOML, DEEP_JSON, LONG = f"v = {'[' * DEEP}", "[" * DEEP, "9" * 5000
FOUND: dict[str, tuple[str, str, str]] = {  # name -> (file, content, what the error says)
    "a recipe nested too deep": ("r.toml", DEEP_TOML, "cannot be read: maximum recursion"),
    "a recipe's number of too many digits": ("r.toml", f"seed = {LONG}", "cannot be read: Exceeds the limit"),
    "tasks nested too deep": ("tasks.json", DEEP_JSON, "(data.tasks_file) cannot be read"),
    "tasks whose labels are a number": ("tasks.json", '{"default": {"labels": 7}}', "a list under labels"),
    "tasks with half a character": ("tasks.json", '{"default": {"labels": ["\\ud800"]}}', "surrogates not allowed"),
    "accepted answers that are numbers": ("tasks.json", '{"references": {"1": [7]}}', "of row '1', each accepted answer"),
    "an instruction that is a list": ("tasks.json", '{"default": {"instruction": ["x"]}}', "text belongs under instruction"),
    "an id with half a character": ("rows.jsonl", '{"text": "a", "label": "b", "id": "\\ud800"}', ":1: 'id' holds half of"),
    "a site's folder of nobody": ("s.toml", 'name = "x"\nstate = "~nobody-of-this-name/x"', "state = '~nobody"),
    "a site's socket with a null": (
        "s.toml",
        'name = "x"\n[worker]\nsocket = "a\\u0000"',
        "worker.socket = 'a\\x00' is no path",
    ),
    "a member's number without end": ("members", f"{LONG} north", "line 1: a node's number"),
    "a manifest nested too deep": ("m.json", DEEP_JSON, "cannot be read: maximum recursion"),
}


@pytest.mark.parametrize(("name", "content", "told"), FOUND.values(), ids=FOUND.keys())
def test_files_that_were_read_to_a_traceback(name: str, content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (tmp_path / name).write_text(content)
    tasks = "tasks.json" if name == "tasks.json" else ""
    config = Data(source="files", root=str(tmp_path), files=("rows.jsonl",), tasks_file=tasks)
    readers = {"r.toml": load_recipe, "s.toml": read_site, "members": read_members, "m.json": read_manifest}
    with pytest.raises(FedKeelError) as refused:
        load_records(config, 1) if name not in readers else readers[name](tmp_path / name)
    assert told in str(refused.value)
    assert str(tmp_path / name) in str(refused.value)


@pytest.mark.parametrize("value", ["n" * 300, "~nobody-of-this-name/x", "x\\u0000"])
def test_paths_that_cannot_be_are_no_files(value: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(f'[data]\nsource = "files"\nroot = "."\nfiles = ["{value}"]\n')
    with pytest.raises(FedKeelError, match="data file not found"):
        load_recipe(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_text(f'[model]\nchat_template = "{value}"\n')
    assert load_recipe(tmp_path / "r.toml").model.chat_template == value.replace("\\u0000", "\0")


def test_an_override_nested_too_deep_is_text() -> None:
    assert load_recipe(None, [f"name={'[' * DEEP}"]).name == "[" * DEEP
    with pytest.raises(FedKeelError, match=r"lora\.rank = '\[\["):
        load_recipe(None, [f"lora.rank={'[' * DEEP}"])


def test_a_plan_may_hold_dates(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text('[streams.a]\n[methods.m]\n[streams.a.grid]\n"a.b" = [[1979-05-27], 1979-05-27]\n')
    assert load_plan(str(tmp_path / "p.toml")).streams["a"].settings() == [('a.b=["1979-05-27"]',), ("a.b=1979-05-27",)]


def test_a_table_of_many_columns_is_read_in_linear_time(tmp_path: Path) -> None:
    names = [f"c{n}" for n in range(40_000)]
    (tmp_path / "rows.csv").write_text("".join(",".join(row) + "\n" for row in ([*names, "c0"], ["1"] * 40_001)))
    begin = time.perf_counter()
    with pytest.raises(FedKeelError, match="'c0' stands there twice"):
        load_records(Data(source="files", root=str(tmp_path), files=("rows.csv",)), 1)
    assert time.perf_counter() - begin < SECONDS


WRONG_STATES = {
    "torn": ('{"done": [', "Expecting value"),
    "nested too deep": ("[" * DEEP, "maximum recursion"),
    "no object": ("[]", "no JSON object"),
    "without a key": ('{"leg": ""}', "done is None"),
    "a round below 0": ('"round": -1', "round is -1"),
    "a leg that is a number": ('"leg": 7', "leg is 7"),
    "legs that are numbers": ('"done": [1]', "done is [1]"),
    "a count of rounds that is text": ('"asked": {"a": "x"}', "asked is {'a': 'x'}"),
    "a best round without its score": ('"best": {"stage": 0, "round": 1}', "score is None"),
    "sites that keep numbers": ('"kept": {"a": 1}', "kept is {'a': 1}"),
    "wrong one round before": ('"before": {"done": []}', "leg is None"),
    "more rows than there are": ('"rows_bytes": 4503599627370496', "no row ends at byte 4503599627370496"),
}


@pytest.mark.parametrize(("content", "told"), WRONG_STATES.values(), ids=WRONG_STATES.keys())
def test_a_state_that_is_not_as_it_was_written(content: str, told: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    state = json.dumps(folder.open(Recipe(), False, False, {"the base": "0"}).as_json())
    folder.rows_file.write_text("{}\n")
    folder._state_file.write_text(content if content[0] in "[{" else state[:-1] + ", " + content + "}")
    with pytest.raises(RunError, match=r"is not as it was written .*start over with --fresh|no row ends") as refused:
        resumed(folder.path)
    assert told in str(refused.value)
    assert folder.rows_file.stat().st_size == 3
    assert RunFolder(tmp_path / "run").open(Recipe(), False, True).round == 0


def test_checkpoints_that_speak_of_endless_files_end_at_the_first(run: Path, tmp_path: Path) -> None:
    """2⁶¹ base shifts, or sites: counted by opening them, and not by a list of their names."""
    shutil.copytree(run, tmp_path / "run")
    folder, now = RunFolder(tmp_path / "run"), Global(2, LIKE)
    for log, told in ((2**61, r"shift-0003\.fkl"), (1e308, "where a count of files belongs"), ("2", "log = '2'")):
        payload = pack_global("checkpoint", now, counts={}, held={}, log=log, kept=False)
        folder.checkpoint("federated", 2).write_bytes(payload)
        with pytest.raises(RunError, match=told):
            folder.read_checkpoint("federated", 2, LIKE)
        assert folder.open(Recipe(), True, False, {"the base": "0"}).round == 1
    folder.checkpoint("federated", 2).write_bytes(pack_global("checkpoint", now, log=0, kept=True))
    (folder.path / "checkpoints/federated/kept-0002/optimiser.fkl").write_bytes(
        pack_tensors({"m": numbers(1, 2)}, kind="optimiser", sites=2**61)
    )
    with pytest.raises(RunError, match=r"kept-0002 cannot be used: .*2\.fkl"):
        folder.read_kept("federated", 2, LIKE)


SHIFTS = {
    "names a tensor that is not there": (["x"], {}, "not two for each path"),
    "holds one that it does not name": ([], {"x.left": (2, 1)}, "not two for each path"),
    "names no text": ([["x"]], {}, "no entry of a log"),
    "does not multiply": (["layer.0.q"], {"layer.0.q.left": (10, 2), "layer.0.q.right": (3, 14)}, "of shapes"),
    "fits no map": (["layer.0.q"], {"layer.0.q.left": (9, 2), "layer.0.q.right": (2, 14)}, "9 by 14, which fits no map"),
    "is of another model": (["y"], {"y.left": (10, 2), "y.right": (2, 14)}, "'y', 10 by 14, which fits no map"),
}


@pytest.mark.parametrize(("paths", "shapes", "told"), SHIFTS.values(), ids=SHIFTS.keys())
def test_a_base_shift_that(paths: list[Any], shapes: dict[str, tuple[int, ...]], told: str) -> None:
    tensors = {name: numbers(1, *shape) for name, shape in shapes.items()}
    with pytest.raises(EnvelopeError, match=told):
        unpack_shift(pack_tensors(tensors, kind="shift", paths=paths), LIKE)
