"""``python -m bridge.health``: asks the workers of this host how they are, for probes, systemd and people.

It must be quick, for it is started every few seconds: only the standard library, no settings, no app, no Ray. A worker
answers on a private socket in a folder both know (`bridge/worker/health_server.py`); what it says is judged there.
"""

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

#: Exit codes: all workers asked are well; one is not, or does not answer; there is none, or the command is wrong.
EXIT_WELL, EXIT_UNWELL, EXIT_NOBODY = 0, 1, 2
#: A worker must answer within this, in seconds; Kubernetes' own time-out must be longer.
TIMEOUT_S = 3.0
#: So many letters of a worker's name are in its socket's: the path of a socket may have 107 bytes.
NAME_LETTERS = 50

_ABOUT = """\
Asks the workers on this host (in the folder BRIDGE_RUNTIME_DIR) how they are.
Exit code 0: well. 1: a worker is not ready (or not live), or does not answer. 2: no worker was found, or wrong usage.
"""


class Answer(NamedTuple):
    """What one worker has said; `account` is empty when it does not answer, and `problem` says so."""

    worker: str
    account: dict[str, Any]
    problem: str


def folder() -> Path:
    """Where the sockets of this user's workers lie. Read here too: loading the settings takes longer than all else."""
    return Path(os.environ.get("BRIDGE_RUNTIME_DIR") or f"/tmp/celery-gpu-bridge-{os.geteuid()}")


def socket_of(directory: Path, worker: str, pid: int) -> Path:
    """A worker's socket."""
    return directory / f"{worker[:NAME_LETTERS]}.{pid}.sock"


def main(arguments: list[str]) -> int:
    """Ask and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bridge.health", description=_ABOUT)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--live", action="store_true", help="only whether the worker's loop turns")
    which.add_argument("--ready", action="store_true", help="only whether a GPU task sent now would run")
    parser.add_argument("--json", action="store_true", help="what the workers say, as a JSON list")
    parser.add_argument("--worker", metavar="NAME", help="only this one, by its node name, such as celery@host")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, metavar="S", help="seconds to wait [%(default)g]")
    options = parser.parse_args(arguments)
    wanted = ("live",) if options.live else ("ready",) if options.ready else ("live", "ready")
    answers = list(ask_all(options.worker, options.timeout))
    if options.json:
        print(json.dumps([each.account or {"worker": each.worker, "problem": each.problem} for each in answers]))
    if not answers:
        whose = f"worker {options.worker}" if options.worker else "worker"
        print(
            f"no {whose} of this user runs here: nothing answers in {folder()}. "
            "Start it, or set BRIDGE_RUNTIME_DIR as it is for the worker",
            file=sys.stderr,
        )
        return EXIT_NOBODY
    for each in answers if not options.json else ():
        print("\n".join(_told(each, wanted)))
    return EXIT_WELL if all(_is_well(each, wanted) for each in answers) else EXIT_UNWELL


def ask_all(worker: str | None, timeout_s: float) -> Iterator[Answer]:
    """What each worker on this host says of itself; one that was killed has left its socket, and is not there."""
    for path in sorted(folder().glob("*.sock")):
        name = path.stem.rpartition(".")[0]
        if worker is not None and name != worker[:NAME_LETTERS]:
            continue
        try:
            yield Answer(name, ask(path, timeout_s), "")
        except (ConnectionRefusedError, FileNotFoundError):
            continue
        except (OSError, ValueError) as error:
            why = f"it does not answer within {timeout_s:g} s" if isinstance(error, TimeoutError) else str(error)
            yield Answer(name, {}, why)


def ask(path: Path, timeout_s: float) -> dict[str, Any]:
    """The account of the worker behind a socket.

    Raises:
        OSError: nobody is there, or does not answer in time.
        ValueError: what answers is no worker.
    """
    deadline, data = time.monotonic() + timeout_s, b""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(timeout_s)
        sock.connect(str(path))
        sock.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        while True:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            chunk = sock.recv(65536)
            if not chunk:
                break
            data += chunk
    account = json.loads(data.partition(b"\r\n\r\n")[2])
    if not isinstance(account, dict):
        raise ValueError("what answers is no worker")
    return account


def _is_well(answer: Answer, wanted: tuple[str, ...]) -> bool:
    return all(answer.account.get(each) is True for each in wanted)


def _told(answer: Answer, wanted: tuple[str, ...]) -> Iterator[str]:
    """One line about a worker, and one for each reason why it is not well."""
    account = answer.account
    if not account:
        yield f"{answer.worker}: {answer.problem}"
        return
    if wanted == ("live",):
        yield f"{account['worker']}: {'live' if account['live'] else 'NOT live'} ({account['state']})"
    else:
        ready = sum(actor["state"] == "ready" for actor in account["actors"])
        counts = f"{account['running']} running, {account['waiting']} waiting"
        yield f"{account['worker']}: {account['state']}, {ready} of {len(account['actors'])} actors ready, {counts}"
    if not _is_well(answer, wanted):
        for reason in account["reasons"]:
            yield f"  {reason['what']}; {reason['do']}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
