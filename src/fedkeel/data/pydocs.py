"""The embedded source: the docstrings of the user's own Python standard library, as instruction rows.

Real text that nobody here wrote and nobody has to download. Files are parsed with `ast` and never imported. A site is
an area of the library, so the split is non-IID by nature; in the task `area` it is so to the extreme, because a site
then holds a single label of a task that only the federation as a whole can learn.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedkeel.recipe.schema import Data
from fedkeel.types import FedKeelError, Record

# Top-level modules by area. A module not named here is skipped, and one that a Python lacks is no error. Left out on
# purpose: distutils and lib2to3 (gone from 3.12 and 3.13, and large enough to make sites differ between Pythons) and
# encodings (a hundred copies of one sentence).
AREAS: dict[str, str] = {
    "concurrency": """_threading_local asynchat asyncio asyncore concurrent contextvars multiprocessing queue sched
        selectors socketserver subprocess threading""",
    "data": """_collections_abc _pydatetime _pydecimal _pylong _strptime _weakrefset bisect calendar collections
        copy copyreg dataclasses datetime decimal enum fractions functools graphlib hashlib heapq hmac numbers operator
        random secrets statistics struct types uuid weakref zoneinfo""",
    "files": """_compression _pyio aifc bz2 chunk colorsys compression dbm filecmp fileinput fnmatch genericpath glob
        gzip imghdr io lzma nturl2path ntpath os pathlib pickle pickletools posixpath shelve shutil sndhdr sqlite3 stat
        sunau tarfile tempfile uu wave xdrlib zipapp zipfile""",
    "gui": "curses idlelib tkinter turtle turtledemo",
    "language": """__future__ _ast_unparse _py_abc _sitebuiltins abc annotationlib ast bdb code codeop compileall
        contextlib dis doctest imp importlib inspect keyword linecache modulefinder opcode pdb pkgutil py_compile pyclbr
        pydoc rlcompleter runpy symtable tabnanny token tokenize traceback typing unittest zipimport""",
    "network": """cgi cgitb email ftplib http imaplib ipaddress mailbox mailcap mimetypes netrc nntplib poplib smtpd
        smtplib socket ssl telnetlib urllib webbrowser wsgiref xmlrpc""",
    "system": """_aix_support _android_support _apple_support _bootsubprocess _colorize _ios_support _osx_support
        _py_warnings _pyrepl argparse cProfile cmd crypt ctypes ensurepip getopt getpass logging optparse pipes platform
        profile pstats pty signal site sysconfig timeit trace tracemalloc tty venv warnings""",
    "text": """_markupbase base64 codecs configparser csv difflib gettext html json locale plistlib pprint quopri re
        reprlib shlex sre_compile sre_constants sre_parse string stringprep textwrap tomllib xml""",
}
AREA_OF = {module: area for area, modules in AREAS.items() for module in modules.split()}

INSTRUCTIONS = {
    "area": "Which area of the Python library does this text describe?",
    "kind": "Does this text document a class or a function?",
    "name": "Which of these names does the text document?",
    "gap": "Which word is missing?",
    "summary": "Summarise this documentation in one sentence.",
}
TEST_FOLDERS = {"test", "tests", "idle_test", "__pycache__"}
NEIGHBOURS = 40  # distractors of a missing word lie within so many frequency ranks of it

SIGNATURE = re.compile(r"\A[\w.]+\([^\n]*\)( *-> *[^\n]*)?\n+")  # a first line that is no prose: `Profile(timer=None)`
DOCTEST = re.compile(r"^ *>>> .*?(?=\n *\n|\Z)", re.MULTILINE | re.DOTALL)  # with its output, up to an empty line
RULE = re.compile(r"[\W_]{3,}")

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Docstring:
    """One docstring. name: dotted, module first. kind: `module`, `class` or `function`.

    summary: its first paragraph on one line. rest: the paragraphs after it on one line, without doctests.
    digest: hex SHA-256 of the whole text, that split, order and random choices hang on.
    """

    area: str
    name: str
    kind: str
    summary: str
    rest: str
    digest: str

    @property
    def split(self) -> str:
        """80 % train, 8 % validation, 12 % test, whatever the seed, the tasks and the rest of the library."""
        percent = int(self.digest[:8], 16) % 100
        return "train" if percent < 80 else "validation" if percent < 88 else "test"

    @property
    def sentence(self) -> str:
        """The first sentence of the summary."""
        return re.split(r"(?<=[.!?])\s+(?=[A-Z])", self.summary, maxsplit=1)[0]

    def record(self, task: str, text: str, output: str, labels: Sequence[str] = ()) -> Record:
        """A row of `task` whose input is `text`; its id depends on the docstring and the task only."""
        return Record(
            id=f"pydocs-{_digest(f'{self.digest}/{task}')[:12]}",
            task=task,
            split=self.split,
            output=output,
            instruction=INSTRUCTIONS[task],
            input=text,
            site=self.area,
            labels=tuple(labels),
        )


def source(config: Data, seed: int) -> list[Record]:
    """The source `pydocs`: see `records`; data.root is another library than this Python's, rows_per_site = 0 means 240."""
    library = Path(config.root) if config.root else None
    return records(library, seed, config.rows_per_site or 240, config.tasks or tuple(INSTRUCTIONS))


def records(
    library: Path | None = None, seed: int = 0, rows_per_site: int = 240, tasks: Sequence[str] = tuple(INSTRUCTIONS)
) -> list[Record]:
    """Rows of `tasks` (of `area`, `kind`, `name`, `gap`, `summary`), sorted by id; an area of the library is a site.

    library: a folder laid out like Python's `Lib`; default: that of the running Python. seed: changes the distractors
    and the missing words, never which docstrings are used nor their split. rows_per_site: at most so many train rows a
    site, // 6 validation rows and // 4 test rows (at least one each), balanced over the tasks as far as rows suffice.
    A docstring may serve several tasks, always in one split. Of docstrings with one first sentence the first counts.
    Labels: all areas present in `area`; `class` and `function`, as often one as the other, in `kind`; the four options as
    shown in `name` and `gap`; none in `summary`.
    Raises FedKeelError if the folder holds no docstring of a known module, rows_per_site < 1, or a task is unknown.
    """
    if rows_per_site < 1:
        raise FedKeelError(f"rows_per_site is {rows_per_site}; it must be at least 1")
    unknown = sorted(set(tasks) - set(INSTRUCTIONS))
    if unknown:
        raise FedKeelError(f"pydocs has no task {unknown[0]!r}; its tasks are {', '.join(INSTRUCTIONS)}")
    folder = Path(sysconfig.get_paths()["stdlib"]) if library is None else library
    by_area: dict[str, list[Docstring]] = defaultdict(list)
    for docstring in docstrings(folder):
        by_area[docstring.area].append(docstring)
    if not by_area:
        raise FedKeelError(
            f"{folder}: no docstrings of the Python standard library here (a Python stripped of its sources, or "
            "another folder); set `data.root` to the standard library folder of a full Python"
        )
    limits = {"train": rows_per_site, "validation": max(1, rows_per_site // 6), "test": max(1, rows_per_site // 4)}
    areas, chosen = sorted(by_area), []
    for area in areas:
        found = by_area[area]
        made = {
            "area": _area(found, areas),
            "kind": _kind(found),
            "name": _name(found, seed),
            "gap": _gap(found, seed),
            "summary": _summary(found),
        }  # generators: what is not asked for costs nothing
        rows = [row for task, of_task in made.items() if task in tasks for row in of_task]
        for split, limit in limits.items():
            chosen += _balanced([row for row in rows if row.split == split], limit)
    return sorted(chosen, key=lambda row: row.id)


def docstrings(library: Path) -> Iterator[Docstring]:
    """The docstrings of at least 5 words in the modules of AREAS, sorted by module and path, then in source order.

    Skips test folders, files that do not parse, definitions inside functions, docstrings that begin with a doctest, and
    every docstring whose first sentence was seen before (compared without case and punctuation), since rows made of it
    could be the same in two splits.
    """
    seen: set[str] = set()
    for module, area in sorted(AREA_OF.items()):
        for path in [library / f"{module}.py", *sorted((library / module).rglob("*.py"))]:
            parts = path.relative_to(library).with_suffix("").parts
            if TEST_FOLDERS & set(parts) or not path.is_file():
                continue
            for name, kind, text in _definitions(path, ".".join(part for part in parts if part != "__init__")):
                first, _, rest = SIGNATURE.sub("", text).partition("\n\n")
                docstring = Docstring(area, name, kind, _one_line(first), _one_line(rest), _digest(_plain(text)))
                key = _plain(docstring.sentence)
                if len(text.split()) >= 5 and key and key not in seen:
                    seen.add(key)
                    yield docstring


def _definitions(path: Path, module: str) -> Iterator[tuple[str, str, str]]:
    """(qualified name, kind, cleaned docstring) of a file's module, classes, methods and functions."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in somebody else's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for name, node in [(module, tree), *_nested(tree, module)]:
        kind = "module" if node is tree else "class" if isinstance(node, ast.ClassDef) else "function"
        if text := ast.get_docstring(node):
            yield name, kind, text


def _nested(node: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            name = f"{prefix}.{child.name}"
            yield name, child
            if isinstance(child, ast.ClassDef):
                yield from _nested(child, name)
        elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler):  # `if sys.platform`, `try: import`
            yield from _nested(child, prefix)


def _area(found: Iterable[Docstring], areas: Sequence[str]) -> Iterator[Record]:
    for doc in found:
        # `email.message.Message` in the text would give the area away; a bare `email` is an English word and stays.
        own = rf"\b{re.escape(doc.name.partition('.')[0])}(\.\w+)+"
        text = _shortened(re.sub(own, "", doc.summary).lstrip(" -:,."), 40)
        if len(text.split()) >= 4:
            yield doc.record("area", text, doc.area, areas)


def _kind(found: Iterable[Docstring]) -> Iterator[Record]:
    """Classes, and as many functions of the same split, first by hash: one answer is as frequent as the other."""
    long_enough = sorted((doc for doc in found if len(doc.summary.split()) >= 4), key=lambda doc: doc.digest)
    for split in ("train", "validation", "test"):
        classes, functions = ([d for d in long_enough if (d.kind, d.split) == (k, split)] for k in ("class", "function"))
        for pair in zip(classes, functions, strict=False):
            for doc in pair:
                yield doc.record("kind", _shortened(doc.summary, 40), doc.kind, ("class", "function"))


def _name(found: Iterable[Docstring], seed: int) -> Iterator[Record]:
    public = [(doc, doc.name.rpartition(".")[2]) for doc in found if doc.kind != "module"]
    public = [(doc, name) for doc, name in public if not name.startswith("__")]
    pool = {_bare(name): name for name in sorted(name for _, name in public)}
    for doc, name in public:
        # No option stands in the text: a right one would be trivial, a wrong one would show that it is wrong.
        mentioned = {_bare(word) for word in re.findall(r"\w+", doc.summary)}
        if _bare(name) in mentioned or len(doc.summary.split()) < 4:
            continue
        taken = {*mentioned, _bare(name)}
        others = [other for bare, other in pool.items() if bare not in taken]
        if len(others) >= 3:
            options = _options(name, others, random.Random(f"{seed}/{doc.digest}/name"))
            text = f"{_shortened(doc.summary, 40)}\nOptions: {', '.join(options)}"
            yield doc.record("name", text, name, options)


def _gap(found: Iterable[Docstring], seed: int) -> Iterator[Record]:
    words = [(doc, Counter(re.findall(r"\w+", doc.sentence.lower())), _gap_words(doc.sentence)) for doc in found]
    frequency = Counter(word for _, _, candidates in words for word in set(candidates))
    # Ties go by hash: in alphabetical order the options would tend to share their first letters.
    ranked = sorted(
        (word for word, count in frequency.items() if count >= 2), key=lambda word: (frequency[word], _digest(word))
    )
    rank = {word: position for position, word in enumerate(ranked)}
    for doc, present, candidates in words:
        answers = [word for word in candidates if word in rank and present[word] == 1]
        if not answers or not 5 <= len(doc.sentence.split()) <= 40:
            continue
        rng = random.Random(f"{seed}/{doc.digest}/gap")
        word = rng.choice(answers)
        near = ranked[max(0, rank[word] - NEIGHBOURS) : rank[word] + NEIGHBOURS + 1]
        others = [other for other in near if other not in present]
        if len(others) >= 3:
            options = _options(word, others, rng)
            text = re.sub(rf"\b{word}\b", "____", doc.sentence)
            yield doc.record("gap", f"{text}\nOptions: {', '.join(options)}", word, options)


def _summary(found: Iterable[Docstring]) -> Iterator[Record]:
    for doc in found:
        sentence = doc.sentence
        if len(doc.rest.split()) >= 15 and 4 <= len(sentence.split()) <= 25 and sentence.endswith((".", "!", "?")):
            yield doc.record("summary", _shortened(doc.rest, 80), sentence)


def _gap_words(sentence: str) -> list[str]:
    """Plain words of 4 to 12 lower-case letters, not parts of identifiers, calls, paths or hyphenated words."""
    return re.findall(r"(?<![\w.'`/<-])[a-z]{4,12}(?![\w'`(/=>-]|\.\w)", sentence)


def _options(answer: str, others: Sequence[str], rng: random.Random) -> list[str]:
    options = [answer, *rng.sample(others, 3)]
    rng.shuffle(options)
    return options


def _balanced(rows: Iterable[Record], limit: int) -> list[Record]:
    """The first `limit` rows, taking one of each task in turn; within a task in the order of ids, which are hashes."""
    turn: Counter[str] = Counter()
    order: list[tuple[int, str, Record]] = []
    for row in sorted(rows, key=lambda row: row.id):
        order.append((turn[row.task], row.task, row))
        turn[row.task] += 1
    return [row for _, _, row in sorted(order, key=lambda item: item[:2])[:limit]]


def _bare(name: str) -> str:
    return name.replace("_", "").lower()


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _one_line(text: str) -> str:
    """Prose on one line: doctests go, and so do rules such as `-----`, which would also look like a gap."""
    return " ".join(word for word in DOCTEST.sub("", text).split() if not RULE.fullmatch(word))


def _shortened(text: str, words: int) -> str:
    return " ".join(text.split()[:words])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
