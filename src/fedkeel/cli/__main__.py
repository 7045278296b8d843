"""`python -m fedkeel.cli` is the command `fedkeel`."""

from fedkeel.cli import main

main()
