"""Three clinics sort messages from patients, each with rows of its own and wards that it seldom sees. Nothing is downloaded.

    python examples/own_rows.py

Rows are lists of dicts here; a pandas frame or a data set of Hugging Face's `datasets` does as well.
"""

from __future__ import annotations

import random

import fedkeel

COMPLAINTS = {
    "eyes": ["my sight is blurred", "the left eye is red", "light hurts my eyes", "I need new glasses"],
    "heart": ["my heart races", "there is pressure in my chest", "my pulse is uneven", "I faint when I stand up"],
    "skin": ["a rash on both arms", "this mole has grown", "my hands itch all night", "the burn will not heal"],
}
WHEN = ["since Monday", "for two weeks", "after the last visit", "again", "every morning", "since I changed the pills"]
SEEN = {
    "north": {"eyes": 40, "heart": 12, "skin": 4},
    "harbour": {"heart": 40, "skin": 12, "eyes": 4},
    "valley": {"skin": 40, "eyes": 12, "heart": 4},
}


RECIPE = {
    "threads": 1,
    "data.instruction": "Which ward does this message belong to?",
    "data.test_share": 0.3,
    "train.lr": 0.005,
    "train.local_steps": 6,
    "train.batch_size": 8,
    "federation.rounds": 6,
    "evaluation.baselines": ["base", "local"],
}


def rows_of(site: str) -> list[dict[str, str]]:
    """What one clinic holds: in life, whatever it reads from its own files."""
    chance = random.Random(site)
    return [
        {"text": f"{chance.choice(COMPLAINTS[ward])} {chance.choice(WHEN)} ({chance.randrange(1000)})", "label": ward}
        for ward, count in SEEN[site].items()
        for _ in range(count)
    ]


def main() -> None:
    sites = {name: rows_of(name) for name in SEEN}
    result = fedkeel.run({**RECIPE, "name": "own-rows"}, sites=sites, watch=print, existing="replace")
    for method, score in result.scores.items():
        print(f"{method:<12} {score:.1%} of the test rows of all clinics")
    print(f"adapter for PEFT: {result.adapter}\nreport:           {result.report()}")


if __name__ == "__main__":
    main()
