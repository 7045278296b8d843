"""Modular structure injection (method.md §3): hooks that disturb a frozen model while it trains, and then are gone.

A structure is a function (places, amount, draw) -> hooks, with a line in `tables.STRUCTURES`. It leaves its input as it is, the
same object, while `draw` is off or its strength is 0; every random one has the undisturbed value as its mean, and draws from
`draw.key` alone.
"""
