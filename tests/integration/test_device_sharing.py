"""What tasks share on a device, with real executor processes: residents, memory, streams. The memory is a logical one.

NumPy stands for CuPy here; tests/gpu has what only a GPU can show.
"""

import os
import pickle
from pathlib import Path

import pytest

from actors.contract import ActorState, FailureKind
from tests.integration import test_executor as executors
from tests.integration.test_executor import exception, exists, kinds, open_gate, value
from tests.support.services import wait_for

APP = """
import ctypes, logging, os, time
import numpy
from celery import Celery
from actors.executor import residents
from bridge import Gpu, batched, resident

app = Celery("sharing", broker="memory://")
KIB = 1024
loads = []


def note(path, text="x"):
    with open(path, "a") as file:
        file.write(f"{text}\\n")


def until(path):
    deadline = time.monotonic() + 60
    while not os.path.exists(path) and time.monotonic() < deadline:
        time.sleep(0.002)


@resident
def always():
    return numpy.zeros(10 * KIB, "uint8")

@resident
def model(name, kib=20):
    loads.append(name)
    return numpy.zeros(kib * KIB, "uint8")

@resident
def slow(path):
    note(path, "loading")
    until(path + ".gate")
    return "loaded"

@app.task(name="s.pid", gpu=True)
def pid(): return os.getpid()

@app.task(name="s.use", gpu=True)
def use(*names):
    return [model(name).nbytes for name in names] and list(loads)

@app.task(name="s.use_always", gpu=True)
def use_always(): return always().nbytes

@app.task(name="s.use_or_not", gpu=True)
def use_or_not(name=None):
    if name:
        model(name)

@app.task(name="s.use_slow", gpu=True)
def use_slow(path): return slow(path)

@app.task(name="s.example", gpu=Gpu(example=("from-example",)))
def example(name): return model(name).nbytes

@app.task(name="s.large", gpu=Gpu(memory="90KiB"))
def large(path): note(path)

@app.task(name="s.too_large", gpu=Gpu(memory="2MiB"))
def too_large(path): note(path)

@app.task(name="s.too_large_batch", gpu=Gpu(memory="2MiB"))
@batched(max_size=4)
def too_large_batch(paths: list[str]) -> list[int]:
    note(paths[0])

@app.task(name="s.own", gpu=Gpu(memory="50KiB"))
def own(*names):
    for name in names:
        model(name)
    return sorted(residents.shared.sizes())

@app.task(name="s.out_of_memory", gpu=True, acks_late=True)
def out_of_memory(path, keep):
    model(keep)
    note(path, " ".join(sorted(residents.shared.sizes())))
    if len(residents.shared.sizes()) > 1:
        raise MemoryError("no room")
    return "fits"

@app.task(name="s.out_of_memory_batch", gpu=True)
@batched(max_size=4)
def out_of_memory_batch(numbers: list[int]) -> list[int]:
    if len(residents.shared.sizes()) > 0:
        raise MemoryError("no room")
    return numbers

def act(path, what="", gate=""):
    note(path, what)
    if what == "segfault":
        ctypes.string_at(0)
    if what == "raise":
        raise KeyError("missing")
    if what == "exit":
        raise SystemExit(3)
    if what == "hold":
        until(gate)
    if what == "sleep":
        time.sleep(60)
    if what == "memory once" and open(path).read().count("memory once") == 1:
        raise MemoryError("no room")
    return what

@app.task(name="s.act", gpu=Gpu(streams=4), acks_late=True)
def on_stream(path, what="", gate=""): return act(path, what, gate)

@app.task(name="s.act_alone", gpu=True)
def alone(path, what="", gate=""): return act(path, what, gate)

@app.task(name="s.act_30", gpu=Gpu(streams=4, memory="30KiB"))
def of_30(path, what="", gate=""): return act(path, what, gate)

@app.task(name="s.says", bind=True, gpu=Gpu(streams=4))
def says(self, text):
    logging.getLogger("said").warning(text)
    self.update_state(state="PROGRESS", meta={"text": text})
    if text == "retry":
        raise self.retry(countdown=3)
    return [self.request.id, text]

@app.task(name="s.squares", gpu=True)
@batched(max_size=8)
def squares(numbers: list[int]) -> list[int]:
    return [number * number for number in numbers]

@app.task(name="s.batch_sizes", gpu=Gpu(streams=4))
@batched(max_size=8)
def batch_sizes(numbers: list[int]) -> list[int]:
    return [len(numbers)] * len(numbers)
"""

TASKS = [
    f"s.{name}"
    for name in (
        "pid", "use", "use_always", "use_or_not", "use_slow", "example", "large", "too_large", "too_large_batch",
        "own", "out_of_memory", "out_of_memory_batch", "act", "act_alone", "act_30", "says", "squares", "batch_sizes",
    )
]  # fmt: skip


def task(name, *args, **options):
    return executors.task(f"s.{name}", *args, **options)


class Driver(executors.Driver):
    def value(self, name, *args):
        return self.values(task(name, *args))[0]


def sizes(residents):
    """Without the module's name, in KiB."""
    return {name.removeprefix("sharing."): size / 1024 for name, size in residents.items()}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharing")
    (folder / "sharing.py").write_text(APP)
    return executors.make_config(
        folder, "sharing", module="sharing", tasks=TASKS, memory_limit="100KiB", resident_limit="60%"
    )


@pytest.fixture
def driver(config):
    """An actor of its own: what is on the device is what the test is about."""
    driver = Driver().hello(config)
    yield driver
    driver.end()


@pytest.fixture(scope="module")
def shared_driver(config):
    driver = Driver().hello(config)
    yield driver
    driver.end()


@pytest.fixture
def streams(shared_driver):
    """One actor for the tests that do not mind what is on its device."""
    wait_for(lambda: shared_driver.health.state is ActorState.READY, "the executor")
    return shared_driver


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "notes")


@pytest.fixture
def gate(tmp_path):
    return str(tmp_path / "gate")


def lines(path):
    return Path(path).read_text().split("\n")[:-1] if Path(path).exists() else []


# ---- residents


def test_health_tells_what_is_on_the_device_from_the_start(driver):
    health = driver.health
    assert sizes(health.residents) == {"always": 10, "model('from-example', 20)": 20}
    assert health.warm_for == ("s.example",)
    assert health.memory_total_bytes == health.device["memory_bytes"] == 100 << 10
    assert health.memory_used_bytes == 30 << 10
    assert health.memory_free_bytes == 70 << 10


def test_a_resident_is_loaded_once_for_all_tasks(driver):
    assert driver.values(*(task("use", "a") for _ in range(3)))[-1] == ["from-example", "a"]
    assert driver.value("example", "a") == 20 << 10
    assert driver.value("use", "a") == ["from-example", "a"]


def test_those_used_least_recently_go_when_the_budget_is_spent(driver):
    driver.values(task("use_always"), task("use", "a"), task("use_always"))
    wait_for(lambda: len(driver.health.warm_for) == 3, "news of what the tasks use")
    assert sizes(driver.health.residents) == {"always": 10, "model('from-example', 20)": 20, "model('a', 20)": 20}
    assert driver.value("use", "a", "b") == ["from-example", "a", "b"]
    wait_for(lambda: "model('b', 20)" in sizes(driver.health.residents), "news of the eviction")
    health = driver.health
    assert sizes(health.residents) == {"always": 10, "model('a', 20)": 20, "model('b', 20)": 20}
    assert set(health.warm_for) == {"s.use", "s.use_always"}, "not for the one whose resident has gone"
    assert health.memory_free_bytes == 50 << 10
    assert driver.value("use", "from-example")[-1] == "from-example", "loaded again"


def test_a_task_is_warm_by_what_its_last_run_used(driver):
    driver.value("use_or_not", "a")
    wait_for(lambda: "s.use_or_not" in driver.health.warm_for, "news")
    driver.value("use_or_not")
    wait_for(lambda: "s.use_or_not" not in driver.health.warm_for, "news")


def test_a_successor_knows_nothing_of_what_its_predecessor_had(driver, path):
    driver.value("use", "a")
    wait_for(lambda: "s.use" in driver.health.warm_for, "news")
    assert kinds(driver.outcomes(task("act_alone", path, "segfault"))) == [FailureKind.CRASHED]
    wait_for(lambda: driver.health.state is ActorState.READY, "the successor")
    assert sizes(driver.health.residents) == {"always": 10, "model('from-example', 20)": 20}
    assert driver.health.warm_for == ("s.example",)


def test_nothing_is_told_while_nothing_changes(driver, monkeypatch):
    """The actor hears of the device when there is news, not with every call."""
    heard = []
    (child,) = driver.shell._children
    note = child._note
    monkeypatch.setattr(child, "_note", lambda message: (heard.append(type(message).__name__), note(message)))
    driver.values(task("use", "a"))
    for _ in range(20):
        driver.values(task("use", "a"), task("pid"))
    assert heard.count("Done") >= 20
    assert heard.count("DeviceState") <= 1 + heard.count("Done") / 4, "a few, as time goes by"


def test_a_soft_limit_ends_a_long_load_and_the_next_use_loads_again(driver, path):
    executor = driver.executor
    (interrupted,) = driver.outcomes(task("use_slow", path, soft=0.2))
    assert interrupted.type_name.endswith("SoftTimeLimitExceeded")
    open_gate(path + ".gate")
    assert driver.value("use_slow", path) == "loaded"
    assert lines(path) == ["loading", "loading"]
    assert driver.executor == executor


def test_a_cancel_ends_a_long_load_and_its_executor_stays(driver, path):
    executor = driver.executor
    sent = driver.send(task("use_slow", path), task("pid"))
    wait_for(exists(path), "the load")
    sent.cancel(0)
    cancelled, good = sent.outcomes()
    assert cancelled.kind is FailureKind.CANCELLED
    assert value(good) == executor


# ---- memory


def test_a_body_starts_only_when_so_much_is_free(driver, path):
    driver.values(task("use", "a"))
    refused, good = driver.outcomes(task("too_large", path), task("pid"))
    assert refused.kind is FailureKind.NO_ROOM
    assert refused.message == "needs 2.0 MiB, 50.0 KiB of 100.0 KiB are free"
    assert value(good)
    assert lines(path) == []
    assert len(driver.health.residents) == 3, "nothing went for nothing"


def test_residents_make_room_for_a_body(driver, path):
    driver.values(task("use", "a"), task("use_always"))
    assert kinds(driver.outcomes(task("large", path))) == ["succeeded"]
    wait_for(lambda: sizes(driver.health.residents) == {"always": 10}, "news: 90 of 100 KiB are free")


def test_residents_that_the_task_uses_itself_stay(driver):
    """After its first run it is known what it uses: only others go for it."""
    for _ in range(3):
        held = [name.removeprefix("sharing.") for name in driver.value("own", "a", "b")]
    assert held == ["model('a', 20)", "model('b', 20)"]
    assert driver.value("use", "a", "b") == ["from-example", "a", "b"], "each loaded once"


def test_a_vectorised_body_that_has_no_room_is_refused_for_all_its_tasks(driver, path):
    outcomes = driver.outcomes(*[task("too_large_batch", path) for _ in range(4)])
    assert kinds(outcomes) == [FailureKind.NO_ROOM] * 4
    assert lines(path) == []


def test_before_a_second_try_residents_go_that_the_first_has_not_used(driver, path):
    assert driver.values(task("use", "a"), task("out_of_memory", path, "a"))[-1] == "fits"
    seen = [line.replace("sharing.", "") for line in lines(path)]
    assert seen == ["always model('a', 20) model('from-example', 20)", "model('a', 20)"]


def test_before_the_halves_of_a_batch_residents_go_too(driver):
    outcomes = driver.outcomes(*(task("out_of_memory_batch", number) for number in range(4)))
    assert [value(outcome) for outcome in outcomes] == [0, 1, 2, 3]
    assert [outcome.batch for outcome in outcomes] == [2] * 4


def test_without_a_known_memory_everything_is_admitted(config, path):
    unknown = config._replace(memory_limit="90%", release=config.release._replace(id="unknown"))
    driver = Driver().hello(unknown)
    try:
        assert kinds(driver.outcomes(task("too_large", path))) == ["succeeded"]
        assert driver.health.memory_total_bytes == 0
        assert driver.health.residents, "they are told all the same"
    finally:
        driver.end()


# ---- streams


def test_bodies_on_streams_are_launched_before_the_first_is_waited_for(streams, path, gate):
    sent = streams.send(task("act", path, "first"), task("act", path, "hold", gate), task("act", path, "third"))
    wait_for(lambda: "hold" in lines(path), "the second body")
    sent.collect()
    assert not sent.found, "the first is still in flight"
    assert sent.running == {each.token for each in sent.call.tasks[:2]}
    open_gate(gate)
    outcomes = sent.outcomes()
    assert [value(outcome) for outcome in outcomes] == ["first", "hold", "third"]
    assert lines(path) == ["first", "hold", "third"]
    assert [outcome.batch for outcome in outcomes] == [1, 1, 1]


def test_no_more_than_so_many_are_in_flight(streams, path, gate):
    sent = streams.send(*[task("act", path, str(number)) for number in range(4)], task("act", path, "hold", gate))
    wait_for(lambda: "hold" in lines(path), "the fifth body")
    sent.collect()
    assert len(sent.found) == 4
    open_gate(gate)
    assert [value(outcome) for outcome in sent.outcomes()] == ["0", "1", "2", "3", "hold"]


def test_the_times_of_bodies_on_streams_are_shares_of_the_whole(streams, path, gate):
    sent = streams.send(task("act", path, "x"), task("act", path, "hold", gate), task("act", path, "y"))
    wait_for(lambda: "hold" in lines(path), "the second body")
    open_gate(gate)
    first, second, third = sent.outcomes()
    assert first.run_s <= second.run_s <= third.run_s < 2 * first.run_s, "all have waited for the second's hold"


@pytest.mark.parametrize(("what", "kind"), [("raise", FailureKind.RAISED), ("exit", FailureKind.EXITED)])
def test_an_error_of_one_on_streams_is_its_own(streams, path, what, kind):
    executor = streams.executor
    outcomes = streams.outcomes(task("act", path, "a"), task("act", path, what), task("act", path, "b"), task("pid"))
    assert kinds(outcomes) == ["succeeded", kind, "succeeded", "succeeded"]
    assert value(outcomes[3]) == executor
    if kind is FailureKind.RAISED:
        assert isinstance(exception(outcomes[1]), KeyError)
        assert "in act" in outcomes[1].traceback and "_enter_body" not in outcomes[1].traceback


def test_a_crash_on_streams_makes_suspects_of_all_that_were_launched(streams, path):
    outcomes = streams.outcomes(task("act", path, "a"), task("act", path, "segfault"), task("act", path, "b"))
    assert kinds(outcomes) == [FailureKind.SUSPECT, FailureKind.SUSPECT, "succeeded"]
    assert lines(path) == ["a", "segfault", "b"], "the last had not been launched"


def test_a_crash_of_the_first_on_streams_is_charged_to_it_alone(streams, path):
    outcomes = streams.outcomes(task("act", path, "segfault"), task("act", path, "a"))
    assert kinds(outcomes) == [FailureKind.CRASHED, "succeeded"]


def test_one_that_is_cancelled_before_its_launch_never_runs(streams, path, gate):
    sent = streams.send(task("act", path, "hold", gate), task("act", path, "never"), task("act", path, "b"))
    wait_for(lambda: "hold" in lines(path), "the first body")
    sent.cancel(1)
    open_gate(gate)
    assert kinds(sent.outcomes()) == ["succeeded", FailureKind.CANCELLED, "succeeded"]
    assert lines(path) == ["hold", "b"]


def test_one_that_is_cancelled_after_its_launch_ends_with_the_others(streams, path, gate):
    executor = streams.executor
    sent = streams.send(task("act", path, "a"), task("act", path, "hold", gate))
    wait_for(lambda: "hold" in lines(path), "the second body")
    sent.cancel(0)
    open_gate(gate)
    assert kinds(sent.outcomes()) == ["succeeded", "succeeded"]
    assert streams.value("pid") == executor


def test_the_first_on_streams_is_cancelled_while_it_runs_alone(streams, path):
    sent = streams.send(task("act", path, "sleep"), task("act", path, "a"))
    wait_for(lambda: "sleep" in lines(path), "the first body")
    sent.cancel(0)
    assert kinds(sent.outcomes()) == [FailureKind.CANCELLED, "succeeded"]


def test_a_soft_limit_on_streams_hits_the_body_that_runs(streams, path):
    soft = {"soft": 0.3}
    outcomes = streams.outcomes(
        task("act", path, "a", **soft), task("act", path, "sleep", **soft), task("act", path, "b", **soft)
    )
    assert kinds(outcomes) == ["succeeded", FailureKind.RAISED, "succeeded"]
    assert outcomes[1].type_name.endswith("SoftTimeLimitExceeded")


def test_a_hard_limit_on_streams_ends_all_that_were_launched(streams, path):
    """They were launched before, and have not ended either."""
    hard = {"hard": 0.5}
    outcomes = streams.outcomes(
        task("act", path, "a", **hard), task("act", path, "sleep", **hard), task("act", path, "b", **hard)
    )
    assert kinds(outcomes) == [FailureKind.HARD_LIMIT, FailureKind.HARD_LIMIT, "succeeded"]
    assert lines(path) == ["a", "sleep", "b"]


def test_tasks_with_different_limits_do_not_share_streams(streams, path):
    outcomes = streams.outcomes(task("act", path, "a"), task("act", path, "segfault", hard=60.0))
    assert kinds(outcomes) == ["succeeded", FailureKind.CRASHED]


def test_different_tasks_do_not_share_streams(streams, path):
    outcomes = streams.outcomes(task("act", path, "a"), task("act_alone", path, "b"), task("act", path, "segfault"))
    assert kinds(outcomes) == ["succeeded", "succeeded", FailureKind.CRASHED]


def test_those_on_streams_must_fit_together(streams, path):
    """Twice 30 KiB, next to the 30 of residents, but not four times."""
    outcomes = streams.outcomes(*(task("act_30", path, what) for what in ("a", "b", "c", "segfault")))
    assert kinds(outcomes) == ["succeeded", "succeeded", FailureKind.SUSPECT, FailureKind.SUSPECT]


def test_a_payload_that_cannot_be_opened_parts_those_on_streams(streams, path):
    broken = task("act", path)._replace(payload=b"cnowhere\nNothing\n.")
    outcomes = streams.outcomes(task("act", path, "a"), broken, task("act", path, "b"), task("act", path, "segfault"))
    assert kinds(outcomes) == ["succeeded", FailureKind.RAISED, FailureKind.SUSPECT, FailureKind.SUSPECT]
    assert "nowhere" in outcomes[1].message


def test_out_of_memory_on_streams_is_tried_again_alone_when_the_others_are_done(streams, path):
    outcomes = streams.outcomes(task("act", path, "memory once"), task("act", path, "a"), task("act", path, "b"))
    assert [value(outcome) for outcome in outcomes] == ["memory once", "a", "b"]
    assert lines(path) == ["memory once", "a", "b", "memory once"]


def test_requests_logs_and_wishes_on_streams_stay_each_tasks_own(streams):
    sent = streams.send(*(task("says", text) for text in ("one", "retry", "three")))
    outcomes = sent.outcomes()
    tokens = [each.token for each in sent.call.tasks]
    assert kinds(outcomes) == ["succeeded", FailureKind.RETRY, "succeeded"]
    assert value(outcomes[0]) == [tokens[0], "one"] and value(outcomes[2]) == [tokens[2], "three"]
    assert [[line.text for line in outcome.logs] for outcome in outcomes] == [["one"], ["retry"], ["three"]]
    asked = [[options["meta"]["text"] for _, _, options in sent.wishes[token]] for token in tokens]
    assert asked == [["one"], ["retry"], ["three"]]
    assert [bool(outcome.wishes) for outcome in outcomes] == [False, True, False]
    ((method, *_),) = pickle.loads(outcomes[1].wishes)
    assert method == "retry"


def test_a_vectorised_body_has_no_streams(streams):
    outcomes = streams.outcomes(*(task("batch_sizes", number) for number in range(6)))
    assert [value(outcome) for outcome in outcomes] == [6] * 6


# ---- batches


def test_an_item_that_cannot_be_opened_fails_alone(streams):
    """It names a class that this node does not have; its neighbours share a run on either side of it."""
    broken = task("squares", 0)._replace(payload=b"cnowhere\nNothing\n.")
    items = [task("squares", 1), task("squares", 2), broken, task("squares", 3), task("squares", 4), task("squares", 5)]
    outcomes = streams.outcomes(*items)
    assert kinds(outcomes) == ["succeeded", "succeeded", FailureKind.RAISED, *["succeeded"] * 3]
    assert [value(outcome) for outcome in outcomes[:2] + outcomes[3:]] == [1, 4, 9, 16, 25]
    assert [outcome.batch for outcome in outcomes[:2] + outcomes[3:]] == [2, 2, 3, 3, 3]
    assert "nowhere" in outcomes[2].message


def test_items_that_cannot_be_opened_at_the_edges_fail_alone(streams):
    broken = [task("squares", 0)._replace(payload=b"x") for _ in range(3)]
    outcomes = streams.outcomes(broken[0], broken[1], task("squares", 3), broken[2])
    assert kinds(outcomes) == [FailureKind.RAISED, FailureKind.RAISED, "succeeded", FailureKind.RAISED]


def test_an_item_whose_arguments_do_not_fit_fails_alone(streams):
    outcomes = streams.outcomes(task("squares", 1), task("squares", 2, 3), task("squares", wrong=1), task("squares", 4))
    assert kinds(outcomes) == ["succeeded", FailureKind.RAISED, FailureKind.RAISED, "succeeded"]
    assert [outcomes[1].type_name, outcomes[2].type_name] == ["TypeError", "TypeError"]


def test_the_executor_is_still_the_one_that_was_started(streams):
    """All of the above has cost only the executors that were to die."""
    assert streams.value("pid") == streams.executor != os.getpid()
