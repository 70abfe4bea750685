"""``python -m bridge.dead``: look at poisoned tasks, send them again, or forget them."""

import argparse
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from redis.exceptions import RedisError

from bridge.dead.replay import NotReplayed, payload_of, replay
from bridge.driver.dead_letters import DeadLetters, Letter
from bridge.driver.ledger import bounds_of, dead_letters
from bridge.errors import BrokerUnreachable, ConfigurationInvalid, StartupError
from bridge.errors import as_text as one_line
from bridge.settings import settings
from bridge.worker.command import CommandLine, load_app

#: Exit codes: all done; something was not; no such dead letter, or several. Errors at start have their own.
EXIT_DONE, EXIT_FAILED, EXIT_UNKNOWN = 0, 1, 3
#: In a table a cell is at most this wide.
WIDEST = 48

DESCRIPTION = """\
A GPU task that was running each time its executor died ends as TaskPoisoned, after BRIDGE_MAX_CRASHES deaths.
Its message is kept in Redis (the result backend's, else the broker's) as a dead letter: see why it died, send it
again once the fault is gone, or drop it."""

EPILOG = """\
examples:
  python -m bridge.dead -A shop.celery:app list
  python -m bridge.dead -A shop.celery:app show 4f1c            the beginning of an id is enough
  python -m bridge.dead -A shop.celery:app replay 4f1c 9a02
  python -m bridge.dead -A shop.celery:app drop --all

BRIDGE_NAMESPACE must be what the workers have. Arguments and headers are payload and may be secret: only
`show --payload` prints them.

exit codes: 0 done; 1 something was not done; 2 wrong usage; 3 no such dead letter, or an id that names several;
64-66 settings, app or Redis, as of `python -m bridge.worker`"""


class Unknown(Exception):
    """An id that names no dead letter, or several."""


def main(words: list[str]) -> int:
    """Run one command; the exit code."""
    options = arguments(words)
    try:
        app = load_app(CommandLine(False, _globals(options), []))
        letters = _letters(app)
        command: Callable[..., int] = COMMANDS[options.command]
        return command(app, letters, options)
    except StartupError as error:
        code, text = error.exit_code, str(error)
    except Unknown as error:
        code, text = EXIT_UNKNOWN, str(error)
    except RedisError as error:
        code, text = BrokerUnreachable.exit_code, f"Redis does not answer: {one_line(error, 160)}"
    print(_plain(f"bridge.dead: {' '.join(text.split())}"), file=sys.stderr)
    return code


def arguments(words: list[str]) -> argparse.Namespace:
    """A command line taken apart; ends the process with 2 if it means nothing."""
    top = parser()
    options = top.parse_args(words)
    if options.command in ("replay", "drop") and bool(options.ids) == options.all:
        top.error(f"{options.command} needs ids or --all, one of the two; `list` shows what there is")
    return options


def parser() -> argparse.ArgumentParser:
    """The command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-A", "--app", default=argparse.SUPPRESS, metavar="MODULE:APP", help="the Celery app")
    common.add_argument("-b", "--broker", default=argparse.SUPPRESS, metavar="URL", help="instead of the app's own")
    common.add_argument("--result-backend", default=argparse.SUPPRESS, metavar="URL", help="instead of the app's own")
    common.add_argument("--workdir", default=argparse.SUPPRESS, metavar="FOLDER", help="go there first")
    common.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    top = argparse.ArgumentParser(
        "python -m bridge.dead", description=DESCRIPTION, epilog=EPILOG, parents=[common],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", parents=[common], help="one line for each, the oldest first; no payloads")
    show = commands.add_parser("show", parents=[common], help="all about some of them")
    show.add_argument("ids", nargs="+", metavar="ID", help="a task id, or the beginning of one")
    show.add_argument("--payload", action="store_true", help="arguments and headers, too; they may be secret")
    again = commands.add_parser(
        "replay", parents=[common],
        help="send the message again, same id, same queue; the letter goes when the broker has taken it",
    )  # fmt: skip
    again.add_argument("--ignore-expiry", action="store_true", help="send what has expired, without its `expires`")
    drop = commands.add_parser("drop", parents=[common], help="forget them, and their crashes")
    for each in (again, drop):
        each.add_argument("ids", nargs="*", metavar="ID", help="a task id, or the beginning of one")
        each.add_argument("--all", action="store_true", help="all there are")
    return top


def _globals(options: argparse.Namespace) -> dict[str, str | None]:
    names = {"app": "-A", "broker": "-b", "result_backend": "--result-backend", "workdir": "--workdir"}
    return {option: getattr(options, name) for name, option in names.items() if hasattr(options, name)}


def _letters(app: Any) -> DeadLetters:
    s = settings()
    try:
        letters = dead_letters(app, bounds_of(s), s.namespace_of(app))
    except Exception as error:
        raise BrokerUnreachable(f"Redis does not answer: {one_line(error, 160)}; is it running?") from error
    if letters is None:
        raise ConfigurationInvalid(
            "this app has Redis neither as result backend nor as broker, and dead letters are kept in Redis only"
        )
    return letters


# ---- commands


def _list(app: Any, letters: DeadLetters, options: argparse.Namespace) -> int:
    found = letters.letters()
    if hasattr(options, "json"):
        print(json.dumps([facts(letter) for letter in found], indent=2))
    elif not found:
        print(f"no dead letters in namespace {settings().namespace_of(app)}")
    else:
        head = ("ID", "TASK", "QUEUE", "DIED", "CRASHES", "LAST", "BYTES")
        print(table([head, *(_row(letter) for letter in found)]))
    return EXIT_DONE


def _show(app: Any, letters: DeadLetters, options: argparse.Namespace) -> int:
    found = [letter for task_id in chosen(letters, options) if (letter := letters.get(task_id)) is not None]
    shown = [facts(letter, details=True) | (payload_of(letter) if options.payload else {}) for letter in found]
    if hasattr(options, "json"):
        print(json.dumps(shown, indent=2, default=str))
    else:
        print("\n\n".join(as_text(each) for each in shown))
        if not options.payload:
            print("\narguments and headers are not shown; --payload shows them")
    return EXIT_DONE


def _replay(app: Any, letters: DeadLetters, options: argparse.Namespace) -> int:
    def send(task_id: str) -> str:
        letter = replay(app, letters, task_id, options.ignore_expiry)
        return f"sent to {place(letter)}"

    return _each(letters, options, send)


def _drop(app: Any, letters: DeadLetters, options: argparse.Namespace) -> int:
    def drop(task_id: str) -> str:
        letters.drop(task_id)
        return "dropped"

    return _each(letters, options, drop)


def _each(letters: DeadLetters, options: argparse.Namespace, do: Callable[[str], str]) -> int:
    """Do it to each that is chosen; one that fails does not keep the others."""
    results = []
    for task_id in chosen(letters, options):
        try:
            results.append({"id": task_id, "done": True, "what": do(task_id)})
        except NotReplayed as error:
            results.append({"id": task_id, "done": False, "what": str(error)})
    if hasattr(options, "json"):
        print(json.dumps(results, indent=2))
    else:
        for each in results:
            print(_plain(f"{each['id']}: {each['what']}"), file=sys.stdout if each["done"] else sys.stderr)
        if not results:
            print("no dead letters")
    return EXIT_DONE if all(each["done"] for each in results) else EXIT_FAILED


COMMANDS: dict[str, Callable[[Any, DeadLetters, argparse.Namespace], int]] = {
    "list": _list,
    "show": _show,
    "replay": _replay,
    "drop": _drop,
}


def chosen(letters: DeadLetters, options: argparse.Namespace) -> list[str]:
    """The ids a command is about, each once.

    Raises:
        Unknown: an id that names none, or several; nothing is done then.
    """
    known = letters.ids()
    if getattr(options, "all", False):
        return known
    return list(dict.fromkeys(_one(known, wanted) for wanted in options.ids))


def _one(known: list[str], wanted: str) -> str:
    if wanted in known:
        return wanted
    found = [task_id for task_id in known if wanted and task_id.startswith(wanted)]
    if len(found) == 1:
        return found[0]
    if found:
        raise Unknown(f"{wanted} is the beginning of {len(found)} ids: {', '.join(found[:5])}; write more of it")
    raise Unknown(f"no dead letter of {wanted}: replayed, dropped, expired, or of another namespace; see `list`")


# ---- words


def facts(letter: Letter, details: bool = False) -> dict[str, Any]:
    """What may be said of a letter without saying anything of its payload."""
    short = {
        "id": letter.id,
        "task": letter.task,
        "queue": place(letter),
        "died": moment(letter.at),
        "crashes": len(letter.crashes),
        "last": letter.crashes[-1].how if letter.crashes else "",
        "size_bytes": letter.size_bytes,
        "can_be_replayed": letter.has_body,
    }
    if not details:
        return short
    kept = ("root_id", "parent_id", "retries", "eta", "expires", "origin")
    return short | {
        "reason": letter.reason,
        "not_kept": letter.not_kept,
        "content_type": letter.content_type,
        "content_encoding": letter.content_encoding,
        **{name: letter.headers.get(name) for name in kept},
        "deaths": [
            {"at": moment(each.at), "how": each.how, "worker": each.worker, "actor": each.slot, "node": each.node}
            for each in letter.crashes
        ],
        "logs": letter.logs,
    }


def place(letter: Letter) -> str:
    """The queue, or exchange and routing key."""
    return f"{letter.exchange}/{letter.routing_key}" if letter.exchange else letter.routing_key


def moment(at: float) -> str:
    """A time as `time.time`, in UTC."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _row(letter: Letter) -> tuple[str, ...]:
    said = facts(letter)
    size = str(letter.size_bytes) if letter.has_body else "not kept"
    return said["id"], said["task"], said["queue"], said["died"], str(said["crashes"]), said["last"], size


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows in columns; the first, an id, is never cut."""
    cut = [(_plain(row[0]), *(_cut(_plain(cell)) for cell in row[1:])) for row in rows]
    widths = [max(len(row[column]) for row in cut) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cut
    )


def _cut(cell: str) -> str:
    return cell if len(cell) <= WIDEST else cell[: WIDEST - 1] + "…"


def as_text(shown: dict[str, Any]) -> str:
    """All that is shown of a letter, a line or more for each fact."""
    lines = []
    for name, value in shown.items():
        if value is None or value == "":
            continue
        if name == "deaths":
            lines.append("deaths:")
            lines += [f"  {d['at']}  {d['how']}  actor {d['actor']} on {d['node']}  {d['worker']}" for d in value]
        elif isinstance(value, str) and "\n" in value:
            lines += [f"{name}:", *(f"  {line}" for line in value.splitlines())]
        else:
            lines.append(f"{name}: {value}")
    return _plain("\n".join(lines))


def _plain(text: str) -> str:
    """What a message brings along must not command the terminal."""
    return "".join(each if each.isprintable() or each == "\n" else "\N{REPLACEMENT CHARACTER}" for each in text)
