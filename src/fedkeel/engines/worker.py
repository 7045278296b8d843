"""A warm worker: one process at a site that keeps the base model loaded between the messages of a deployment.

Why it is needed. In Flower 1.41 a deployment runs every message in a new process: the SuperNode's executor starts
`flwr-clientapp` with a token of one task, and that process ends itself after one answer. `--isolation process` only moves the
executor (`flower-superexec`) out of the SuperNode: it starts the same process a task. Flower's warm executors are for agents,
models and connectors on Kubernetes, not for ClientApps. So a base model would be read anew each round; the ClientApp is a thin
shim that hands the message to the worker here, and starts one where none answers.

The socket is a Unix socket of mode 0600 in a folder of the site's; both ends prove that they know a key (HMAC, by
`multiprocessing.connection`), and only bytes travel: a JSON header, then the payload. Nothing is unpickled.

One worker a site: it holds a lock for as long as it lives. A shim that finds none starts one and waits for the socket; a
worker that dies in the middle of a request is started again once and asked again, which is safe, as a request names the state
that it starts from (see `work`). A worker that does not answer in time is ended, as it would stand in the way of the next
round. A worker that nobody asks for `idle` seconds ends by itself.

Run by hand: `python -m fedkeel.engines.worker site.toml` serves, `python -m fedkeel.engines.worker site.toml stop` ends it, as
the site's start.sh does once its SuperNode has ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from fedkeel.engines.sitefile import SiteFile, read_site
from fedkeel.engines.world import world_of
from fedkeel.types import FedKeelError

START_SECONDS = 120.0  # from starting a worker to its socket: an interpreter and its imports, not the base model
MOST = 2**32  # bytes of one message


class WorkerError(FedKeelError):
    """A worker that cannot be used; the text says what would be right."""


class BusyError(WorkerError):
    """A worker that is at work on something else."""


def _key(site: SiteFile) -> bytes:
    """The key of the socket, made where there is none; readable by its owner only."""
    site.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    site.key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.suppress(FileExistsError):
        handle = os.open(site.key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_hex(32).encode())
    key = site.key.read_bytes().strip()
    if len(key) < 32 or site.key.stat().st_mode & 0o077:
        raise WorkerError(f"{site.key}: a key of 32 bytes or more belongs there, in a file of mode 0600")
    return key


def _send(connection: Any, header: Mapping[str, Any], payload: bytes) -> None:
    connection.send_bytes(json.dumps(header).encode())
    connection.send_bytes(payload)


def _receive(connection: Any) -> tuple[dict[str, Any], bytes]:
    header = json.loads(connection.recv_bytes(MOST))
    return header, connection.recv_bytes(MOST)


def serve(site: SiteFile) -> None:
    """Answer requests, one at a time, until nobody has asked for `site.idle` seconds or one says stop."""
    key, world = _key(site), world_of(site)
    lock = os.open(site.socket.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # another worker of this site came first, and will answer
        os.close(lock)
        return
    os.truncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())
    site.socket.unlink(missing_ok=True)
    mask = os.umask(0o177)
    try:
        listener = Listener(str(site.socket), "AF_UNIX", backlog=8, authkey=key)
    finally:
        os.umask(mask)
    from fedkeel.engines.work import handle  # heavy: the socket is there first

    def too_long(number: int, frame: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, too_long)
    try:
        while True:
            signal.setitimer(signal.ITIMER_REAL, site.idle)
            try:
                connection = listener.accept()
            except (AuthenticationError, EOFError, ConnectionError):
                continue  # whoever that was does not know the key, or went away
            except TimeoutError:
                return
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            with connection, contextlib.suppress(EOFError, ConnectionError):  # a shim that went away wants no answer
                if not connection.poll(60.0):
                    continue
                header, payload = _receive(connection)
                if header.get("kind") == "stop":
                    with contextlib.suppress(ConnectionError):  # it ends whether or not anybody still listens
                        _send(connection, {"pid": os.getpid()}, b"")
                    return
                if header.get("world", world) != world:
                    why = "the site's file, FedKeel or a library is another than when this worker began: another takes over"
                    print(f"{time.strftime('%F %T')} {why}", file=sys.stderr, flush=True)
                    _send(connection, {"stale": True}, b"")
                    return
                told, out = handle(header, payload, site)
                _send(connection, {**told, "worker": os.getpid()}, out)
    finally:
        listener.close()
        os.close(lock)


def _connect(site: SiteFile, seconds: float = 5.0) -> Connection | None:
    """A connection on which both ends have proved that they know the key; None if nobody listens.

    Raises WorkerError if the other end does not know the key, or is busy with something else for `seconds`.
    """
    key = _key(site)
    with socket.socket(socket.AF_UNIX) as plain:
        try:
            plain.connect(str(site.socket))
        except (FileNotFoundError, ConnectionError):
            return None
        connection: Connection = Connection(plain.detach())
    try:
        if not connection.poll(seconds):  # not `Client`, which would wait for ever
            raise BusyError(f"site {site.name}: its worker is busy with something else")
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
    except (EOFError, ConnectionError):
        connection.close()
        return None
    except AuthenticationError as error:
        connection.close()
        raise WorkerError(f"{site.socket}: whoever listens there does not know the key of {site.key}") from error
    except BusyError:
        connection.close()
        raise
    return connection


def _log(site: SiteFile) -> Path:
    return site.state / "worker.log"


def _start(site: SiteFile) -> Connection:
    """A connection to a worker that this starts, or that another shim is starting. Raises WorkerError."""
    site.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    end = time.monotonic() + START_SECONDS
    process: subprocess.Popen[bytes] | None = None
    while time.monotonic() < end:
        if process is None or process.poll() == 0:  # it gave way to one that was about to end
            with _log(site).open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "fedkeel.engines.worker", str(site.path)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        connection = _connect(site, end - time.monotonic())
        if connection is not None:
            return connection
        if process.poll():
            raise WorkerError(f"site {site.name}: its worker could not start:\n{_tail(site)}")
        time.sleep(0.05)
    raise WorkerError(f"site {site.name}: its worker did not listen within {START_SECONDS:g} s; see {_log(site)}")


def _tail(site: SiteFile) -> str:
    with contextlib.suppress(OSError):
        return "\n".join(_log(site).read_text(errors="replace").splitlines()[-20:])
    return ""


def end(site: SiteFile) -> None:
    """End a worker that does not answer. Only the process that holds the site's lock is touched."""
    with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
        lock = os.open(site.socket.with_suffix(".lock"), os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # if this works there is none
        except BlockingIOError:
            os.kill(int(os.read(lock, 32)), signal.SIGKILL)
        finally:
            os.close(lock)


def ask(site: SiteFile, header: Mapping[str, Any], payload: bytes, seconds: float) -> tuple[dict[str, Any], bytes]:
    """The answer of the site's worker to one request, see `work.handle`; one is started where there is none.

    Raises WorkerError if it cannot start, has not answered after `seconds`, or died over the request twice.
    """
    end_at = time.monotonic() + min(seconds, 1e6)  # more is no time-out, and the system counts in milliseconds

    def left() -> float:
        return max(0.0, end_at - time.monotonic())

    header, died = {**header, "world": world_of(site)}, 0
    try:
        for _ in range(4):
            with _connect(site, left()) or _start(site) as connection, contextlib.suppress(EOFError, ConnectionError):
                _send(connection, header, payload)
                if not connection.poll(left()):
                    raise BusyError(f"site {site.name}: no answer after {seconds:.0f} s")
                told, out = _receive(connection)
                if not told.get("stale"):
                    return told, out
                continue
            died += 1
            if died == 2:
                raise WorkerError(
                    f"site {site.name}: its worker died over this request, twice; the end of {_log(site)}:\n{_tail(site)}"
                )
    except BusyError as error:
        end(site)
        raise WorkerError(f"{error}; it was ended, and the next request starts another") from error
    raise WorkerError(
        f"site {site.name}: even anew, its worker sees another site file, FedKeel or library than what asks it; do both run "
        f"from one environment?"
    )


def stop(site: SiteFile, seconds: float = 10.0) -> bool:
    """Ask a worker to end; True if there was one. One that is busy is ended after `seconds`."""
    try:
        connection = _connect(site, seconds)
    except BusyError:
        end(site)
        return True
    if connection is None:
        return False
    with connection, contextlib.suppress(EOFError, ConnectionError):
        _send(connection, {"kind": "stop"}, b"")
        if connection.poll(seconds):
            _receive(connection)
        else:
            end(site)
    return True


def main(arguments: Sequence[str]) -> int:
    """The command line, see above; the exit status."""
    try:
        site = read_site(Path(arguments[0]))
        if arguments[1:] != ["stop"]:
            serve(site)
        elif stop(site):
            print(f"site {site.name}: its worker has ended", flush=True)
    except FedKeelError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
