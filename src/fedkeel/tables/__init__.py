"""What a recipe can name: one line an entry. Recipe checks, help, baselines, units, reports and law tests all read it here.

An entry names its code as `module:name`, which is imported when it is first used, so that a recipe is read, and a mistake in it
told, without torch. To add a method: its file, and one line in its table (CONTRIBUTING.md shows each). A package of somebody
else's adds entries from outside: it declares an entry point of the group `fedkeel`, a function without arguments that is called
once before a recipe is read, and there says, say, `tables.RULES["mine"] = tables.Rule("mine.rules:mine")`.

An entry may have options of its own: a frozen dataclass, whose keys a recipe then sets under `[KIND.NAME]`, such as
`[rule.mine] share = 0.1`. Imports nothing heavy, and nothing of FedKeel's but types.
"""

from __future__ import annotations

from typing import Any

from fedkeel.tables.data import FORMS, PARTITIONS, SOURCES, Form, Partition, Source
from fedkeel.tables.entry import NAME, Entry, Table, TableError, UnknownNameError, load_plugins
from fedkeel.tables.exchange import CODECS, STEPS, Codec, Step, codec_grammar, codec_parts
from fedkeel.tables.federation import ATTACKS, OPTIMISERS, RULES, WEIGHTINGS, Attack, Optimiser, Rule, Weighting
from fedkeel.tables.model import ARCHITECTURES, BASES, Architecture, Base
from fedkeel.tables.objective import CALIBRATIONS, TERMS, Calibration, Term, Weighted
from fedkeel.tables.runs import BASELINES, ENGINES, TRACKERS, Baseline, Engine, Tracker
from fedkeel.tables.scores import DAMAGES, MEASURES, METRICS, Column, Damage, Measure, Metric, by_token
from fedkeel.tables.structure import HELD, STRUCTURES, Structure

__all__ = [
    "ARCHITECTURES",
    "ATTACKS",
    "BASELINES",
    "BASES",
    "CALIBRATIONS",
    "CODECS",
    "DAMAGES",
    "ENGINES",
    "FORMS",
    "HELD",
    "MEASURES",
    "METRICS",
    "MOVES",
    "NAME",
    "OPTIMISERS",
    "OWN",
    "PARTITIONS",
    "RULES",
    "SOURCES",
    "STEPS",
    "STRUCTURES",
    "TERMS",
    "TRACKERS",
    "WEIGHTINGS",
    "Architecture",
    "Attack",
    "Base",
    "Baseline",
    "Calibration",
    "Codec",
    "Column",
    "Damage",
    "Engine",
    "Entry",
    "Form",
    "Measure",
    "Metric",
    "Optimiser",
    "Partition",
    "Rule",
    "Source",
    "Step",
    "Structure",
    "Table",
    "TableError",
    "Term",
    "Tracker",
    "UnknownNameError",
    "Weighted",
    "Weighting",
    "by_token",
    "codec_grammar",
    "codec_parts",
    "load_plugins",
    "switches",
]

# Keys that switch on parts of the method that are no entry of a table.
MOVES = (
    "train.sam",
    "stream.average",
    "stream.average_from",
    "stream.slices",
    "structure.hold",
    "evidence.serve",
    "evidence.serve_from",
)

# Kinds whose entries may have options of their own, by the name under which a recipe holds them: [KIND.NAME].
OWN: dict[str, Table[Any]] = {"term": TERMS, "rule": RULES, "source": SOURCES, "scheme": PARTITIONS}


def switches() -> list[str]:
    """Every key that switches a part of a method on, at whose default it is off: what a baseline leaves alone."""
    terms = [entry.switch for entry in TERMS.values() if not entry.always]
    return [
        *dict.fromkeys(terms),
        "evidence.task",
        *(f"structure.{name}" for name in STRUCTURES),
        *MOVES,
    ]
