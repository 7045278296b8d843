"""Analytic classifiers as part of a message."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedkeel.exchange.codecs import EnvelopeError, Wire
from fedkeel.types import Head

WIDEST = 2**14  # features
HEAD = "head/"  # before the number of a classifier


def heads_packed(heads: Mapping[str, Head]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Classifiers as part of a header, and as tensors."""
    told, tensors = [], {}
    for number, (task, head) in enumerate(sorted(heads.items())):
        about = {"task": task, "labels": list(head.labels), "width": head.weight.shape[1], "scale": head.scale}
        told.append({**about, "stage": head.stage, **({} if head.mean is None else {"mean": True})})
        tensors[f"{HEAD}{number}.weight"], tensors[f"{HEAD}{number}.trust"] = head.weight.float(), head.trust.float()
        if head.mean is not None:
            tensors[f"{HEAD}{number}.mean"] = head.mean.float()
    return told, tensors


def heads_wire(told: Any) -> Wire:
    """The tensors of `heads_packed` that a header announces. Raises EnvelopeError where it announces nonsense."""
    if not isinstance(told, list) or not all(isinstance(one, dict) for one in told):
        raise EnvelopeError("the message reports heads that are no list of objects")
    wire: Wire = {}
    for number, one in enumerate(told):
        labels, width, scale, stage = (one.get(key) for key in ("labels", "width", "scale", "stage"))
        named = isinstance(labels, list) and labels and all(isinstance(label, str) for label in labels)
        if not named or not isinstance(one.get("task"), str) or type(width) is not int or not 1 <= width <= WIDEST:
            raise EnvelopeError(f"the message reports head {number} without its task, its labels or its width")
        if type(scale) is not float or not 0 < scale < math.inf or type(stage) is not int or stage < 0:
            raise EnvelopeError(f"the message reports head {number} with scale {scale!r} and stage {stage!r}")
        assert isinstance(labels, list)
        wire[f"{HEAD}{number}.weight"] = (torch.float32, (len(labels), width))
        wire[f"{HEAD}{number}.trust"] = (torch.float32, (len(labels),))
        if type(one.get("mean", False)) is not bool:
            raise EnvelopeError(f"the message reports head {number} with mean {one['mean']!r}")
        if one.get("mean"):
            wire[f"{HEAD}{number}.mean"] = (torch.float32, (len(labels), width))
    return wire


def heads_unpacked(told: Sequence[Mapping[str, Any]], sent: Mapping[str, Tensor]) -> dict[str, Head]:
    """Classifiers of a header that `heads_wire` accepted."""
    return {
        one["task"]: Head(
            tuple(one["labels"]),
            sent[f"{HEAD}{n}.weight"].clone(),
            one["scale"],
            sent[f"{HEAD}{n}.trust"].clone(),
            one["stage"],
            sent[f"{HEAD}{n}.mean"].clone() if one.get("mean") else None,
        )
        for n, one in enumerate(told)
    }
