"""The driver while its ledger asks Redis: whatever happens to the task meanwhile, it is answered once."""

import pickle
import signal

import pytest

from actors.contract import Failed, FailureKind, LogLine, Pending, Reply
from bridge import link
from bridge.driver.dead_letters import Crash
from bridge.driver.ledger import Answered
from bridge.driver.news import Replied, SlotChanged
from bridge.settings import settings
from tests.integration.test_driver import Lab, succeeded

BEFORE = {"earlier.1.0": Crash(1.0, "signal 9 (SIGKILL)", "other@here", 0, "there")}


class SaidLedger:
    """Keeps what the driver asks until the test answers."""

    is_shared = True

    def __init__(self, driver):
        self.driver, self.asked, self.letters, self.forgotten = driver, [], [], []

    def add(self, task_id, crashes, then):
        self.asked.append((crashes, then))

    def look(self, task_id, then):
        self.asked.append((None, then))

    def forget(self, task_id):
        self.forgotten.append(task_id)

    def bury(self, letter, then):
        self.letters.append(letter)
        self.asked.append((None, then))

    def answer(self, lab, value):
        lab.event(Answered(self.asked.pop(0)[1], value))


@pytest.fixture
def late(monkeypatch):
    """A lab whose task is acknowledged late, with an actor."""
    monkeypatch.setenv("BRIDGE_CALL_GAP_S", "0")  # calls leave without a Tick
    settings.cache_clear()
    lab = Lab(monkeypatch)
    lab.app.tasks["lab.echo"].acks_late = True
    lab.driver._blame.ledger = lab.ledger = SaidLedger(lab.driver)
    lab.ready()
    yield lab
    settings.cache_clear()


def take(lab, value, **delivery_info):
    lab.serial += 1
    request = {
        "id": f"id{lab.serial}",
        "task": "lab.echo",
        "delivery_info": delivery_info,
        "argsrepr": "",
        "kwargsrepr": "",
    }
    body = ((value,), {}, {})
    run = link.Run(lab.serial, "lab.echo", request["id"], request, body, None, None, None, None, 0)
    lab.driver._take(run)
    lab.driver._turn()
    return lab.serial


def crash(lab):
    call = lab.fleet.calls.pop()
    failed = Failed(call.tasks[0].token, FailureKind.CRASHED, "CRASHED", "signal 11 (SIGSEGV)")
    lab.event(Replied(call.id, Reply((failed,), 0.0), ""))


def heard(lab):
    lab.driver._flush()
    return [m for m in lab.link.receive() if isinstance(m, link.Done | link.Ended | link.Flushed)]


def error_of(done):
    failed, info, _ = done.result
    assert failed
    return info.exception.exc if hasattr(info.exception, "exc") else info.exception


def test_without_an_answer_the_driver_counts_alone(late):
    take(late, 1)
    crash(late)
    assert not late.fleet.calls, "it runs again when it is known whether it may"
    late.ledger.answer(late, None)
    crash(late)
    assert len(late.ledger.asked[0][0]) == 2, "both crashes are told, whatever became of the first telling"
    late.ledger.answer(late, None)
    assert [each.id for each in late.ledger.letters] == ["id1"] and not heard(late), "the letter goes first"
    late.ledger.answer(late, None)
    (done,) = heard(late)
    assert error_of(done).args == ("lab.echo", 2, "signal 11 (SIGSEGV)")


def test_crashes_in_other_drivers_count(late):
    take(late, 1)
    crash(late)
    ((crashes, _),) = late.ledger.asked
    late.ledger.answer(late, {**BEFORE, **crashes})
    late.ledger.answer(late, None)
    assert error_of(heard(late)[0]).crashes == 2
    (letter,) = late.ledger.letters
    assert [each.worker for each in letter.crashes] == ["other@here", ""]


def test_a_redelivered_task_that_has_had_its_crashes_does_not_run(late):
    take(late, 1, redelivered=True)
    assert not late.fleet.calls
    late.ledger.answer(late, {**BEFORE, "earlier.1.1": BEFORE["earlier.1.0"]})
    late.ledger.answer(late, None)
    assert error_of(heard(late)[0]).crashes == 2 and not late.fleet.calls


def test_a_redelivered_task_with_a_crash_runs_alone_and_those_without_share(late):
    take(late, "first")
    first = late.fleet.calls.pop()
    late.event(Replied(first.id, Reply((succeeded(first.tasks[0], 0),), 0.0), ""))
    late.event(SlotChanged(0, None, "away"))
    clean, crashed, unknown = (take(late, number, redelivered=True) for number in range(3))
    for crashes in ({}, BEFORE, None):
        late.ledger.answer(late, crashes)
    late.ready()
    shared = [sorted(task.token for task in call.tasks) for call in late.fleet.calls]
    assert sorted(shared) == [[f"{clean}.0", f"{unknown}.0"], [f"{crashed}.0"]]


def test_a_task_that_has_crashed_runs_again_alone(late):
    take(late, "first")
    first = late.fleet.calls.pop()
    late.event(Replied(first.id, Reply((succeeded(first.tasks[0], 0),), 0.0), ""))
    crashed = take(late, 1)
    crash(late)
    late.event(SlotChanged(0, None, "away"))
    late.ledger.answer(late, None)
    others = [take(late, number) for number in range(2)]
    late.ready()
    shared = sorted(sorted(task.token for task in call.tasks) for call in late.fleet.calls)
    assert shared == [[f"{crashed}.1"], [f"{other}.0" for other in others]]


def test_a_task_that_is_not_delivered_again_asks_nothing_and_neither_does_an_early_one(late):
    take(late, 1)
    late.app.tasks["lab.echo"].acks_late = False
    take(late, 2, redelivered=True)
    crash(late)
    assert late.ledger.asked == [] and type(heard(late)[0]).__name__ == "Ended"


@pytest.mark.parametrize("outcome", ["value", "error"])
def test_a_body_that_ends_by_itself_clears_the_count(late, outcome):
    take(late, 1)
    crash(late)
    late.ledger.answer(late, None)
    (call,) = late.fleet.calls
    token = call.tasks[0].token
    ended = succeeded(call.tasks[0], 1) if outcome == "value" else Failed(token, FailureKind.RAISED, "E", "e")
    late.event(Replied(call.id, Reply((ended,), 0.0), ""))
    assert late.ledger.forgotten == ["id1"] and len(heard(late)) == 1


def cancel(lab, serial):
    lab.link.send(link.Cancel(serial, signal.SIGTERM))
    lab.link.flush()
    lab.driver._read_link()
    lab.driver._turn()


@pytest.mark.parametrize("at", ["look", "crash", "letter"])
def test_a_task_that_is_given_up_while_redis_is_asked(late, at):
    serial = take(late, 1, redelivered=at == "look")
    if at != "look":
        crash(late)
    if at == "letter":
        late.ledger.answer(late, BEFORE)
    cancel(late, serial)
    assert heard(late) == []
    late.ledger.answer(late, BEFORE)
    (ended,) = heard(late)
    assert "Terminated" in repr(ended.einfo.exception) and not late.fleet.calls


def test_a_task_that_is_given_back_while_redis_is_asked(late):
    take(late, 1, redelivered=True)
    late.link.send(link.Flush())
    late.link.flush()
    late.driver._read_link()
    late.driver._turn()
    assert [type(each).__name__ for each in heard(late)] == ["Flushed"]
    late.ledger.answer(late, {})
    assert heard(late) == [] and not late.fleet.calls


def test_the_letter_has_the_bodys_last_words(late):
    take(late, 1)
    call = late.fleet.calls[-1]
    words = pickle.dumps([LogLine(20, "shop", "about to divide by zero", False)])
    late.event(Replied(call.id, Reply((Pending(call.tasks[0].token, True, (words,)),), 0.0), ""))
    crash(late)
    late.ledger.answer(late, BEFORE)
    (letter,) = late.ledger.letters
    assert letter.logs == "about to divide by zero"
