"""`fedkeel deploy check`: a clean site passes; each fault, made on purpose, is told by its own check and by no other."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="the extra fedkeel[deploy] is not installed")

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from tiny import tiny_rows
from tls import serving

from fedkeel import cli
from fedkeel.deploy import check as sitecheck
from fedkeel.deploy import keys
from fedkeel.deploy.check import CHECKS, check, split_address
from fedkeel.deploy.init import app_recipe, init
from fedkeel.deploy.keys import certificate, new_key, pem, ssh_pair
from fedkeel.deploy.manifest import DeployError
from fedkeel.deploy.parts import joined

SITE = "ward-1"


@pytest.fixture(scope="module")
def deployment(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coordinator on localhost, and one site with the 24 rows of ward-1."""
    root = tmp_path_factory.mktemp("d")
    data = root / "data"
    data.mkdir()
    rows = [row for row in tiny_rows() if row["department"] == SITE]
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "tasks.json").write_text(json.dumps({"colour": {"labels": ["red", "green", "blue"]}}))
    (root / "recipe.toml").write_text(
        f'name = "wards"\n[model]\nbase = "{tiny_base}"\n[data]\nsource = "jsonl"\nfiles = ["rows.jsonl"]\n'
        'tasks_file = "tasks.json"\nsite_column = "department"\n'
    )
    recipe, base, _ = app_recipe(root / "recipe.toml")
    init(root / "d", recipe, [SITE], ["localhost"], base=base)
    file = root / "d" / f"site-{SITE}" / "site.toml"
    text = file.read_text().replace(f"/srv/fedkeel/models/{tiny_base.name}", str(tiny_base))
    file.write_text(text.replace(f"/srv/fedkeel/{SITE}", str(data)))
    return root / "d"


@pytest.fixture
def site(deployment: Path) -> Iterator[Path]:
    """A copy of the site's folder, at a short path, as sockets want."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="fk-") as short:
        shutil.copytree(deployment / f"site-{SITE}", Path(short) / "s")
        yield Path(short) / "s"


@pytest.fixture(scope="module")
def port(deployment: Path) -> Iterator[int]:
    with serving(deployment / "coordinator/tls.pem", deployment / "coordinator/tls.key") as at:
        yield at


def failures(site: Path, port: int, host: str = "localhost") -> dict[str, str]:
    """check -> what it says, of the checks that fail; all of them ran, in their order."""
    found = list(check(site / "site.toml", joined(host, port)))
    assert [f.name for f in found] == list(CHECKS)
    return {f.name: f.text for f in found if not f.ok}


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_a_clean_site_passes_and_is_told_what_was_found(site: Path, port: int, tiny_base: Path) -> None:
    found = {f.name: f for f in check(site / "site.toml", f"localhost:{port}")}
    assert [f.text for f in found.values() if not f.ok] == []
    assert "for localhost, of our authority, valid to" in found["certificate"].text
    assert "(398 days)" in found["certificate"].text or "(397 days)" in found["certificate"].text
    # ward-1 has numbers 1, 4, … 70; odd ones are colours; number // 2 % 6 gives the split: 0–3 train, 4 validation, 5 test
    assert found["data"].text == (
        "rows: train 18 (colour 12, echo 6); validation 0; test 6 (echo 6); 3 labels of colour: red, green, blue"
    )
    public = (site / "node.pub").read_text().split()[1]
    assert public[-12:] in found["key"].text
    assert str(tiny_base) in found["base"].text
    assert not (site / "state/worker.sock").exists()


# What is wrong -> (how to make it so, the check that says so, a part of what it says). Faults of the site's own files.


def _weights(site: Path) -> None:
    base = site.parent / "base"
    _copy_base(site, base)
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (base / "model.safetensors").write_bytes(content)


def _template(site: Path) -> None:
    base = site.parent / "base"
    _copy_base(site, base)
    (base / "chat_template.jinja").write_text("{{ messages }}")


def _copy_base(site: Path, base: Path) -> None:
    old = next(line for line in (site / "site.toml").read_text().splitlines() if line.startswith("base = ")).split('"')[1]
    shutil.copytree(old, base)
    change(site / "site.toml", f'"{old}"', f'"{base}"')


def _rows(site: Path, *more: str) -> None:
    line = next(line for line in (site / "site.toml").read_text().splitlines() if line.startswith("root = "))
    data = site.parent / "data"
    shutil.copytree(line.split('"')[1], data)
    change(site / "site.toml", line.split('"')[1], str(data))
    with (data / "rows.jsonl").open("a") as file:
        file.writelines(one + "\n" for one in more)


def _locked(name: str, release: str) -> str:
    return f"{name}=={release} \\\n    --hash=sha256:{'0' * 64}\n"


def test_a_site_may_hold_some_of_the_recipes_tasks(site: Path, port: int, deployment: Path) -> None:
    data = site / "data"
    shutil.copytree(deployment.parent / "data", data)
    rows = [row for row in tiny_rows() if row["department"] == SITE and row["task"] == "echo"]
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    change(site / "site.toml", str(deployment.parent / "data"), str(data))
    change(site / "recipe.toml", "tasks = []", 'tasks = ["colour", "echo"]')
    found = {f.name: f for f in check(site / "site.toml", f"localhost:{port}")}
    assert found["data"].text.startswith("rows: train 6 (echo 6)")


def test_a_site_with_what_the_lock_lists_is_told_so(site: Path, port: int) -> None:
    (site / "requirements.lock").write_text(
        "".join(_locked(one, metadata.version(one)) for one in ("numpy", "huggingface-hub"))
    )
    found = {f.name: f for f in check(site / "site.toml", f"localhost:{port}")}
    assert (found["releases"].ok, found["releases"].text) == (True, "2 wheels of requirements.lock")


def _replaced_key(site: Path, content: bytes) -> None:
    (site / "node.key").write_bytes(content)


FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "another FedKeel": (
        lambda s: change(s / "manifest.json", '"fedkeel": "', '"fedkeel": "9.'),
        "version",
        "the federation runs 9.",
    ),
    "another release of a library": (
        lambda s: (s / "requirements.lock").write_text(_locked("numpy", "0.1") + _locked("no-such-library", "2")),
        "releases",
        f"installed are numpy {metadata.version('numpy')}, no-such-library not at all, and",
    ),
    "a lock that is none": (
        lambda s: (s / "requirements.lock").write_text("numpy\n"),
        "releases",
        "requirements.lock: 'numpy' is not as fedkeel deploy lock writes it",
    ),
    "another recipe": (
        lambda s: change(s / "recipe.toml", "rounds = 10", "rounds = 11"),
        "recipe",
        "belongs by manifest.json: copy both",
    ),
    "a recipe that the site did not agree to": (
        lambda s: change(s / "site.toml", 'recipe_sha256 = "', 'recipe_sha256 = "0'),
        "recipe",
        "site.toml agrees to recipe_sha256 = 0",
    ),
    "no recipe": (lambda s: (s / "recipe.toml").unlink(), "recipe data", "recipe.toml cannot be read"),
    "no ca.pem": (lambda s: (s / "ca.pem").unlink(), "certificate clock", "ca.pem is no certificate"),
    "ca.pem of another authority": (
        lambda s: (s / "ca.pem").write_bytes(certificate("other", new_key(), 9).public_bytes(Encoding.PEM)),
        "certificate clock",
        "the certificate is not of the authority in",
    ),
    "key others may read": (lambda s: (s / "node.key").chmod(0o640), "key", "has mode 0640: others may read it; run chmod 600"),
    "no key": (lambda s: (s / "node.key").unlink(), "key", "node.key cannot be read: No such file"),
    "key on another curve": (
        lambda s: _replaced_key(s, ssh_pair(ec.generate_private_key(ec.SECP256R1()), "x")[0]),
        "key",
        "is a key of kind secp256r1",
    ),
    "key in another format": (lambda s: _replaced_key(s, pem(new_key())), "key", "is no private key in OpenSSH's format"),
    "worker key others may read": (lambda s: (s / "worker.key").chmod(0o644), "worker", "worker.key has mode 0644"),
    "short worker key": (lambda s: (s / "worker.key").write_text("secret"), "worker", "a key of 32 bytes or more belongs"),
    "socket is a file": (
        lambda s: (s / "state/worker.sock").write_text(""),
        "worker",
        "is there and is no socket",
    ),
    "socket in no folder": (
        lambda s: change(s / "site.toml", '"state/worker.sock"', '"site.toml/worker.sock"'),
        "worker",
        "no socket can be made",
    ),
    "state is a file": (lambda s: change(s / "site.toml", 'state = "state"', 'state = "node.pub"'), "disk", "File exists"),
    "other weights": (_weights, "base", "this is not the base of the federation"),
    "other chat template": (_template, "tokenizer", "this is not the tokenizer of the federation"),
    "no base": (
        lambda s: change(s / "site.toml", 'base = "', 'base = "/nowhere'),
        "base tokenizer",
        "no such folder",
    ),
    "no rows": (lambda s: change(s / "site.toml", '"rows.jsonl"', '"row.jsonl"'), "data", "data file not found"),
    "a broken line": (lambda s: _rows(s, '{"input": '), "data", "rows.jsonl:25: not JSON"),
    "an unknown label": (
        lambda s: _rows(s, '{"task": "colour", "input": "x", "output": "pink", "department": "ward-1"}'),
        "data",
        "rows.jsonl:25: label 'pink' is not among the labels",
    ),
    "another site's rows": (
        lambda s: _rows(s, '{"task": "echo", "instruction": "i", "input": "x", "output": "y", "department": "ward-2"}'),
        "data",
        "1 rows are of site 'ward-2' by their column 'department', and this is 'ward-1'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_site_is_told_by_its_own_check(fault: str, site: Path, port: int) -> None:
    make, names, told = FAULTS[fault]
    make(site)
    found = failures(site, port)
    assert sorted(found) == sorted(names.split())
    assert all(told in text for text in found.values()), found


def test_a_file_may_have_any_name_at_a_site(site: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where files or folders say which site a row is of, that is of the machine that has them all; here there is one site."""
    real = sitecheck._recipe_text

    def of_files(about: sitecheck.Site) -> str:
        text = real(about)
        assert 'site_from = "column"' in text
        return text.replace('site_from = "column"', 'site_from = "file"').replace('"department"', '""')

    monkeypatch.setattr(sitecheck, "_recipe_text", of_files)
    assert "data" not in failures(site, port)


def test_nobody_there(site: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        found = failures(site, closed.getsockname()[1])
    assert set(found) == {"reach", "certificate", "clock"}
    assert "is the coordinator's gate running" in found["reach"]


def test_a_name_that_nobody_knows(site: Path, port: int) -> None:
    assert "no address for this name" in failures(site, port, "coordinator.invalid")["reach"]


def test_a_coordinator_without_tls(site: Path) -> None:
    with serving(None) as plain:
        found = failures(site, plain)
    assert set(found) == {"certificate", "clock"}
    assert "speaks no TLS" in found["certificate"]


def test_a_coordinator_that_says_nothing(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sitecheck, "SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = failures(site, silent.getsockname()[1])
    assert set(found) == {"certificate", "clock"}
    assert "no answer to TLS in 0.3 s" in found["certificate"]


def test_a_coordinator_under_another_name(site: Path, deployment: Path, tmp_path: Path) -> None:
    """A certificate of the right authority, for somebody else."""
    with serving(*_signed(deployment, tmp_path, 398, ["elsewhere.example"])) as port:
        assert "the certificate is for another name" in failures(site, port)["certificate"]
        assert "the certificate is for another address" in failures(site, port, "127.0.0.1")["certificate"]


@pytest.mark.parametrize(
    ("days", "early", "told"),
    [
        (-0.01, 1, "the certificate has ended"),
        (3.2, 1, "in 3.2 days; a run may take longer: at least 7 days must be left"),
        (30, -24, "the certificate is not valid yet: this machine's clock is behind"),
    ],
)
def test_dates_of_the_certificate(
    days: float, early: int, told: str, site: Path, deployment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "EARLY", datetime.timedelta(hours=early))
    with serving(*_signed(deployment, tmp_path, days, ["localhost"])) as port:
        assert told in failures(site, port)["certificate"]


def _signed(deployment: Path, tmp_path: Path, days: float, names: list[str]) -> tuple[Path, Path]:
    """Certificate and key of a server, by the deployment's own authority."""
    ca = x509.load_pem_x509_certificate((deployment / "ca/ca.pem").read_bytes())
    ca_key = load_pem_private_key((deployment / "ca/ca.key").read_bytes(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = new_key()
    (tmp_path / "c.pem").write_bytes(certificate("x", key, days, names, (ca, ca_key)).public_bytes(Encoding.PEM))
    (tmp_path / "c.key").write_bytes(pem(key))
    return tmp_path / "c.pem", tmp_path / "c.key"


@pytest.mark.parametrize(("ahead", "told"), [(60, r"\b(59|60)\.\d s behind"), (-60, r"\b(59|60|61)\.\d s ahead of")])
def test_a_clock_that_is_off(ahead: int, told: str, site: Path, deployment: Path) -> None:
    with serving(deployment / "coordinator/tls.pem", deployment / "coordinator/tls.key", ahead) as port:
        found = failures(site, port)
    assert set(found) == {"clock"}
    assert re.search(told, found["clock"])
    assert "set NTP" in found["clock"]


def test_a_clock_that_is_not_told(site: Path, deployment: Path) -> None:
    with serving(deployment / "coordinator/tls.pem", deployment / "coordinator/tls.key", dated=False) as port:
        assert "no Date header" in failures(site, port)["clock"]


def test_a_full_disk(site: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.disk_usage(site)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=2**30))
    found = failures(site, port)
    assert set(found) == {"disk"}
    assert "1.0 GiB free; at least 2 GiB belongs here" in found["disk"]


def test_a_manifest_without_hashes_is_told_and_no_failure(site: Path, port: int) -> None:
    told = json.loads((site / "manifest.json").read_text())
    (site / "manifest.json").write_text(json.dumps({**told, "base_sha256": "", "tokenizer_sha256": ""}))
    found = {f.name: f for f in check(site / "site.toml", f"localhost:{port}")}
    assert all(f.ok for f in found.values())
    for name, key in (("base", "base_sha256"), ("tokenizer", "tokenizer_sha256")):
        assert f"sha256 {told[key][:16]}: not compared" in found[name].text


def test_a_site_may_agree_to_any_recipe(site: Path, port: int) -> None:
    digest = hashlib.sha256((site / "recipe.toml").read_bytes()).hexdigest()
    found = {f.name: f.text for f in check(site / "site.toml", f"localhost:{port}")}
    assert found["recipe"] == f"sha256 {digest[:16]}, as in the manifest and in site.toml"
    change(site / "site.toml", f'recipe_sha256 = "{digest}"', "")
    found = {f.name: f.text for f in check(site / "site.toml", f"localhost:{port}")}
    assert found["recipe"].endswith("holds no recipe_sha256, so the site agrees to any recipe")


def test_a_worker_that_listens_is_left_alone(site: Path, port: int) -> None:
    with socket.socket(socket.AF_UNIX) as worker:
        worker.bind(str(site / "state/worker.sock"))
        worker.listen()
        assert failures(site, port) == {}
        with socket.socket(socket.AF_UNIX) as shim:
            shim.connect(str(site / "state/worker.sock"))
    assert os.listdir(site / "state") == ["worker.sock"]


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:0", "host:65536", "host:x", "::1:80", "[::1]"])
def test_bad_addresses(address: str) -> None:
    with pytest.raises(DeployError, match="host:port belongs here"):
        split_address(address)


def test_addresses() -> None:
    assert split_address("h.example:9443") == ("h.example", 9443)
    assert split_address(joined("2001:db8::1", 1)) == ("2001:db8::1", 1)


@pytest.mark.parametrize("broken", [False, True])
def test_from_the_command_line(
    broken: bool, site: Path, port: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit status 0 and a line a check; with two faults 1, both told, and every other check still run."""
    if broken:
        (site / "node.key").chmod(0o644)
        change(site / "site.toml", '"rows.jsonl"', '"row.jsonl"')
    monkeypatch.setattr(
        sys, "argv", ["fedkeel", "deploy", "check", str(site / "site.toml"), "--coordinator", f"localhost:{port}"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr()
    words = [line.split()[:2] for line in told.out.splitlines()]
    bad = {"key", "data"} if broken else set()
    assert words == [["FAIL" if name in bad else "ok", name] for name in CHECKS]
    assert (ended.value.code or 0) == int(broken)
    assert told.err == ("fedkeel: 2 checks failed\n" if broken else "")
