"""Codecs: from named tensors to the tensors that travel, and back. The envelope makes bytes of them.

A codec is apart from aggregation and runs in every engine, so that the ledger of bytes is true in a simulation too.
"""

from __future__ import annotations

from fedkeel import tables
from fedkeel.exchange.codecs.chain import Chain, Codec, CodecError, decoded
from fedkeel.exchange.codecs.envelope import EnvelopeError, Wire, header_of, open_envelope, seal


def make_codec(spec: str) -> Codec:
    """The codec that `spec` names, by `tables.CODECS`: `fp32`, `int4`, `topk=SHARE` with 0 < SHARE < 1, or `topk=SHARE`
    followed by one of the others for the values that it keeps, such as `topk=0.1+int4`.

    Raises CodecError, which names the spec and says what would be right.
    """
    try:
        codecs: list[Codec] = [entry.load()(*given) for entry, given in tables.codec_parts(spec)]
    except ValueError as error:
        raise CodecError(f"codec {spec!r}: {error}") from error
    return codecs[0] if len(codecs) == 1 else Chain(*codecs)


__all__ = ["Codec", "CodecError", "EnvelopeError", "Wire", "decoded", "header_of", "make_codec", "open_envelope", "seal"]
