"""Codecs: from named tensors to the tensors that travel, and back. The envelope makes bytes of them.

A codec is apart from aggregation and runs in every engine, so that the ledger of bytes is true in a simulation too.
"""

from __future__ import annotations

from fedkeel.exchange.codecs.cast import Cast
from fedkeel.exchange.codecs.chain import Chain, Codec, CodecError, Shapes
from fedkeel.exchange.codecs.envelope import EnvelopeError, Wire, open_envelope, seal
from fedkeel.exchange.codecs.quantize import Quantize
from fedkeel.exchange.codecs.sparse import Sparse, with_residual

CODECS: dict[str, Codec] = {
    "fp32": Cast("float32"),
    "bf16": Cast("bfloat16"),
    "fp16": Cast("float16"),
    "int8": Quantize(8),
    "int4": Quantize(4),
}


def make_codec(spec: str) -> Codec:
    """The codec that `spec` names: `fp32`, `bf16`, `fp16`, `int8`, `int4`, `topk=SHARE` with 0 < SHARE < 1, or `topk=SHARE`
    followed by one of the others for the values that it keeps, such as `topk=0.1+int4`.

    Raises CodecError, which names the spec and says what would be right.
    """
    try:
        codecs = [CODECS[part] if part in CODECS else _topk(part) for part in spec.split("+")]
    except ValueError as error:
        raise CodecError(f"codec {spec!r}: {error}; known: {', '.join(CODECS)}, topk=0.1, topk=0.1+int4") from error
    if len(codecs) == 1:
        return codecs[0]
    if len(codecs) == 2 and isinstance(codecs[0], Sparse) and not isinstance(codecs[1], Sparse):
        return Chain(*codecs)
    raise CodecError(f"codec {spec!r}: a chain is topk=SHARE, and then one of {', '.join(CODECS)}, such as topk=0.1+int4")


def _topk(part: str) -> Sparse:
    name, _, share = part.partition("=")
    if name != "topk":
        raise CodecError(f"no codec {part!r}")
    return Sparse(float(share))


__all__ = [
    "CODECS", "Cast", "Chain", "Codec", "CodecError", "EnvelopeError", "Quantize", "Shapes", "Sparse", "Wire", "make_codec",
    "open_envelope", "seal", "with_residual",
]  # fmt: skip
