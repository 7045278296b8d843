"""What disturbs a model while it trains."""

from __future__ import annotations

from dataclasses import dataclass

from fedkeel.tables.entry import Entry, Table


@dataclass(frozen=True)
class Structure(Entry):
    """An injected structure: (places, amount, draw) -> hooks; a recipe's key `structure.NAME` is its amount, 0: not injected.

    chance: the amount is a probability, under 1; else it is a finite number ≥ 0. learns: it has parameters of its own that
    ascend: code is a class with `reset`, `attach` and `ascend` (see `structure.adversary`), and no mean is promised.
    unbiased: its place has the undisturbed value in the mean.
    at: the kind of place that it needs (`attention`, `down`, `residual`, `stack`, `branches`), see `model.places.Places`.
    about: what its amount is of.
    """

    chance: bool = True
    learns: bool = False
    unbiased: bool = True
    at: str = "branches"
    about: str = ""


_STRUCTURE = "fedkeel.method.structure"
STRUCTURES = Table(
    "structure",
    {
        "heads": Structure(f"{_STRUCTURE}.drop:heads", at="attention", about="to drop an attention head"),
        "channels": Structure(f"{_STRUCTURE}.drop:channels", at="down", about="to drop a block of 64 feed-forward channels"),
        "branch": Structure(f"{_STRUCTURE}.branch:branch", about="to drop a whole LoRA branch"),
        "layers": Structure(f"{_STRUCTURE}.layers:layers", at="residual", about="to drop a residual branch of the upper half"),
        "skip": Structure(
            f"{_STRUCTURE}.skip:skip", unbiased=False, at="stack", about="to leave out the top block, with less for lower ones"
        ),
        "rank": Structure(f"{_STRUCTURE}.rank:rank", chance=False, about="σ of noise on the rank directions of LoRA"),
        "weights": Structure(
            f"{_STRUCTURE}.weights:weights", chance=False, about="σ of noise on frozen weights, of a row's norm over √d_in"
        ),
        "lodrop": Structure(f"{_STRUCTURE}.lodrop:lodrop", about="to drop a column of A, and a row of B"),
        "adversary": Structure(
            f"{_STRUCTURE}.adversary:Adversary",
            chance=False,
            learns=True,
            about="norm of a second low-rank change that ascends",
        ),
    },
)
HELD = ("branch", "skip")  # those that `structure.hold` draws once a round, see `federation.kept`
