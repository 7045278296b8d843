"""Where rows come from, what they look like, and who holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedkeel.tables.entry import Entry, Table


@dataclass(frozen=True)
class Source(Entry):
    """Where rows come from: (recipe's [data], seed) -> Records without a split where they have none.

    needs: keys of [data] that must be set. files: data.files lie below data.root. splits: rows come with their split.
    capped: it keeps to data.rows_per_site by itself. everywhere: every machine holds all of it.
    """

    needs: tuple[str, ...] = ()
    files: bool = False
    splits: bool = False
    capped: bool = False
    everywhere: bool = False


SOURCES = Table(
    "data source",
    {
        "pydocs": Source("fedkeel.data.pydocs:source", splits=True, capped=True, everywhere=True),
        "files": Source("fedkeel.data.sources:files", needs=("root", "files"), files=True),
        "jsonl": Source("fedkeel.data.sources:files", needs=("root", "files"), files=True),  # its older name
        "hub": Source("fedkeel.data.sources:hub", needs=("dataset",)),
        "rows": Source("fedkeel.data.given:source"),
    },
)


@dataclass(frozen=True)
class Form(Entry):
    """A form of rows: (row, about) -> `data.forms.Parts`. A row is of the first form whose `keys` it has all of, one of each
    alternative. labelled: where no labels are listed, those of the task's own rows are its labels."""

    keys: tuple[tuple[str, ...], ...] = ()
    labelled: bool = False

    def fits(self, row: Any) -> bool:
        """Whether a row has these keys."""
        return all(any(key in row for key in either) for either in self.keys)


FORMS = Table(
    "form of rows",
    {
        "chat": Form("fedkeel.data.forms:chat", keys=(("messages", "conversations"),)),
        "classification": Form("fedkeel.data.forms:classification", keys=(("text",), ("label",)), labelled=True),
        "instruction": Form("fedkeel.data.forms:instruction", keys=(("output",), ("instruction", "input"))),
    },
)


@dataclass(frozen=True)
class Partition(Entry):
    """Who holds which rows: `data.partition.Deal` -> each site's indices; by name where the rows name their sites."""


PARTITIONS = Table(
    "partition",
    {
        "natural": Partition("fedkeel.data.partition:by_name"),
        "iid": Partition("fedkeel.data.partition:in_equal_parts"),
        "dirichlet": Partition("fedkeel.data.partition:by_label_or_task"),
        "by-task": Partition("fedkeel.data.partition:whole_tasks"),
        "quantity": Partition("fedkeel.data.partition:in_unequal_parts"),
    },
)
