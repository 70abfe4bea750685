"""``python -m bridge.doctor -A module:app``: looks at the whole set-up before a worker is started, and starts none.

One line per finding, and below each that is not well what to do. It asks broker and backend, joins the Ray cluster, and
starts one executor on a free GPU; what runs there already is not disturbed. What a worker checks at its start is asked
by the same functions.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from bridge.doctor import app_checks, broker_checks
from bridge.doctor.findings import Finding, Level, fail
from bridge.errors import ConfigurationInvalid, StartupError, as_text
from bridge.marks import Mark
from bridge.settings import settings
from bridge.worker.command import CommandLine, load_app, parse
from bridge.worker.readiness import clean

#: Exit codes: nothing stops a worker; something does; the command is wrong.
EXIT_WELL, EXIT_UNWELL, EXIT_USAGE = 0, 1, 2

USAGE = """\
Usage: python -m bridge.doctor -A MODULE[:APP] [--json] [global options of `celery`, such as --broker, --workdir]

Checks versions, app, marks, time limits, acknowledgement, broker, result backend, Ray cluster, and the app on a GPU
node, as a worker started here with the same variables would find them. One line each: OK, WARN or FAIL.
Exit code 0: nothing fails. 1: something does. 2: wrong usage.
"""


def main(arguments: list[str]) -> int:
    """Look, print, and return the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return EXIT_WELL
    words = [word for word in arguments if word != "--json"]
    try:
        line = parse(words)
    except ConfigurationInvalid as error:
        return _misused(str(error))
    if line.worker or line.standalone:
        return _misused(f"unknown option {line.worker[0] if line.worker else '--standalone'}")
    if not (line.value("-A", "--app") or os.environ.get("CELERY_APP")):
        return _misused("which app? name it with -A, as in `python -m bridge.doctor -A shop.celery:app`")
    as_json, found = len(words) < len(arguments), list[Finding]()
    for finding in examine(line):
        found.append(finding)
        if not as_json:
            print(_line(finding), flush=True)
    if as_json:
        print(json.dumps([finding._asdict() for finding in found], indent=1))
    return EXIT_UNWELL if any(finding.level is Level.FAIL for finding in found) else EXIT_WELL


def examine(line: CommandLine) -> Iterator[Finding]:
    """All findings, as they are made; a check that breaks costs only itself."""
    yield from app_checks.versions()
    yield from app_checks.environment()
    try:
        options = settings()
    except ConfigurationInvalid as error:
        yield fail("settings", str(error), "correct the variable; `python -m bridge.worker --help` lists them")
        return
    try:
        app = load_app(line)
        app.loader.import_default_modules()
        app.finalize()
    except StartupError as error:
        yield fail("app", str(error), "correct it; nothing that needs the app was looked at")
        return
    except Exception as error:
        yield fail("app", f"importing its task modules failed: {as_text(error)}", "correct it")
        return
    marks, findings = app_checks.marks(app, options)
    yield from findings
    yield from _guarded("limits", lambda: app_checks.limits(app, marks))
    yield from _guarded("acks", lambda: app_checks.acknowledgement(app, marks))
    yield from _guarded("broker", lambda: broker_checks.broker(app))
    yield from _guarded("result backend", lambda: broker_checks.backend(app))
    yield from _guarded("cluster", lambda: _cluster(app, marks))


def _cluster(app: Any, marks: dict[str, Mark]) -> Iterator[Finding]:
    from bridge.doctor.cluster_checks import cluster  # last: Ray takes a second to load

    return cluster(app, marks, settings())


def _guarded(about: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:
        yield fail(about, f"it could not be looked at: {clean(as_text(error))}", "the text may tell; else report it")


def _line(finding: Finding) -> str:
    first = f"{finding.level:<5}{finding.about}: {finding.text}"
    return f"{first}\n     -> {finding.do}" if finding.do else first


def _misused(text: str) -> int:
    print(f"{text}\n\n{USAGE}", file=sys.stderr)
    return EXIT_USAGE
