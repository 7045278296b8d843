"""Aggregation rules: from the sites' adapters to the next global one, each with its measured error.

A rule is a pure function `(reference, updates, weights, options) -> Aggregate`; its entry in `tables.RULES` says what it
trains, sends and takes, and `rule.Aggregator` checks what it is given. It adds in a fixed order (site names, sorted) and in
float64, so the order in which replies arrive changes nothing. `updates` may be any re-iterable, see `updates.Checked`: `mean`,
`freeze_a`, `alternate`, `share_a`, `share_b` and `drift` go through it once and hold one update at a time (and see
`exact.measure`); the others hold all sites' factors.
"""
