"""`fedkeel deploy lock`, over tiny wheels: pip itself chooses them, and pip itself takes or refuses what the lock says."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fedkeel import __version__, cli
from fedkeel.deploy.lock import held, lock
from fedkeel.deploy.manifest import DeployError
from fedkeel.deploy.parts import TEMPLATES, fill

PARTS = ("coordinator", "image", "site-a")
FEDKEEL = ["Some_Lib[fast]>=1", "far>=2; extra == 'flower'", "no; extra == 'hub'", "never; sys_platform == 'none'"]


def wheel(folder: Path, name: str, version: str, *lines: str) -> Path:
    """A wheel of one empty module. lines: of its metadata."""
    stem = f"{name.replace('-', '_')}-{version}"
    head = f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n"
    files = {
        f"{name.replace('-', '_')}.py": "",
        f"{stem}.dist-info/METADATA": head + "".join(f"{line}\n" for line in lines),
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{one},,\n" for one in (*files, f"{stem}.dist-info/RECORD"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as packed:
        for one, text in {**files, f"{stem}.dist-info/RECORD": record}.items():
            packed.writestr(one, text)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def needs(*names: str) -> list[str]:
    return [f"Requires-Dist: {name}" for name in names]


def wheels(house: Path) -> dict[str, Path]:
    """What the parts need, and two that they do not: an older release, and a library of another extra."""
    wheel(house, "far", "2.0")
    wheel(house, "no", "1.0")
    extras = ["Provides-Extra: flower", "Provides-Extra: hub"]
    return {
        "fedkeel": wheel(house, "fedkeel", __version__, "License-Expression: Apache-2.0", *extras, *needs(*FEDKEEL)),
        "some-lib": wheel(
            house,
            "some-lib",
            "1.0",
            "Author: Some Body",
            "Provides-Extra: fast",
            "Classifier: License :: OSI Approved :: MIT License",
            *needs("quick; extra == 'fast'"),
        ),
        "quick": wheel(house, "quick", "3.0+cpu", "License: BSD", *needs("some.lib")),
        "far": wheel(house, "far", "2.1"),
    }


def deployment(folder: Path) -> Path:
    """The files of a deployment that a lock looks at."""
    for name in PARTS:
        (folder / name).mkdir(parents=True)
        named = {"EXTRAS": "flower", "VERSION": __version__, "PINS": "some-lib==1.0"}
        (folder / name / "requirements.txt").write_text(fill("requirements.txt", **named))
        (folder / name / "constraints.txt").write_text(fill("constraints.txt", PINS="quick==3.0\nelsewhere==1.0"))
    (folder / "app").mkdir()
    return folder


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = deployment(tmp_path_factory.mktemp("locked") / "ours")
    wheels(folder / "wheelhouse")
    lock(folder)
    return folder


def test_a_lock_holds_the_wheels_that_pip_would_install_and_no_others(locked: Path) -> None:
    files = {"far": "far-2.1", "fedkeel": f"fedkeel-{__version__}", "quick": "quick-3.0+cpu", "some-lib": "some_lib-1.0"}
    lines = [
        f"{name}=={stem.partition('-')[2]} \\\n    --hash=sha256:{sha256(locked / f'wheelhouse/{stem}-py3-none-any.whl')}"
        for name, stem in files.items()
    ]
    for part in PARTS:
        text = (locked / part / "requirements.lock").read_text()
        assert "\n".join(line for line in text.splitlines() if not line.startswith("#")) == "\n".join(lines)
        assert held(locked / part / "requirements.lock") == {
            "far": "2.1",
            "fedkeel": __version__,
            "quick": "3.0+cpu",
            "some-lib": "1.0",
        }
    assert not (locked / "app/requirements.lock").exists()


def install(part: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """As the check list says it, after the wheelhouse was copied into the part."""
    words = next(line for line in (part / "requirements.lock").read_text().splitlines() if line.startswith("# pip "))
    command = [sys.executable, "-m", *words.removeprefix("# ").split(), "--target", str(target)]
    return subprocess.run(command, cwd=part, capture_output=True, text=True)


def test_another_wheel_of_the_same_name_is_refused(locked: Path, tmp_path: Path) -> None:
    """FedKeel's own as any other: on its way to a site somebody puts another line into the file."""
    part = tmp_path / "site-a"
    shutil.copytree(locked / "site-a", part)
    shutil.copytree(locked / "wheelhouse", part / "wheelhouse")
    done = install(part, tmp_path / "good")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "good").glob("*.py")} == {"far.py", "fedkeel.py", "quick.py", "some_lib.py"}
    with zipfile.ZipFile(part / f"wheelhouse/fedkeel-{__version__}-py3-none-any.whl", "a") as packed:
        packed.writestr("more.py", "print('here')")
    done = install(part, tmp_path / "bad")
    assert done.returncode
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr
    assert not list((tmp_path / "bad").glob("*.py"))


def told(part: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((part / "sbom.cdx.json").read_text())
    return found


def test_the_bill_lists_the_same_wheels_and_what_needs_what(locked: Path) -> None:
    found = told(locked / "site-a")
    assert (found["bomFormat"], found["specVersion"], found["version"]) == ("CycloneDX", "1.5", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", found["serialNumber"])
    assert found["metadata"]["component"]["name"] == "site-a"
    purls = {
        "far": "pkg:pypi/far@2.1",
        "fedkeel": f"pkg:generic/fedkeel@{__version__}",
        "quick": "pkg:pypi/quick@3.0%2Bcpu",
        "some-lib": "pkg:pypi/some-lib@1.0",
    }
    parts = {one["name"]: one for one in found["components"]}
    assert {name: one["purl"] for name, one in parts.items()} == purls
    text = (locked / "site-a/requirements.lock").read_text()
    for name, one in parts.items():
        (digest,) = one["hashes"]
        assert digest["alg"] == "SHA-256"
        assert f"{name}=={one['version']} \\\n    --hash=sha256:{digest['content']}\n" in text
    assert parts["quick"]["externalReferences"][0]["url"] == "quick-3.0%2Bcpu-py3-none-any.whl"
    assert {name: one.get("licenses") for name, one in parts.items()} == {
        "far": None,
        "fedkeel": [{"expression": "Apache-2.0"}],
        "quick": [{"license": {"name": "BSD"}}],
        "some-lib": [{"license": {"name": "MIT License"}}],
    }
    assert parts["some-lib"]["author"] == "Some Body"
    assert {one["ref"]: one["dependsOn"] for one in found["dependencies"]} == {
        "part:site-a": [purls["fedkeel"], purls["some-lib"]],
        purls["fedkeel"]: [purls["far"], purls["some-lib"]],
        purls["some-lib"]: [purls["quick"]],
        purls["quick"]: [purls["some-lib"]],
        purls["far"]: [],
    }
    assert found["compositions"] == [{"aggregate": "incomplete", "assemblies": ["part:site-a"]}]  # no word on the system below


def test_the_bill_is_cyclonedx(locked: Path) -> None:
    validation = pytest.importorskip(
        "cyclonedx.validation.json", reason="cyclonedx-python-lib[json-validation] is not installed"
    )
    from cyclonedx.schema import SchemaVersion

    for part in PARTS:
        error = validation.JsonStrictValidator(SchemaVersion.V1_5).validate_str((locked / part / "sbom.cdx.json").read_text())
        assert error is None, error


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, *given: object) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]


@pytest.fixture
def index(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """(URL, folder, what was asked for) of a package index in this process."""
    root = tmp_path / "index"
    root.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=root)) as server:
        server.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://somebody:word@127.0.0.1:{server.server_port}/", root, server.asked  # type: ignore[attr-defined]
        server.shutdown()


def offer(root: Path, path: Path) -> None:
    """Put a wheel on an index."""
    name = path.name.partition("-")[0]
    (root / name).mkdir()
    shutil.move(path, root / name / path.name)
    (root / name / "index.html").write_text(f'<a href="{path.name}#sha256={sha256(root / name / path.name)}">{path.name}</a>')


@pytest.mark.slow
def test_an_index_is_asked_only_if_it_is_named(
    index: tuple[str, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, root, asked = index
    folder = deployment(tmp_path / "ours")
    files = wheels(folder / "wheelhouse")
    (folder / "wheelhouse/far-2.0-py3-none-any.whl").unlink()
    digest = sha256(files["far"])
    offer(root, files["far"])
    monkeypatch.setenv("PIP_INDEX_URL", url)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(DeployError, match=r"cannot be installed from the wheels of .*far.*pip wheel --no-deps -w"):
        lock(folder)
    assert asked == []
    assert not list(folder.rglob("requirements.lock")) + list(folder.rglob("sbom.cdx.json"))
    lock(folder, indexes=[url])
    assert "/far/" in asked
    assert f"far==2.1 \\\n    --hash=sha256:{digest}\n" in (folder / "site-a/requirements.lock").read_text()
    (far,) = (one for one in told(folder / "site-a")["components"] if one["name"] == "far")
    assert far["externalReferences"][0]["url"] == f"http://{url.partition('@')[2]}far/far-2.1-py3-none-any.whl"  # no password


def test_a_fedkeel_of_an_index_is_somebody_elses(index: tuple[str, Path, list[str]], tmp_path: Path) -> None:
    url, root, _ = index
    folder = deployment(tmp_path / "ours")
    files = wheels(folder / "wheelhouse")
    offer(root, files["fedkeel"])
    with pytest.raises(
        DeployError, match=r"fedkeel is on no index, and http://127\.0\.0\.1.* is somebody else's: put its wheel"
    ):
        lock(folder, indexes=[url])
    assert not list(folder.rglob("requirements.lock"))
    files["some-lib"].unlink()
    with pytest.raises(
        DeployError, match=r"cannot be installed from the wheels of .* and http://127\.0\.0\.1:\d+/: .*some-lib"
    ):
        lock(folder, indexes=[url])


def test_a_part_with_a_wheelhouse_of_its_own_is_held_to_that(tmp_path: Path) -> None:
    """As a site with a GPU, whose build is another."""
    folder = deployment(tmp_path / "ours")
    wheels(tmp_path / "given")
    own = wheel(folder / "site-a/wheelhouse", "quick", "3.0+cu130")
    for name in (f"fedkeel-{__version__}", "some_lib-1.0", "far-2.1"):
        shutil.copy(tmp_path / f"given/{name}-py3-none-any.whl", own.parent)
    lines = lock(folder, tmp_path / "given")
    assert lines == [f"{folder / part / 'requirements.lock'}: 4 wheels" for part in PARTS]
    releases = {part: held(folder / part / "requirements.lock")["quick"] for part in PARTS}
    assert releases == {"coordinator": "3.0+cpu", "image": "3.0+cpu", "site-a": "3.0+cu130"}


def test_what_is_no_deployment_or_has_no_wheels_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        DeployError, match=r"holds no requirements\.txt: a folder that `fedkeel deploy init` wrote belongs here"
    ):
        lock(tmp_path)
    folder = deployment(tmp_path / "ours")
    monkeypatch.setattr(sys, "argv", ["fedkeel", "deploy", "lock", str(folder)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert f"{folder}/wheelhouse is no folder: wheels belong there" in " ".join(capsys.readouterr().err.split())
    (folder / "site-a/requirements.lock").write_text("quick>=1\n")
    with pytest.raises(DeployError, match=r"requirements\.lock: 'quick>=1' is not as fedkeel deploy lock writes it"):
        held(folder / "site-a/requirements.lock")


@pytest.mark.parametrize("is_locked", [False, True])
def test_the_image_installs_by_the_lock_where_there_is_one(is_locked: bool, locked: Path, tmp_path: Path) -> None:
    """The one RUN of the Dockerfile, by sh, with a pip that says what it is asked for."""
    text = (TEMPLATES / "image/Dockerfile").read_text().replace("\\\n", "")
    (command,) = re.findall(r"^RUN --mount=type=bind,target=/build cd /build &&(.*)$", text, re.MULTILINE)
    here, bin = tmp_path / "image", tmp_path / "bin"
    shutil.copytree(locked / "image", here)
    (here / "fedkeel-1-py3-none-any.whl").touch()
    if not is_locked:
        (here / "requirements.lock").unlink()
    bin.mkdir()
    (bin / "pip").write_text('#!/bin/sh\necho "$@"\n')
    (bin / "pip").chmod(0o755)
    path = f"{bin}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["sh", "-ec", command], cwd=here, env={"PATH": path}, capture_output=True, text=True)
    by_lock = "--no-index --find-links wheelhouse --require-hashes -r requirements.lock"
    wanted = by_lock if is_locked else "-r requirements.txt ./fedkeel-1-py3-none-any.whl"
    assert done.stdout == f"install --no-cache-dir {wanted}\n", done.stderr
