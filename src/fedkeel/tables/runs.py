"""What a run is made of, where it runs, and who looks on."""

from __future__ import annotations

from dataclasses import dataclass

from fedkeel.tables.entry import Entry, Table


@dataclass(frozen=True)
class Baseline(Entry):
    """A leg beside the federated one: (prepared) -> legs, see `run.legs`. title: as reports call it. before: it runs before the
    federated leg. pools: it needs the rows of all sites in one place, which a deployment does not have.
    """

    title: str = ""
    before: bool = False
    pools: bool = False


BASELINES = Table(
    "baseline",
    {
        "base": Baseline("fedkeel.runs.legs:base", title="base", before=True),
        "analytic": Baseline("fedkeel.runs.legs:analytic", title="analytic head", before=True),
        "local": Baseline("fedkeel.runs.legs:local", title="local-only"),
        "centralised": Baseline("fedkeel.runs.legs:centralised", title="centralised", pools=True),
    },
)


@dataclass(frozen=True)
class Engine(Entry):
    """Where the sites of `fedkeel run` are: (prepared, folder, watch, how) runs it. about: a line of help."""

    about: str = ""


ENGINES = Table(
    "engine",
    {
        "local": Engine("fedkeel.runs.execute:execute", about="all sites in this process"),
        "flower-sim": Engine(
            "fedkeel.engines.flower.simulation:simulate", about="in Flower's simulation, on as many cores as fit"
        ),
    },
)


@dataclass(frozen=True)
class Tracker(Entry):
    """A live view of a run: (folder, run's name) -> `run.track.Tracker`. library: what must be installed for it."""

    library: str = ""


TRACKERS = Table(
    "tracker",
    {
        "tensorboard": Tracker("fedkeel.runs.track:TensorBoard", library="tensorboardX"),
        "wandb": Tracker("fedkeel.runs.track:Wandb", library="wandb"),
        "mlflow": Tracker("fedkeel.runs.track:Mlflow", library="mlflow"),
    },
)
