"""What happened, written outside the system under test: files that are only appended to, one write for each line."""

import json
import os
import threading
import time
from pathlib import Path

import redis

FINAL = frozenset({"SUCCESS", "FAILURE", "REVOKED"})
#: Pause between two looks at all results, in seconds.
LOOK_EVERY_S = 1.5


def note(path, **said):
    """Append one line; a process that is killed leaves a whole line or none."""
    line = json.dumps({**said, "at": time.time(), "pid": os.getpid()}) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def lines(path):
    """All lines noted."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()] if Path(path).exists() else []


class Tail:
    """The lines of a ledger that have come since the last look."""

    def __init__(self, path):
        self._path, self._read = Path(path), 0

    def new(self):
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self._read += len(text)
        return [json.loads(line) for line in text.splitlines()]


class Results(threading.Thread):
    """Looks at the stored result of every task sent, again and again: `histories` is what it has seen of each."""

    def __init__(self, url, sent):
        super().__init__(name="results", daemon=True)
        self._client = redis.Redis.from_url(url, socket_timeout=5)
        self._sent = Tail(sent)  # the producer's ledger
        self._ids = {}  # id -> kind
        self.histories = {}  # id -> [(state, class of the error or try, when it was stored), ...], one per change
        self._large = set()  # not read again once final: their values are large
        self._ended = threading.Event()
        self.lock = threading.Lock()

    def run(self):
        while not self._ended.wait(LOOK_EVERY_S):
            try:
                self.look()
            except redis.RedisError:
                continue  # it is down

    def end(self):
        self._ended.set()
        self.join()

    def look(self, everything=False):
        """Read all results once."""
        with self.lock:
            ids = self._ids
            ids.update((line["id"], line["kind"]) for line in self._sent.new())
            wanted = [each for each in ids if everything or each not in self._large]
            for first in range(0, len(wanted), 500):
                some = wanted[first : first + 500]
                for task, stored in zip(some, self._client.mget([f"celery-task-meta-{i}" for i in some]), strict=True):
                    self._add(task, ids[task], stored)

    def _add(self, task, kind, stored):
        history = self.histories.setdefault(task, [])
        if stored is None:
            if history and history[-1][0] != "GONE":
                history.append(("GONE", "", ""))
            return
        meta = json.loads(stored)
        result = meta["result"]
        error = result.get("exc_type", "") if isinstance(result, dict) else ""
        if meta["status"] == "RETRY":
            error = str(result["exc_message"][0])  # how many tries there had been before
        seen = (meta["status"], error, meta.get("date_done") or "")
        if not history or history[-1][:2] != seen[:2]:
            history.append(seen)
        if kind == "large" and seen[0] in FINAL:
            self._large.add(task)

    def final(self, task):
        """Whether a task has a final state."""
        history = self.histories.get(task)
        return bool(history) and history[-1][0] in FINAL
