"""``make fuzz SECONDS=60``: atheris looks for a text in a Redis list that harms whoever reads it. Not part of CI.

An input goes the way of a message: kombu's envelope, our look at it, Celery's decoding, the check of arguments. Each
step may refuse it in its own way. Anything else, more than 5 s or 1 GiB ends the run and leaves the input in out/fuzz:
put it into `tests/support/hostile.py`.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["bridge", "kombu", "actors"]):
    from kombu import Connection
    from kombu.utils.encoding import bytes_to_str
    from kombu.utils.json import loads

    from actors.validation import checker
    from bridge.errors import PayloadInvalid
    from bridge.worker import intake

from pydantic import BaseModel, conlist

from tests.support import hostile

LIMIT = 100_000
FOLDER = Path(__file__).resolve().parents[2] / "out" / "fuzz"
NAME = "fuzz.task"


class Point(BaseModel):
    """A model as tasks have."""

    x: float
    y: float = 0.0


def plain(a: int, b: str = "", *rest: float, c: bool = False) -> None:
    """Plain types."""


def rich(points: conlist(Point, max_length=100), table: dict[str, list[int]] | None = None) -> None:
    """Models and containers."""


CHECKS = [checker(NAME, body) for body in (plain, rich)]
CHANNEL = Connection("memory://").channel()


def one_input(raw):
    """What becomes of one text in the queue; after a B, of a body in a good envelope, which base64 would hide."""
    if raw[:1] == b"B":
        raw = hostile.envelope("q", {"task": NAME, "id": "1"}, hostile.encoded(raw[1:]))
    try:
        message = CHANNEL.message_to_python(loads(bytes_to_str(intake.without_large_body(raw, LIMIT))))
    except intake.UNREADABLE:
        return
    if intake.refusal(message, LIMIT) is not None:
        return
    try:
        args, kwargs, *_ = message.decode()
    except Exception:  # whatever a codec raises: Celery rejects the message, and `intake.guarded` the rest
        return
    if isinstance(args, list) and isinstance(kwargs, dict) and all(isinstance(key, str) for key in kwargs):
        for check in CHECKS:
            try:
                check(tuple(args), kwargs)
            except PayloadInvalid as error:
                assert len(str(error)) < 20_000, "an error that holds the payload"


def seeds(folder):
    """The messages of the tests, small ones, for the fuzzer to start from."""
    known = [*hostile.no_messages("q"), *hostile.odd_headers("q", NAME)]
    known += hostile.odd_bodies("q", NAME, str(folder / "trap"))
    known += [b'B[[1, "b"], {"c": true}, {}]', b'B[[[{"x": 1}]], {"table": {"a": [1]}}, {}]']
    known.append(b'B[[{"__type__": "decimal", "__value__": "1"}], {}, {"chord": null}]')
    for number, raw in enumerate(raw for raw in known if len(raw) < 4096):
        (folder / f"seed-{number}").write_bytes(raw if isinstance(raw, bytes) else raw.encode())


if __name__ == "__main__":
    corpus = FOLDER / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    seeds(corpus)
    intake.bound_decoding(LIMIT)
    limits = ["-timeout=5", "-rss_limit_mb=1024", "-max_len=8192", "-print_final_stats=1"]
    limits.append(f"-artifact_prefix={FOLDER}/")
    atheris.Setup([sys.argv[0], str(corpus), *limits, *sys.argv[1:]], one_input)
    atheris.Fuzz()
