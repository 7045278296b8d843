"""The PEFT folder of a deployment's adapter, which sites write for a coordinator without a base: held against what the
coordinator knows, and against what another site wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from fedkeel.exchange.codecs import EnvelopeError, open_envelope
from fedkeel.model.bases import ADAPTER_FILES
from fedkeel.model.features import by_label
from fedkeel.types import Global, Head

CLOSE = 1e-3  # of numbers that two sites work out of one base, on whatever processors


def read_folder(message: bytes, current: Global, heads: Mapping[str, Head], base: str) -> dict[str, bytes]:
    """The files that a site sent, by name, once they are found to be a PEFT folder of `current`.

    heads: of an encoder's analytic classifiers. base: what the folder says of the base; where it lies at a site is that site's
    business. Raises EnvelopeError.
    """
    try:
        files = {name: t.numpy().tobytes() for name, t in open_envelope(message)[1].items()}
        _check_adapter(files, current)
        check_heads(files, heads)
        for name, content in files.items():  # so that another site's can be held against them
            load_tensors(content) if name.endswith(".safetensors") else json.loads(content)
        config = json.loads(files["adapter_config.json"])
        config["base_model_name_or_path"] = base
    except EnvelopeError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise EnvelopeError(f"the PEFT folder cannot be read: {error}") from error
    files["adapter_config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return files


def differing(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> list[str]:
    """What two sites' folders of one adapter say differently: files, and of `adapter_config.json` its keys. Numbers that differ
    by rounding do not, nor lists in another order, where order means nothing."""
    found = sorted(one.keys() ^ other.keys())
    for name in sorted(one.keys() & other.keys()):
        if name.endswith(".safetensors"):
            found += [] if _close(load_tensors(one[name]), load_tensors(other[name])) else [name]
        elif name == "adapter_config.json":
            mine, its = (json.loads(files[name]) for files in (one, other))
            odd = [key for key in mine.keys() | its.keys() if _plain(mine.get(key)) != _plain(its.get(key))]
            found += [f"{key} in {name}" for key in sorted(odd)]
        elif json.loads(one[name]) != json.loads(other[name]):
            found.append(name)
    return found


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value


def _close(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        t.shape == other[name].shape and torch.allclose(t.float(), other[name].float(), rtol=CLOSE, atol=CLOSE)
        for name, t in one.items()
    )


def _check_adapter(files: Mapping[str, bytes], current: Global) -> None:
    """Raise EnvelopeError unless the files hold the adapter that was asked for; where its rank changes on the way (base
    shifts), unless they hold its maps."""
    if odd := sorted(files.keys() - set(ADAPTER_FILES)):
        raise EnvelopeError(f"{odd[0]!r} is no file of a PEFT folder; {', '.join(sorted(ADAPTER_FILES))} are")
    given = load_tensors(files["adapter_model.safetensors"])
    expected: dict[str, Tensor] = {}
    for path, factors in current.adapter.lora.items():
        expected |= {f"{path}.lora_A.weight": factors.a, f"{path}.lora_B.weight": factors.b}
    for name, tensor in (expected | dict(current.adapter.dense)).items():
        found = given.get(f"base_model.model.{name}")
        if found is None or (not current.shifts and not torch.equal(found, tensor)):
            raise EnvelopeError(f"{name} in the PEFT folder is not the coordinator's")


def check_heads(files: Mapping[str, bytes], heads: Mapping[str, Head]) -> None:
    """Raise EnvelopeError unless the classifiers beside an encoder's adapter are these, see `model.features.ByHead`."""
    if not heads:
        if "label_heads.safetensors" in files:
            raise EnvelopeError("the PEFT folder has classifiers, and the coordinator has none")
        return
    given = load_tensors(files["label_heads.safetensors"])
    labels = json.loads(files["fedkeel_classes.json"])["labels"]
    if not (given.keys() == labels.keys() == heads.keys()):
        raise EnvelopeError(f"the PEFT folder has classifiers of {', '.join(sorted(given))}, not of {', '.join(sorted(heads))}")
    for task, head in heads.items():
        if labels[task] != list(head.labels) or not torch.equal(given[task], by_label(head)):
            raise EnvelopeError(f"the classifier of {task} in the PEFT folder is not the coordinator's")
