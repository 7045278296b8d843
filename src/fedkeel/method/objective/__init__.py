"""The objective of a site's training: a weighted sum of terms (method.md §4).

A term is a function (forward, options) -> its mean per supervised position, in nats, or a `types.Loss`. The training loop alone
weights terms and micro-batches, the latter by n_micro / n_step, so that 1 × 8 rows and 4 × 2 rows give the same step. A term
that is a function of weights, not of positions (`once` in its entry), is taken once a step. To add a term: one file, and one
line in `tables.TERMS`; tests/laws/test_objective.py then runs over it.
"""
