"""Codecs: from named tensors to the tensors that travel, and back. The envelope makes bytes of them.

A codec is apart from aggregation and runs in every engine, so that the ledger of bytes is true in a simulation too.
"""

from __future__ import annotations

from fedkeel.codecs.cast import Cast
from fedkeel.codecs.envelope import EnvelopeError, open_envelope, seal

CODECS = {"fp32": Cast("float32"), "bf16": Cast("bfloat16"), "fp16": Cast("float16")}

__all__ = ["CODECS", "Cast", "EnvelopeError", "open_envelope", "seal"]
