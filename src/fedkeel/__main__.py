"""`python -m fedkeel` is the command `fedkeel`."""

from fedkeel.cli import main

main()
