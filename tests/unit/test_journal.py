"""The journal between two real processes: what an executor noted is there after it was killed."""

import os
import signal
import subprocess
import sys

import pytest

from actors.journal import AREA_BYTES, MAX_TASKS, Journal, Running

ROOT = __file__.rsplit("/tests/", 1)[0]


@pytest.fixture
def journal():
    journal = Journal.create()
    yield journal
    journal.close()


@pytest.fixture
def other(journal):
    """The executor's end, over the same memory."""
    other = Journal(os.dup(journal.fd))
    yield other
    other.close()


def in_child(journal, code):
    """Run `code` in a process of its own, with `journal` open; it ends itself by SIGKILL."""
    script = f"import os, signal\nfrom actors.journal import Journal\njournal = Journal({journal.fd})\n{code}\n"
    script += "os.kill(os.getpid(), signal.SIGKILL)\n"
    done = subprocess.run([sys.executable, "-c", script], pass_fds=[journal.fd], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL


def test_a_new_journal_is_empty(journal):
    assert journal.running() is None
    assert journal.outcomes(0) == ([], 0)
    assert journal.taken() == 0
    assert not any(journal.is_cancelled(index) for index in (0, 1, MAX_TASKS - 1))


def test_what_ran_and_what_had_finished_is_known_after_a_kill(journal):
    in_child(
        journal,
        "journal.begin(0, 1, 111)\njournal.end()\njournal.append(b'first')\n"
        "journal.begin(1, 3, 222)\njournal.end()\njournal.append(b'second' * 1000)\n"
        "journal.begin(4, 2, 333)",
    )
    assert journal.running() == Running(3, 4, 2, 333)
    found, offset = journal.outcomes(0)
    assert found == [b"first", b"second" * 1000]
    assert journal.outcomes(offset) == ([], offset)


def test_between_bodies_nobody_runs(journal):
    in_child(journal, "journal.begin(0, 1, 111)\njournal.end()")
    assert journal.running() is None


def test_outcomes_are_read_once_each_while_they_come(journal, other):
    offset, read = 0, []
    for number in range(100):
        assert other.append(str(number).encode())
        if number % 7 == 0:
            found, offset = journal.outcomes(offset)
            read += found
    found, offset = journal.outcomes(offset)
    assert [int(each) for each in read + found] == list(range(100))


def test_an_outcome_without_room_is_refused_and_spoils_nothing(journal, other):
    big = b"x" * (AREA_BYTES // 2)
    assert other.append(big)
    assert not other.append(big)
    assert not other.append(b"y" * (AREA_BYTES + 1))
    assert other.append(b"small")
    assert journal.outcomes(0)[0] == [big, b"small"]


def test_the_area_is_used_to_its_last_byte(journal, other):
    assert other.append(b"x" * (AREA_BYTES - 4))
    assert not other.append(b"")
    assert len(journal.outcomes(0)[0][0]) == AREA_BYTES - 4


def test_an_empty_outcome_is_an_outcome(journal, other):
    assert other.append(b"")
    assert journal.outcomes(0) == ([b""], 4)


def test_a_new_call_forgets_outcomes_and_cancellations(journal, other):
    other.append(b"old")
    journal.cancel(0), journal.cancel(MAX_TASKS - 1)
    assert other.is_cancelled(0) and other.is_cancelled(MAX_TASKS - 1)
    journal.start_call()
    assert journal.outcomes(0) == ([], 0)
    assert not other.is_cancelled(0) and not other.is_cancelled(MAX_TASKS - 1)


def test_a_flag_of_the_last_task_does_not_touch_the_outcomes(journal, other):
    other.append(b"outcome")
    journal.cancel(MAX_TASKS - 1)
    assert journal.outcomes(0)[0] == [b"outcome"]


def test_serials_only_grow(journal, other):
    serials = [other.begin(0, 1, 1) for _ in range(5)]
    assert serials == [1, 2, 3, 4, 5]
    journal.start_call()
    assert other.begin(0, 1, 1) == 6


def test_an_interrupt_names_its_body_and_is_taken_once(journal, other):
    serial = other.begin(0, 1, 1)
    journal.want(serial, 2)
    assert other.wanted() == (serial, 2)
    assert journal.taken() == 0
    other.take(serial)
    assert journal.taken() == serial


def test_a_journal_leaves_no_descriptor_behind():
    import psutil

    process = psutil.Process()
    before = process.num_fds()
    for _ in range(20):
        Journal.create().close()
    assert process.num_fds() == before
