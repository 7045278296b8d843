"""Runs whose outcome is kept: what a seed ends in, to the bit. `golden.json` beside this file was made by

    python tests/golden/runs.py            # with the commit that stands in golden.json

and `tests/test_golden.py` holds every later commit to it. A case is a tiny federation (see `tiny.py`), three sites but where it
says otherwise, and what it adds to that recipe. Adapters, checkpoints and rows are kept as SHA-256 and hold on machines
that compute as the one did that made them (`arithmetic`); elsewhere the numbers kept beside them are held to a tolerance.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import tiny  # noqa: E402

KEPT = HERE / "golden.json"

GUIDED = ["distill.weight=1.0", "distill.ramp=0.2"]
STREAM = ['stream.stages=["colour", "echo"]', "federation.rounds=2"]
LEAN = ["evaluation.baselines=[]"]
CASES: dict[str, list[str]] = {
    "fedit": [],
    "full": [
        *STREAM,
        *GUIDED,
        *LEAN,
        "distill.memory=0.5",
        "stream.average=0.5",
        "structure.mode=anchored",
        "structure.heads=0.2",
        "structure.channels=0.2",
        "structure.layers=0.3",
        "structure.rank=0.1",
    ],
    "guidance": [
        *GUIDED,
        *LEAN,
        "distill.gold=hard",
        "distill.rest=entropy",
        "distill.align=cosine",
        "distill.trust_by=label",
        "distill.every=2",
        "train.local_steps=6",
        "train.micro_batch_size=3",
    ],
    "rdrop": [*LEAN, "structure.mode=rdrop", "lora.dropout=0.2", "train.proximal=0.1"],
    "self": [
        *LEAN,
        "structure.mode=self",
        "structure.every=2",
        "structure.branch=0.3",
        "structure.lodrop=0.2",
        "structure.weights=0.1",
        "structure.adversary=0.05",
    ],
    "hold": [*LEAN, "structure.branch=0.4", "structure.hold=true", "federation.weighting=uniform"],
    "sam": [*LEAN, "train.sam=0.05", "train.local_steps=0", "train.local_epochs=1"],
    "ranks": [*LEAN, "federation.rule=svd", "lora.site_ranks=2,4", "lora.rslora=true", "federation.codec_up=int8"],
    "shifts": [*LEAN, "federation.rule=residual", "federation.codec_down=bf16"],
    "alternate": [*LEAN, "federation.rule=alternate"],
    "personal": [*LEAN, "federation.rule=share_a"],
    "feedback": [
        *LEAN,
        "federation.codec_up=topk=0.25+int4",
        "federation.optimiser=momentum",
        "federation.sites_per_round=2",
    ],
    "robust": [
        "evaluation.baselines=base",
        "federation.rule=krum",
        "federation.hostile=1",
        "partition.scheme=iid",
        "partition.sites=5",
    ],
    "replay": [
        *STREAM,
        *LEAN,
        "stream.replay=2",
        "evaluation.unseen_sites=1",
        "model.precision=bf16",
        "partition.scheme=iid",
        "partition.sites=4",
    ],
}
# rows whose value is kept as a number too
SHOWN = ("score", "own_score", "loss", "aggregation_error", "bytes_up", "bytes_down")


def arithmetic() -> str:
    """A fingerprint of how this machine computes: bits of some products, exponentials and a softmax in float32 and bfloat16."""
    torch.set_num_threads(1)
    x = torch.linspace(-3.0, 3.0, 48 * 48).view(48, 48)
    found = [x @ x, x.exp(), (x @ x.T).softmax(-1), (x.bfloat16() @ x.bfloat16()).float(), torch.linalg.qr(x @ x.T)[0]]
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in found)).hexdigest()


def _digest(files: list[Path], folder: Path) -> str:
    whole = hashlib.sha256()
    for path in files:
        whole.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def outcome(folder: Path) -> dict[str, Any]:
    """What is kept of the run in `folder`."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    rows = [{**r, "run": ""} for r in rows if r["unit"] != "seconds"]
    rows = [r for r in rows if r["name"] != "nats"]  # a measure that came later
    shown = {
        f"{r['method']}/{r['name']}": r["value"]
        for r in rows
        if r["name"] in SHOWN and not r["task"] and r["split"] in ("", "test") and r["site"] in ("", "ward-1")
    }
    text = "\n".join(sorted(json.dumps(r, sort_keys=True) for r in rows))
    # checkpoints carry seconds only in messages, never in themselves
    return {
        "adapter": _digest(sorted((folder / "adapter").rglob("adapter_model.safetensors")), folder),
        "checkpoints": _digest(sorted((folder / "checkpoints").rglob("*.fkl")), folder),
        "rows": hashlib.sha256(text.encode()).hexdigest(),
        "numbers": dict(sorted(shown.items())),
    }


def given(name: str, folder: Path) -> list[str]:
    """The overrides of a case, run in `folder`, where base and data are written."""
    base, data = folder / "base", folder / "data"
    if not base.exists():
        base.mkdir(parents=True)
        data.mkdir()
        tiny.write_base(base)
        tiny.write_data(data)
    first = ["train.local_steps=3", tiny.BASELINES]  # as tiny federations were when these were kept
    return [*tiny.overrides(base, data, folder / "runs"), *first, *CASES[name], f"name={name}"]


def main() -> None:
    """Make golden.json anew with the code that is installed."""
    made: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        for name in CASES:
            command = [sys.executable, "-m", "fedkeel.cli", "run", *given(name, Path(work)), "--no-report"]
            subprocess.run(command, check=True)
            made[name] = outcome(Path(work) / "runs" / name)
    commit = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    about = {"commit": commit, "torch": torch.__version__, "arithmetic": arithmetic()}
    KEPT.write_text(json.dumps({**about, "cases": made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
