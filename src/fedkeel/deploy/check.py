"""What a site can find out before round 1: `fedkeel deploy check site.toml`. Each check is a function that tells what it found.

The files beside site.toml are those that `fedkeel deploy init` wrote: ca.pem, node.key, worker.key, recipe.toml, manifest.json.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import hashlib
import os
import pwd
import shutil
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from packaging.utils import canonicalize_name  # of transformers

from fedkeel import __version__, tables
from fedkeel.data.sources import load_records
from fedkeel.deploy.lock import LOCK, held
from fedkeel.deploy.manifest import DeployError, base_files, files_hash, read_manifest
from fedkeel.engines.sitefile import SiteFile, for_a_part, read_site
from fedkeel.types import FedKeelError

SECONDS = 10.0  # for a connection, for a handshake, for an answer
DAYS_LEFT = 7.0  # a run takes days; a certificate must not end in the middle
# Seconds between this clock and the coordinator's. Flower 1.41 refuses a request signed more than 5 s in its future, or more
# than 305 s in its past.
CLOCK = 4.0
MOST = 12  # labels of a task that are told by name
FREE = 2 * 2**30  # bytes for what a site keeps and logs; adapters are some MB


@dataclass(frozen=True)
class Site:
    """What the checks look at. address: host and port of the coordinator."""

    file: SiteFile
    folder: Path
    host: str
    port: int


@dataclass(frozen=True)
class Finding:
    """One line of the result. text: what was found, or what is wrong and what would be right."""

    name: str
    ok: bool
    text: str


def split_address(address: str) -> tuple[str, int]:
    """host and port of `host:port` or `[v6]:port`. Raises DeployError."""
    host, _, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or (":" in bare) != (host != bare) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise DeployError(f"coordinator {address!r}: host:port belongs here, as in coordinator.example:9443")
    return bare, int(port)


def check_version(site: Site) -> str:
    """The installed FedKeel against the one that the deployment was written with."""
    wanted = read_manifest(site.folder / "manifest.json")["fedkeel"]
    if wanted != __version__:
        raise DeployError(
            f"fedkeel {__version__} is installed; the federation runs {wanted}: install the wheels of {LOCK}, "
            f"or of requirements.txt, beside this site.toml"
        )
    return f"fedkeel {__version__}"


def check_releases(site: Site) -> str:
    """What is installed against requirements.lock, if the part has one."""
    path = site.folder / LOCK
    if not path.is_file():
        return f"not compared, as the part has no {LOCK} (fedkeel deploy lock)"
    wanted = held(path)
    here = {str(canonicalize_name(one.name)): one.version for one in distributions()}
    if wrong := [f"{name} {here.get(name, 'not at all')}" for name, release in wanted.items() if here.get(name) != release]:
        raise DeployError(
            f"installed are {', '.join(wrong)}, and {path} says otherwise: pip install --no-index --find-links wheelhouse "
            f"--require-hashes -r {LOCK}, in the site's part"
        )
    return f"{len(wanted)} wheels of {LOCK}"


def _recipe_text(site: Site) -> str:
    """The recipe as the site was given it. Raises DeployError."""
    path = site.folder / "recipe.toml"
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DeployError(f"{path} cannot be read: {error}; copy it from app/ of the deployment's folder") from error


def check_recipe(site: Site) -> str:
    """The part's recipe against the manifest's hash, and the hash that the site agreed to."""
    digest = hashlib.sha256(_recipe_text(site).encode()).hexdigest()
    wanted, agreed = read_manifest(site.folder / "manifest.json")["recipe"], site.file.recipe_sha256
    if digest != wanted:
        raise DeployError(
            f"{site.folder / 'recipe.toml'} has sha256 {digest[:16]}, where {wanted[:16]} belongs by manifest.json: copy both "
            f"from app/ of the deployment's folder"
        )
    if not agreed:
        return f"sha256 {digest[:16]}, as in the manifest; site.toml holds no recipe_sha256, so the site agrees to any recipe"
    if digest != agreed:
        raise DeployError(
            f"site.toml agrees to recipe_sha256 = {agreed[:16]}…, and {site.folder / 'recipe.toml'} has {digest}: read it, and "
            f"if this site is to take part in that, write this number there"
        )
    return f"sha256 {digest[:16]}, as in the manifest and in site.toml"


def _connect(site: Site) -> socket.socket:
    try:
        return socket.create_connection((site.host, site.port), SECONDS)
    except socket.gaierror as error:
        raise DeployError(
            f"{site.host}: no address for this name ({error.strerror}); ask the network's DNS, or add it to /etc/hosts"
        ) from error
    except OSError as error:
        raise DeployError(
            f"no connection to {site.host} port {site.port}: {error.strerror or error}; is the coordinator's gate running, and "
            f"does every firewall on the way let this site through?"
        ) from error


def check_reach(site: Site) -> str:
    """A TCP connection."""
    begin = time.perf_counter()
    with _connect(site) as link:
        return f"{link.getpeername()[0]} port {site.port}, {1000 * (time.perf_counter() - begin):.0f} ms"


def _secure(site: Site) -> ssl.SSLSocket:
    """A TLS connection whose server has a certificate of our authority, for the coordinator's name. Raises DeployError."""
    ca = site.folder / "ca.pem"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(ca)
    except (OSError, ssl.SSLError) as error:
        raise DeployError(f"{ca} is no certificate ({error}); copy ca.pem from the coordinator's folder") from error
    link = _connect(site)
    try:
        return context.wrap_socket(link, server_hostname=site.host)
    except ssl.SSLCertVerificationError as error:
        link.close()
        right = {
            62: "the certificate is for another name; dial a name that it holds, or have one made with --host of this one",
            64: "the certificate is for another address; dial a name that it holds, or have one made with --host of this one",
            10: "the certificate has ended; the coordinator needs a new one of the same authority (docs/deploy.md)",
            9: "the certificate is not valid yet: this machine's clock is behind, or the coordinator's was ahead",
        }.get(error.verify_code, f"the certificate is not of the authority in {ca}; somebody else answers, or ca.pem is old")
        raise DeployError(f"{site.host}: {right} ({error.verify_message})") from error
    except TimeoutError as error:
        link.close()
        raise DeployError(
            f"{site.host} port {site.port}: no answer to TLS in {SECONDS:g} s; is that port the gate's?"
        ) from error
    except OSError as error:
        link.close()
        raise DeployError(
            f"{site.host} port {site.port} speaks no TLS ({error.args[-1]}); the coordinator's gate belongs there, and nothing "
            f"that talks in plain text"
        ) from error


def check_certificate(site: Site) -> str:
    """A TLS handshake: authority, name, and dates."""
    with _secure(site) as link:
        told, version = link.getpeercert(), link.version()
    assert told is not None
    ends = ssl.cert_time_to_seconds(str(told["notAfter"]))
    days = (ends - time.time()) / 86400
    date = datetime.datetime.fromtimestamp(ends, datetime.UTC).strftime("%Y-%m-%d")
    if days < DAYS_LEFT:
        raise DeployError(
            f"the coordinator's certificate ends on {date}, in {days:.1f} days; a run may take longer: at least {DAYS_LEFT:g} "
            f"days must be left (docs/deploy.md, renewing)"
        )
    return f"{version}, for {site.host}, of our authority, valid to {date} ({days:.0f} days)"


def check_clock(site: Site) -> str:
    """This clock against the Date header of an HTTPS answer, which has whole seconds: the bound is half of one and half the
    way there and back."""
    with _secure(site) as link:
        begin = time.time()
        try:
            link.sendall(f"HEAD / HTTP/1.1\r\nHost: {site.host}\r\nConnection: close\r\n\r\n".encode())
            answer = b""
            while b"\r\n\r\n" not in answer and len(answer) < 65536 and (piece := link.recv(4096)):
                answer += piece
        except OSError as error:
            raise DeployError(f"{site.host}: no answer to an HTTP request ({error}); is that port the gate's?") from error
        end = time.time()
    head = answer.decode("latin-1").split("\r\n")
    date = next((line.partition(":")[2].strip() for line in head if line.lower().startswith("date:")), "")
    try:
        theirs = email.utils.parsedate_to_datetime(date).timestamp() + 0.5
    except ValueError as error:
        raise DeployError(
            f"{site.host} tells no time (no Date header in its answer); compare the clocks by hand, to within {CLOCK:g} s"
        ) from error
    ahead, bound = (begin + end) / 2 - theirs, 0.5 + (end - begin) / 2
    told = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the coordinator's (give or take {bound:.1f} s)"
    if abs(ahead) > CLOCK + bound:
        raise DeployError(
            f"this clock is {told}; at most {CLOCK:g} s belongs here, as requests are signed with the time: set NTP"
        )
    return told


def _user(number: int) -> str:
    """A user's name, or the number where it has none, as in a container."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _owner(path: Path) -> str:
    """Who owns a file, or the innermost folder above it that this user may look into."""
    for one in (path, *path.parents):
        with contextlib.suppress(OSError):
            return _user(one.stat().st_uid)
    return "another user"


def _private(path: Path) -> bytes:
    """The bytes of a file that only its owner may read. Raises DeployError."""
    try:
        content, mode = path.read_bytes(), path.stat().st_mode & 0o777
    except PermissionError as error:
        owner, user = _owner(path), _user(os.geteuid())
        right = f"chmod 600 {path}" if owner == user else f"chown -R {user}: {path.parent}"
        raise DeployError(
            f"{path} is {owner}'s, and {user} may not read it: run this check as the user who runs start.sh; if that is "
            f"{user}, run {right}"
        ) from error
    except OSError as error:
        raise DeployError(
            f"{path} cannot be read: {error.strerror}; copy it from site-NAME/ of the deployment's folder"
        ) from error
    if mode & 0o077:
        raise DeployError(f"{path} has mode {mode:04o}: others may read it; run chmod 600 {path}")
    return content


def check_key(site: Site) -> str:
    """The key that signs this site's requests."""
    path = site.folder / "node.key"
    content = _private(path)
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key

    try:
        key = load_ssh_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise DeployError(f"{path} is no private key in OpenSSH's format, without a password: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        kind = key.curve.name if isinstance(key, ec.EllipticCurvePrivateKey) else type(key).__name__.lower().strip("_")
        raise DeployError(f"{path} is a key of kind {kind}; one on the curve secp384r1 (P-384) belongs here")
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return f"P-384; its public half, to compare with keys/{site.file.name}.pub at the coordinator, ends in {public[-12:]}"


def check_worker(site: Site) -> str:
    """The warm worker's socket and key."""
    if not site.file.warm:
        return "not used (worker.warm = false): the base is loaded anew for each message"
    if len(_private(site.file.key).strip()) < 32:
        raise DeployError(f"{site.file.key}: a key of 32 bytes or more belongs there")
    where = site.file.socket
    if where.exists() and not where.is_socket():
        raise DeployError(f"worker.socket = {where} is there and is no socket; name another path, or remove it")
    # bound under another name, as a worker may be listening
    trial = where.with_name(f"{where.name}.try")
    try:
        where.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(trial))
    except OSError as error:
        raise DeployError(
            f"worker.socket = {where}: no socket can be made there ({error.strerror or error}); a folder on a local disk that "
            f"this user may write to belongs here"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            trial.unlink()
    return str(where)


def check_disk(site: Site) -> str:
    """Room for what the site keeps."""
    state = site.file.state
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(state).free
    except OSError as error:
        raise DeployError(
            f"state = {state}: {error.strerror or error}; a folder that this user may write to belongs here"
        ) from error
    if free < FREE:
        raise DeployError(f"state = {state}: {free / 2**30:.1f} GiB free; at least {FREE / 2**30:g} GiB belongs here")
    return f"{free / 2**30:.1f} GiB free for {state}"


def _same(site: Site, what: str, key: str) -> str:
    """A hash of the base's files against the manifest's."""
    from fedkeel.model.load import base_location  # heavy

    manifest = read_manifest(site.folder / "manifest.json")
    # of the recipe's file alone, so that a mistake in [data] is told once
    base = site.file.base or manifest["base"]
    folder = Path(base_location(base))
    if not folder.is_dir():
        raise DeployError(f"model.base = {base!r} is no folder; name in site.toml where the base lies on this machine")
    files = base_files(folder)[0 if what == "base" else 1]
    digest = files_hash(files)
    told = f"{len(files)} files of {folder}, sha256 {digest[:16]}"
    if not manifest[key]:
        return f"{told}: not compared, as the manifest holds no hash (init without --base); compare it with the other sites'"
    if digest != manifest[key]:
        raise DeployError(
            f"{told}, where {manifest[key][:16]} belongs: this is not the {what} of the federation ({manifest['base']}); copy "
            f"the same folder to every site ({', '.join(path.name for path in files)})"
        )
    return told


def check_base(site: Site) -> str:
    """The base model's files."""
    return _same(site, "base", "base_sha256")


def check_tokenizer(site: Site) -> str:
    """The tokenizer's files."""
    return _same(site, "tokenizer", "tokenizer_sha256")


def check_data(site: Site) -> str:
    """The site's rows, read as a round reads them."""
    from fedkeel.engines.work import localised  # heavy

    recipe = localised(_recipe_text(site), site.file)
    records = load_records(recipe.data, recipe.seed, partly=True)
    if not tables.SOURCES[recipe.data.source].everywhere and recipe.data.site_from == "column":
        foreign = Counter(r.site for r in records if r.site and r.site != site.file.name)
        if foreign:
            name, count = foreign.most_common(1)[0]
            raise DeployError(
                f"{count:,} rows are of site {name!r} by their column {recipe.data.site_column!r}, and this is "
                f"{site.file.name!r}: is this file another site's, or is the name in site.toml another?"
            )
    told = []
    for split in ("train", "validation", "test"):
        tasks = Counter(r.task for r in records if r.split == split)
        each = f" ({', '.join(f'{task} {count:,}' for task, count in sorted(tasks.items()))})" if tasks else ""
        told.append(f"{split} {tasks.total():,}{each}")
    labels = {record.task: record.labels for record in records if record.labels}
    for task, names in sorted(labels.items()):
        more = f" and {len(names) - MOST:,} more" if len(names) > MOST else ""
        told.append(f"{len(names)} labels of {task}: {', '.join(names[:MOST])}{more}")
    return "rows: " + "; ".join(told)


CHECKS: dict[str, Callable[[Site], str]] = {
    "version": check_version,
    "releases": check_releases,
    "recipe": check_recipe,
    "reach": check_reach,
    "certificate": check_certificate,
    "clock": check_clock,
    "key": check_key,
    "worker": check_worker,
    "disk": check_disk,
    "base": check_base,
    "tokenizer": check_tokenizer,
    "data": check_data,
}


def check(path: Path, coordinator: str = "") -> Iterator[Finding]:
    """Every check's finding, in the order of CHECKS; one that fails does not stop the others.

    path: site.toml. coordinator: host:port; empty: the manifest's. Raises FedKeelError if site.toml itself, or the address,
    cannot be read: then there is nothing to check.
    """
    file = read_site(path)
    folder = file.path.parent
    host, port = split_address(coordinator or read_manifest(folder / "manifest.json")["coordinator"])
    site = Site(file, folder, host, port)
    for name, one in CHECKS.items():
        try:
            yield Finding(name, True, one(site))
        except FedKeelError as error:
            yield Finding(name, False, for_a_part(str(error)))
        except Exception as error:  # whatever else it is, say a library that is not installed, the other checks still run
            yield Finding(name, False, f"{type(error).__name__}: {error}")
