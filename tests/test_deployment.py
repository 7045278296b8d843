"""Real processes on the loopback: SuperLink with TLS and site authentication, three sites with private files, one adapter.

Slow, as every message starts a process of Flower's, and a site that has gone is waited for until the round's deadline.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from test_run import adapter_of, go, rows_of, same

pytest.importorskip("flwr", reason="the extra fedkeel[flower] is not installed")

from loopback import SECONDS, Deployment, deployed
from tiny import tiny_rows
from wire import Wire

import fedkeel.federation.local
import fedkeel.runs.here
from fedkeel.data.pydocs import records
from fedkeel.deploy.keys import certificate, new_key, ssh_pair
from fedkeel.recipe.load import load_recipe
from fedkeel.runs.folder import RunFolder
from fedkeel.types import Reply, Request

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
SITES = ("ward-0", "ward-1", "ward-2")

pytestmark = pytest.mark.deployment


def wards(tmp_path: Path, overrides: list[str], base: Path, **more: Any) -> AbstractContextManager[Deployment]:
    rows = {name: [row for row in tiny_rows() if row["department"] == name] for name in SITES}
    return deployed(tmp_path / "deployment", overrides, rows, {"colour": ["red", "green", "blue"]}, base, **more)


def start_sites(there: Deployment) -> None:
    for name in SITES:
        there.start(name, f"site-{name}/start.sh")


def losses(folder: RunFolder) -> dict[str, list[int]]:
    """site -> the rounds that it took part in."""
    found: dict[str, list[int]] = {name: [] for name in SITES}
    for row in rows_of(folder):
        if row["name"] == "loss" and row["site"]:
            found[row["site"]].append(row["round"])
    return found


def twin(overrides: list[str], took: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The same federation in this process, where a site is away in the rounds that `took` does not name."""

    class Away(fedkeel.federation.local.LocalTransport):
        turn = 0

        def exchange(self, requests: Sequence[Request], deadline: float) -> list[Reply]:
            self.turn += 1
            there = [r for r in requests if self.turn in took[r.site]]
            gone = [Reply(r.site, error="away") for r in requests if r not in there]
            return [*super().exchange(there, deadline), *gone]

    monkeypatch.setattr(fedkeel.runs.here, "LocalTransport", Away)
    return go([*overrides, "name=twin"])[1]


def test_the_quickstart_at_three_sites_ends_in_the_bits_of_one_process(tmp_path: Path) -> None:
    """The recipe itself but for its rounds and where rows are: three areas of the library, each in a private file."""
    told = load_recipe(QUICKSTART)
    rows: dict[str, list[dict[str, str]]] = {area: [] for area in ("files", "network", "text")}
    for r in records(None, told.seed, 96, told.data.tasks):
        if r.site in rows:
            row = {"id": r.id, "task": r.task, "instruction": r.instruction, "input": r.input, "output": r.output}
            rows[r.site].append({**row, "split": r.split, "site": r.site})
    labels = {"kind": ["class", "function"]}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for of in rows.values() for row in of))
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": {task: {"labels": of} for task, of in labels.items()}}))
    overrides = [
        "name=there",
        f"out={tmp_path}",
        "threads=1",
        "data.source=jsonl",
        f"data.root={tmp_path}",
        'data.files=["rows.jsonl"]',
        "data.tasks_file=tasks.json",
        "data.site_column=site",
        "federation.rounds=3",
        "evaluation.baselines=[]",
        "evaluation.test_rows=0",
        "evaluation.validation_rows=1",
        "evaluation.every=9",
    ]
    _, here, _ = go([*overrides, "name=here"], recipe=QUICKSTART)
    with deployed(tmp_path / "deployment", overrides, rows, labels, None, recipe=QUICKSTART) as there:
        there.up()
        for name in rows:
            there.start(name, f"site-{name}/start.sh")
        code, told_there = there.run()
        assert code == 0, told_there + there.log()
        workers = {name: (there.folder / f"site-{name}" / "state").exists() for name in rows}
        assert set(there.members()) == set(rows)
        assert set(there.members().values()) == {int(node["node-id"]) for node in there.nodes()}
    assert "round 3 of 3: 3 sites" in told_there
    assert "believed" not in told_there
    assert all(workers.values())
    assert same(adapter_of(here.path), adapter_of(there.results.path))
    assert there.results.state().finished

    def score(folder: RunFolder) -> list[Any]:
        wanted = [r for r in rows_of(folder) if (r["name"], r["task"], r["split"], r["site"]) == ("score", "", "test", "")]
        return [r["value"] for r in wanted]

    assert len(score(here)) == 1
    assert score(there.results) == pytest.approx(score(here))


def test_a_stream_with_baselines_at_three_sites_ends_in_the_bits_of_one_process(
    tiny_overrides: list[str], tiny_base: Path, tmp_path: Path
) -> None:
    """Two stages, guidance with a memory of the first, and the base and local models beside the federated one."""
    overrides = [
        *tiny_overrides,
        "stream.stages=colour,echo",
        "evaluation.baselines=base,local",
        "federation.rounds=2",
        "distill.weight=1",
        "distill.memory=0.4",
        "structure.heads=0.2",
        "evaluation.test_rows=0",
        "evaluation.every=9",
        "federation.codec_up=topk=0.25+int4",
    ]
    _, here, _ = go([*overrides, "name=here"])
    with wards(tmp_path, overrides, tiny_base) as there:
        there.up()
        start_sites(there)
        code, told = there.run()
        assert code == 0, told + there.log()
    assert same(adapter_of(here.path), adapter_of(there.results.path))

    def scores(folder: RunFolder) -> dict[tuple[Any, ...], float]:
        rows = [r for r in rows_of(folder) if r["split"] == "test" and (r["method"] != "local" or r["name"] == "own_score")]
        return {(r["method"], r["name"], r["stage"], r["task"], r["site"]): r["value"] for r in rows}

    assert scores(there.results) == pytest.approx(scores(here))
    assert {method for method, *_ in scores(here)} == {"base", "federated", "local"}


def test_killed_workers_and_coordinators_change_no_bit(tiny_overrides: list[str], tiny_base: Path, tmp_path: Path) -> None:
    """A worker is killed in the first rounds, then the ServerApp; a second run goes on from the last checkpoint."""
    few = ["evaluation.baselines=[]", "evaluation.test_rows=1", "evaluation.every=9", "federation.rounds=5"]
    overrides = [*tiny_overrides, *few, "federation.codec_up=topk=0.25+int4"]
    _, here, _ = go([*overrides, "name=here"])
    with wards(tmp_path, overrides, tiny_base) as there:
        there.up()
        start_sites(there)
        there.begin()
        there.until_round(1)
        os.kill(there.worker("ward-0"), signal.SIGKILL)
        there.until_round(2)
        assert there.kill("flwr-serverapp")
        done = there.results.state().round
        code, told = there.run()
        assert code == 0, told + there.log()
        there.processes["ward-1"].send_signal(signal.SIGINT)  # its worker ends with it
        assert there.processes["ward-1"].wait(SECONDS) == 0
        end = time.monotonic() + SECONDS
        while there.site("ward-1").socket.exists():
            assert time.monotonic() < end
            time.sleep(0.1)
    assert 2 <= done < 5
    assert same(adapter_of(here.path), adapter_of(there.results.path))
    assert losses(there.results)["ward-0"] == [1, 2, 3, 4, 5]


RAISES = """
import os, sys
if "fedkeel.engines.worker" in sys.orig_argv and os.path.exists({flag!r}):
    import fedkeel.federation.train
    def train_round(*given, **more):
        raise ZeroDivisionError("nobody is in this ward")
    fedkeel.federation.train.train_round = train_round
"""


FEW = [
    "evaluation.baselines=[]",
    "evaluation.test_rows=1",
    "evaluation.every=9",
    "federation.rounds=6",
    "federation.quorum=0.6",
    "federation.deadline=45",
    "federation.codec_up=topk=0.25+int4",
]


@pytest.mark.faults
def test_sites_that_die_raise_and_come_back(
    tiny_overrides: list[str], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three sites are enough; one is not. What the sites keep is what a federation in one process would have."""
    flag = tmp_path / "raise"
    with wards(tmp_path, [*tiny_overrides, *FEW], tiny_base, wait=90.0) as there:
        (tmp_path / "hook").mkdir()
        (tmp_path / "hook" / "sitecustomize.py").write_text(RAISES.format(flag=str(flag)))
        script = there.folder / "site-ward-1" / "start.sh"
        hook = f'export PYTHONPATH="{tmp_path / "hook"}:$PYTHONPATH"\nsetsid '
        script.write_text(script.read_text().replace("setsid ", hook))
        there.up()
        start_sites(there)
        run = there.begin()
        there.until_round(1)
        there.lose("ward-2")  # in round 2, or on its way to it
        there.until_round(3)  # two rounds without it: the quorum holds
        there.lose("ward-1")
        assert there.end(run) == "finished:failed"
        told = there.flwr("log", run, "here", "--show")
        assert "1 of 3 sites answered well" in told, told
        assert "ward-1" in told
        assert "ward-2" in told
        assert "no answer within 45 s" in told or "its SuperNode is down" in told
        stood = there.results.state().round
        assert stood >= 3

        flag.touch()
        there.until_gone(1)
        there.start("ward-1", "site-ward-1/start.sh")
        there.until_online(2)
        code, told = there.run()
        assert code == 1, told
        assert "ZeroDivisionError: nobody is in this ward" in told  # the traceback, at the coordinator
        assert there.results.state().round == stood  # the checkpoint of the round before stands

        flag.unlink()
        there.stop_worker("ward-1")
        there.start("ward-2", "site-ward-2/start.sh")
        there.until_online(3)
        code, told = there.run()
        assert code == 0, told + there.log()
    took = losses(there.results)
    assert took["ward-0"] == took["ward-1"] == [1, 2, 3, 4, 5, 6]
    assert {1, 6} <= set(took["ward-2"])  # it came back
    assert not {2, 3} & set(took["ward-2"])
    assert same(adapter_of(there.results.path), adapter_of(twin([*tiny_overrides, *FEW], took, monkeypatch).path))


@pytest.mark.faults
def test_a_member_that_takes_the_name_of_another_is_asked_for_nothing(
    tiny_overrides: list[str], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ward-0 is away, and ward-1's key says that it is ward-0: it takes part under neither name."""
    overrides = [*tiny_overrides, *FEW, "federation.quorum=0.3", "federation.rounds=2"]
    with wards(tmp_path, overrides, tiny_base, wait=90.0) as there:
        there.up()
        file = there.folder / "site-ward-1" / "site.toml"
        file.write_text(file.read_text().replace('name = "ward-1"', 'name = "ward-0"'))
        for name in ("ward-1", "ward-2"):
            there.start(name, f"site-{name}/start.sh")
        code, told = there.run()
        assert code == 0, told + there.log()
        node, owner = (there.members()[name] for name in ("ward-1", "ward-0"))
    said = f"node {node} says that it is site 'ward-0', and is not believed: that name's key was registered as node {owner}"
    assert f"note: {said}" in told
    took = losses(there.results)
    assert took == {"ward-0": [], "ward-1": [], "ward-2": [1, 2]}
    assert same(adapter_of(there.results.path), adapter_of(twin(overrides, took, monkeypatch).path))


def test_strangers_are_refused(tiny_overrides: list[str], tiny_base: Path, tmp_path: Path) -> None:
    """A key that is not registered, another authority, plain text, and a key that was revoked."""
    with wards(tmp_path, tiny_overrides, tiny_base) as there:
        there.up()
        there.start("ward-0", "site-ward-0/start.sh")
        there.until_online(1)

        def refused(name: str, *replaced: tuple[str, str], **files: bytes) -> str:
            """What a copy of ward-1 says that has other files and another line of arguments."""
            copy = there.folder / name
            shutil.copytree(there.folder / "site-ward-1", copy)
            for file, content in files.items():
                (copy / file.replace("_", ".")).write_bytes(content)
            script = (copy / "start.sh").read_text()
            for old, new in (*replaced, ("flower-supernode ", "flower-supernode --max-retries 1 ")):
                assert old in script
                script = script.replace(old, new)
            (copy / "start.sh").write_text(script)
            said = there.folder / f"{name}.log"
            with said.open("wb") as log:  # not a pipe: what it started may hold that open
                process = subprocess.Popen(
                    [str(copy / "start.sh")], env=there.environment, stdout=log, stderr=log, start_new_session=True
                )
            there.processes[name] = process
            assert process.wait(SECONDS) != 0
            assert there.online() == 1
            return said.read_text()

        private, _ = ssh_pair(new_key(), "stranger")
        assert "[code: 2004] Failed to activate SuperNode" in refused("unknown", node_key=private)
        authority = certificate("another authority", new_key(), 9).public_bytes(Encoding.PEM)
        assert "CERTIFICATE_VERIFY_FAILED" in refused("authority", ca_pem=authority)
        trust, key = '--root-certificates "$here/ca.pem"', '--auth-supernode-private-key "$here/node.key"'
        assert "SuperNode authentication requires a secure TLS connection" in refused(
            "key-in-plain-text", (trust, "--insecure")
        )
        assert "could not establish a connection" in refused("plain-text", (trust, "--insecure"), (key, ""))

        there.start("ward-1", "site-ward-1/start.sh")
        there.until_online(2)
        there.revoke("ward-1")
        there.processes["ward-1"].wait(SECONDS)  # it is told so, and ends
        assert there.online() == 1
        assert "[code: 2004] Failed to activate SuperNode" in refused("revoked")


@pytest.fixture
def cut_off() -> Iterator[tuple[dict[str, Wire], dict[str, list[str]]]]:
    """Four network namespaces, the coordinator's at 10.77.0.1: each site's wire to it, and how to run a command in each."""
    if os.geteuid() or not shutil.which("ip") or not Path("/dev/net/tun").exists():
        pytest.skip("network namespaces need root, iproute2 and /dev/net/tun")

    def ip(*arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no network namespaces on this machine: ip {' '.join(arguments)}: {done.stderr.strip()}")

    mark = f"fk{os.getpid()}"
    with ExitStack() as stack:
        spaces = {name: f"{mark}-{name}" for name in ("coordinator", *SITES)}
        for space in spaces.values():
            ip("netns", "add", space)
            stack.callback(subprocess.run, ["ip", "netns", "del", space])
            ip("-n", space, "link", "set", "lo", "up")
        hub = spaces["coordinator"]
        ip("-n", hub, "addr", "add", "10.77.0.1/32", "dev", "lo")
        wires = {}
        for number, name in enumerate(SITES):
            device, address = f"wire{number}", f"10.77.0.{10 + number}/32"
            wires[name] = Wire(hub, spaces[name], device, 0.02, number)
            stack.callback(wires[name].close)
            ip("-n", spaces[name], "addr", "add", address, "dev", device)
            for space, there in ((hub, address), (spaces[name], "10.77.0.1/32")):
                ip("-n", space, "link", "set", device, "up")
                ip("-n", space, "route", "add", there, "dev", device)
        yield wires, {name: ["ip", "netns", "exec", space] for name, space in spaces.items()}


@pytest.mark.faults
def test_lost_packets_and_a_partition_lose_nothing(
    tiny_overrides: list[str],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut_off: tuple[dict[str, Wire], dict[str, list[str]]],
) -> None:
    """One packet in fifty is lost; one site is cut off for a moment, then for longer than two rounds wait for it."""
    wires, inside = cut_off
    overrides = [*tiny_overrides, *FEW, "federation.rounds=10"]
    with wards(tmp_path, overrides, tiny_base, host="10.77.0.1", inside=inside) as there:
        there.up()
        start_sites(there)
        run = there.begin()
        there.until_round(1)
        wires["ward-2"].cut.set()
        time.sleep(5)
        wires["ward-2"].cut.clear()
        there.until_round(2)
        wires["ward-2"].cut.set()
        there.until_round(4)
        wires["ward-2"].cut.clear()
        assert there.end(run) == "finished:completed", there.log()
    assert all(wire.dropped and wire.carried > 100 for wire in wires.values())
    took = losses(there.results)
    assert took["ward-0"] == took["ward-1"] == list(range(1, 11))
    assert {1, 2, 10} <= set(took["ward-2"])
    assert len(took["ward-2"]) < 10
    assert same(adapter_of(there.results.path), adapter_of(twin(overrides, took, monkeypatch).path))
