"""``python -m bridge.worker``: ``celery worker`` with GPU tasks. Takes every option of it, and ``--standalone``.

It checks what can be checked before start (app, settings, broker), rewrites the command line into a complete
``celery ... worker --pool custom`` one, so that SIGHUP, ``--detach`` and ``celery multi`` repeat it, and hands over.
"""

import importlib.metadata
import os
import shutil
import sys
import sysconfig
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

USAGE = """\
Usage: python -m bridge.worker -A MODULE[:APP] [--standalone] [any option of `celery worker`]

A Celery worker whose GPU tasks (marked @app.task(gpu=True), or named in BRIDGE_GPU_TASKS) run on warm
Ray actors; all other tasks run in Celery's own prefork children. It uses the Ray cluster that
`ray start` brought up on this host, or BRIDGE_RAY_ADDRESS=host:port.

Bridge Options:
  --standalone          One machine, nothing else needed: start Redis (at the app's broker URL, unless
                        one answers there) and a local Ray, and take both down again at the end.

  --drivers N           Driver processes of this worker, for hosts with many cores [BRIDGE_DRIVERS, 1].

Settings (environment):
"""

_GLOBAL_VALUES = ("-A", "--app", "-b", "--broker", "--result-backend", "--loader", "--config", "--workdir")
_GLOBAL_FLAGS = ("-C", "--no-color", "-q", "--quiet", "--skip-checks")


class CommandLine(NamedTuple):
    """Our options taken out, Celery's global ones apart from the worker's."""

    standalone: bool
    globals: dict[str, str | None]
    worker: list[str]

    def value(self, *names: str) -> str | None:
        """The value of a global option, under whichever of its names it was given."""
        return next((self.globals[name] for name in names if name in self.globals), None)


def parse(arguments: list[str]) -> CommandLine:
    """Split a command line; Celery itself refuses what it does not know.

    Raises:
        ConfigurationInvalid: an option that contradicts this command.
    """
    from bridge.errors import ConfigurationInvalid

    standalone, rest = False, list[str]()
    found: dict[str, str | None] = {}
    left = list(arguments)
    if left[:1] == ["worker"]:
        left.pop(0)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        short = next((o for o in ("-A", "-b") if word.startswith(o) and len(word) > 2), None)
        if word == "--standalone":
            standalone = True
        elif name == "--drivers":
            if not equals and not left:
                raise ConfigurationInvalid("--drivers needs a number")
            os.environ["BRIDGE_DRIVERS"] = value if equals else left.pop(0)  # what SIGHUP starts keeps it, too
        elif name in _GLOBAL_VALUES:
            if not equals and not left:
                raise ConfigurationInvalid(f"{name} needs a value")
            found[name] = value if equals else left.pop(0)
        elif short:
            found[short] = word[2:].lstrip("=")
        elif word in _GLOBAL_FLAGS:
            found[word] = None
        elif name in ("-P", "--pool") or (word.startswith("-P") and len(word) > 2):
            raise ConfigurationInvalid("leave -P/--pool out: this command brings its own pool (prefork plus GPU tasks)")
        else:
            rest.append(word)
    if standalone and any(word in ("-D", "--detach") for word in rest):
        raise ConfigurationInvalid("--standalone and --detach exclude each other: what started Redis and Ray must stay")
    return CommandLine(standalone, found, rest)


def main(arguments: list[str]) -> None:
    """Run the worker; ends the process with its exit code."""
    os.environ["CELERY_CUSTOM_WORKER_POOL"] = "bridge.pool:HybridPool"  # read when celery is imported
    from bridge.errors import StartupError

    if any(word in ("-h", "--help") for word in arguments):
        _help()
    if "--version" in arguments:
        names = ("celery-gpu-bridge", "celery", "ray")
        print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
        return
    with ExitStack() as at_end:
        try:
            line = parse(arguments)
            app = load_app(line)
            if line.standalone:
                from bridge.worker.standalone import start

                start(app, at_end)
            _check_settings()
            _check_broker(app)
        except StartupError as error:
            from bridge.pool import refuse

            refuse(error)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        _hand_over(line)


def load_app(line: CommandLine) -> Any:
    """Import the app as Celery will.

    Raises:
        AppNotImportable: in one line.
    """
    from celery.app.utils import find_app

    from bridge.errors import AppNotImportable

    workdir = line.value("--workdir")
    if workdir:
        os.chdir(workdir)
    for variable, names in {
        "CELERY_BROKER_URL": ("-b", "--broker"),
        "CELERY_RESULT_BACKEND": ("--result-backend",),
        "CELERY_LOADER": ("--loader",),
        "CELERY_CONFIG_MODULE": ("--config",),
    }.items():
        value = line.value(*names)
        if value:
            _warn_of_password(names[0], variable, value)
            os.environ[variable] = value
    name = line.value("-A", "--app") or os.environ.get("CELERY_APP")
    if not name:
        raise AppNotImportable("which app? name it with -A, as in `python -m bridge.worker -A shop.celery:app`")
    os.environ["CELERY_APP"] = name
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return find_app(name)
    except ModuleNotFoundError as error:
        if ":" in str(error.name):  # Celery looks for a module of that name when the attribute is missing
            module, _, attribute = name.partition(":")
            raise AppNotImportable(
                f"module {module!r} has no Celery app named {attribute!r}; name it as module:attribute"
            ) from error
        hint = "run this in the folder that holds it, or give --workdir" if str(error.name) in name else "install it"
        raise AppNotImportable(f"cannot import the app {name!r}: no module named {error.name!r}; {hint}") from error
    except AttributeError as error:
        raise AppNotImportable(f"cannot find a Celery app in {name!r}: {error}; name it as module:attribute") from error
    except Exception as error:
        from bridge.errors import as_text

        raise AppNotImportable(f"importing the app {name!r} failed: {as_text(error)}{_place(error)}") from error


def _warn_of_password(option: str, variable: str, value: str) -> None:
    """Command lines are for every user of the machine to see."""
    from urllib.parse import urlsplit

    try:
        has_password = bool(urlsplit(value).password)
    except ValueError:
        return
    if has_password:
        text = f"other users of this machine can read the password after {option}: set {variable}, or the app's setting"
        print(f"bridge: warning: {text}", file=sys.stderr, flush=True)


def _place(error: BaseException) -> str:
    """Where the user's code raised: the last frame in a file outside the installed packages."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_file() and "site-packages" not in frame.filename]
    own = [frame for frame in own if not Path(frame.filename).is_relative_to(sysconfig.get_path("stdlib"))]
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


def _check_settings() -> None:
    from bridge.settings import settings

    settings()


def _check_broker(app: Any) -> None:
    """Reach broker and result backend once; the broker is tried for BRIDGE_CONNECT_WAIT_S.

    A result backend that does not answer is only said: Celery works on without it.

    Raises:
        BrokerUnreachable: with the address, without its password; also when the result backend refuses.
    """
    from bridge.errors import BrokerUnreachable, as_text
    from bridge.settings import settings

    deadline = time.monotonic() + settings().connect_wait_s
    for what, address, attempt in (
        ("broker", app.connection_for_read().as_uri(), lambda: ping_broker(app)),
        ("result backend", app.backend.as_uri(), lambda: ping_backend(app)),
    ):
        while True:
            try:
                attempt()
                break
            except Exception as error:
                refused = is_refusal(error)
                if what == "result backend" and not refused:
                    text = f"the result backend {address} does not answer: {as_text(error, 160)}"
                    print(f"bridge: warning: {text}; results are lost until it does", file=sys.stderr, flush=True)
                    break
                if refused or time.monotonic() > deadline:
                    raise BrokerUnreachable(
                        f"the {what} {address} cannot be used: {as_text(error, 160)}; {advice_on(error)}"
                    ) from error
                time.sleep(0.5)


def is_refusal(error: Exception) -> bool:
    """Whether a broker or backend is there and does not let us in."""
    return any(word in str(error).lower() for word in ("password", "auth", "wrongpass"))


def advice_on(error: Exception) -> str:
    """What to do about a broker or backend that cannot be used."""
    if is_refusal(error):
        return "check user and password"
    if any(word in str(error).lower() for word in ("ssl", "certificate")):
        files = "ssl_ca_certs in the URL, broker_use_ssl"
        return f"check the authority's file ({files}), the host's name, and that TLS is spoken there"
    return "is it running? --standalone starts a Redis"


def ping_broker(app: Any) -> None:
    """Reach the broker; raises whatever its client raises."""
    with app.connection_for_read() as connection:
        connection.connect()
        client = getattr(connection.default_channel, "client", None)
        if client is not None and hasattr(client, "ping"):
            client.ping()


def ping_backend(app: Any) -> None:
    """Reach a result backend that can be asked; raises whatever its client raises."""
    client = getattr(app.backend, "client", None)
    if client is not None and hasattr(client, "ping"):
        client.ping()


def _hand_over(line: CommandLine) -> None:
    """Become `celery ... worker`."""
    script = shutil.which("celery", path=str(Path(sys.executable).parent)) or shutil.which("celery") or "celery"
    options: list[str] = []
    for name, value in line.globals.items():
        options += [name] if value is None else [name, value]
    if line.value("-A", "--app") is None:
        options += ["-A", os.environ["CELERY_APP"]]
    options = [word for pair in _without_workdir(options) for word in pair]
    sys.argv = [script, *options, "worker", "--pool", "custom", *line.worker]
    _celery()


def _without_workdir(options: list[str]) -> list[list[str]]:
    """Celery's options in pairs, --workdir made absolute: SIGHUP repeats the command in the folder it names."""
    pairs, left = [], list(options)
    while left:
        word = left.pop(0)
        if word in _GLOBAL_FLAGS:
            pairs.append([word])
        else:
            value = left.pop(0)
            pairs.append([word, str(Path.cwd()) if word == "--workdir" else value])
    return pairs


def _help() -> None:
    from bridge.settings import Settings

    print(USAGE)
    for name, field in Settings.model_fields.items():
        print(f"  BRIDGE_{name.upper():<20} {field.description} [{field.default}]")
    print("\nOptions of `celery worker`:\n", flush=True)
    sys.argv = ["celery", "worker", "--help"]
    _celery()


def _celery() -> None:
    """Celery's command, under its own name: click would make one of this package's, which is no command."""
    from celery.bin.celery import celery

    celery(auto_envvar_prefix="CELERY", prog_name="celery")
