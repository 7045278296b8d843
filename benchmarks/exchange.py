"""What the exchange costs at Llama-3.1-8B LoRA shapes (r = 16, all seven maps): rules by sites, and codecs.

    python benchmarks/exchange.py [--sites 10 100 1000] [--layers 32] [--rules mean svd ...]

Rules: seconds to aggregate, seconds over the time that reading all updates once takes at the memory bandwidth measured in
the same run, and the peak memory of a process of its own. Updates come one at a time, all views of one adapter, so that what
is measured is the rule and not a random generator; a rule that streams needs as much memory for 1,000 sites as for 10. Rules
that need all sites' factors of a map together are run on few layers (they go map by map, so time grows with the layers) and
on as many sites as --most allows. Codecs: GB of float32 a second, encoding and decoding, and over a plain copy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import torch
from machine import resident

from fedkeel.exchange.codecs import make_codec
from fedkeel.method.aggregate.rule import Options, aggregator
from fedkeel.rng import seed_torch
from fedkeel.tables import RULES
from fedkeel.types import Adapter, Lora, Update

HIDDEN, GROUPS, INNER, RANK = 4096, 1024, 14336, 16
MAPS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (GROUPS, HIDDEN),
    "self_attn.v_proj": (GROUPS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
STREAMING = ("mean", "freeze_a", "alternate")
TOGETHER = ("svd", "stack", "residual")
CODECS = ("fp32", "bf16", "int8", "int4", "topk=0.1", "topk=0.1+int8", "topk=0.1+int4")


def adapter_of(layers: int) -> Adapter:
    seed_torch(1, "bench exchange")
    lora = {
        f"model.layers.{n}.{name}": Lora(0.01 * torch.randn(RANK, d_in), 0.01 * torch.randn(d_out, RANK), 2.0)
        for n in range(layers)
        for name, (d_out, d_in) in MAPS.items()
    }
    return Adapter(lora)


class Stream:
    """`count` updates, made one at a time."""

    def __init__(self, adapter: Adapter, count: int) -> None:
        self._adapter, self._count = adapter, count

    def __iter__(self) -> Iterator[Update]:
        for k in range(self._count):
            yield Update(f"site-{k:04d}", self._adapter, 100)


def size_of(adapter: Adapter) -> int:
    return sum(t.numel() * t.element_size() for t in adapter.tensors().values())


def bandwidth() -> float:
    """Bytes a second read from memory by a sum over 1 GiB, the best of five."""
    block = torch.ones(2**28)
    taken = []
    for _ in range(5):
        begin = time.perf_counter()
        block.sum()
        taken.append(time.perf_counter() - begin)
    return block.numel() * 4 / min(taken)


def one(rule: str, sites: int, layers: int) -> dict[str, float]:
    """Seconds, ratio and peak memory of one aggregation, in this process."""
    adapter = adapter_of(layers)
    idle = resident()
    shares = {f"site-{k:04d}": 1.0 / sites for k in range(sites)}
    begin = time.perf_counter()
    aggregator(rule)(adapter, Stream(adapter, sites), shares, Options())
    seconds = time.perf_counter() - begin
    most = resident()  # before the bandwidth is measured, which takes memory of its own
    bound = sites * size_of(adapter) / bandwidth()
    return {"seconds": seconds, "ratio": seconds / bound, "peak_mb": most, "idle_mb": idle}


def codecs(adapter: Adapter) -> list[dict[str, float | str]]:
    tensors = adapter.tensors()
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    size, room = size_of(adapter), {n: torch.ones_like(t) for n, t in tensors.items()}
    found: list[dict[str, float | str]] = []
    for name in ("memcpy", *CODECS):
        best_in = best_out = float("inf")
        sent = size
        for _ in range(3):
            begin = time.perf_counter()
            if name == "memcpy":
                for n, t in tensors.items():
                    room[n].copy_(t)
                best_in = best_out = min(best_in, time.perf_counter() - begin)
                continue
            encoded = make_codec(name).encode(tensors, 1)
            best_in = min(best_in, time.perf_counter() - begin)
            sent = sum(t.numel() * t.element_size() for t in encoded.values())
            begin = time.perf_counter()
            make_codec(name).decode(encoded, shapes)
            best_out = min(best_out, time.perf_counter() - begin)
        found.append(
            {"codec": name, "encode_gb_s": size / best_in / 1e9, "decode_gb_s": size / best_out / 1e9, "smaller": size / sent}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rules", nargs="+", default=[*STREAMING, *TOGETHER], choices=sorted(RULES))
    parser.add_argument("--layers", type=int, default=32, help="of the rules that stream")
    parser.add_argument("--few", type=int, default=1, help="layers of the others")
    parser.add_argument("--most", type=int, default=100, help="sites of the others at most")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        print(json.dumps(one(args.one[0], int(args.one[1]), int(args.one[2]))))
        return
    results = []
    print(f"{'rule':<12}{'sites':>6}{'layers':>8}{'seconds':>9}{'× reading':>11}{'peak MB':>9}{'of it before':>14}")
    for rule in args.rules:
        for sites in args.sites:
            layers = args.layers if rule in STREAMING else args.few
            if rule not in STREAMING and sites > args.most:
                continue
            command = [sys.executable, __file__, "--one", rule, str(sites), str(layers)]
            got = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            results.append({"rule": rule, "sites": sites, "layers": layers, **{k: round(v, 3) for k, v in got.items()}})
            print(
                f"{rule:<12}{sites:>6}{layers:>8}{got['seconds']:>9.2f}{got['ratio']:>11.1f}{got['peak_mb']:>9.0f}"
                f"{got['idle_mb']:>14.0f}",
                flush=True,
            )
    speed = codecs(adapter_of(4))
    print(f"\n{'codec':<16}{'encode GB/s':>12}{'decode GB/s':>12}{'of memcpy':>16}{'times smaller':>15}")
    copy = speed[0]["encode_gb_s"]
    for line in speed:
        share = f"{line['encode_gb_s'] / copy:.3f} / {line['decode_gb_s'] / copy:.3f}"
        print(f"{line['codec']:<16}{line['encode_gb_s']:>12.2f}{line['decode_gb_s']:>12.2f}{share:>16}{line['smaller']:>15.2f}")
    rounded = [{k: v if isinstance(v, str) else round(v, 3) for k, v in line.items()} for line in speed]
    print(json.dumps({"benchmark": "exchange", "rank": RANK, "rules": results, "codecs": rounded}))


if __name__ == "__main__":
    main()
