"""The command `fedkeel`. Heavy imports wait until a recipe is known to be good, so `--help` and typos answer at once."""

from fedkeel.cli import run, finished_runs, suites, doctor, deploy  # noqa: F401, I001 - each adds its commands, in this order
from fedkeel.cli.common import app, main

__all__ = ["app", "main"]
