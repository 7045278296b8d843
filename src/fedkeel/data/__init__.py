"""Rows: where they come from, who holds them and when, and how text becomes batches of tokens."""
