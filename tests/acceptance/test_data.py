"""Arrays in lists, envelopes and by reference: what reaches the body, what comes back, and what is left behind."""

import asyncio
import json
import socket
import subprocess
import sys
import threading

import numpy
import pytest
from billiard.exceptions import TimeLimitExceeded
from celery import chord
from celery.exceptions import TaskRevokedError
from celery.result import ResultSet
from kombu import Connection
from kombu.exceptions import EncodeError

from bridge import data, errors
from bridge.data import Inline
from tests.apps.data import QUEUE
from tests.apps.data import app as data_app
from tests.support.services import ROOT, Worker, inspected, wait_for

GET = {"timeout": 60}
NAME = f"data@{socket.gethostname()}"


@pytest.fixture(scope="module")
def worker(environment, tmp_path_factory):
    with pytest.MonkeyPatch.context():
        process = Worker(
            tmp_path_factory.mktemp("data"), "-c", "1", "-n", "data@%h", "-Q", QUEUE, app="tests.apps.data:app",
            env=environment,
        )  # fmt: skip
        yield process
        assert process.stop() == 0, process.output[-5000:]


@pytest.fixture(scope="module")
def app(redis_server, worker):
    data_app.conf.update(broker_url=redis_server.url, result_backend=redis_server.url)
    data_app.set_current()
    yield data_app
    data_app.backend.result_consumer.stop()
    data_app.close()


@pytest.fixture
def send(app):
    return lambda name, *args, **kwargs: app.tasks[f"tests.apps.data.{name}"].apply_async(args, kwargs)


def keys(redis_server):
    return redis_server.client.keys("*bridge-data-*")


def new_keys(redis_server, before):
    """Of what was there before some may go meanwhile: what earlier tests have put for one task, or for a short time."""
    return set(keys(redis_server)) - set(before)


ARRAY = numpy.arange(6.0)


@pytest.mark.parametrize(
    "value",
    [
        ARRAY.tolist(),
        ARRAY.astype(int).tolist(),
        ARRAY,
        ARRAY.astype(">f8"),
        ARRAY.astype("float32"),
        Inline.of(ARRAY).model_dump(),
        ARRAY[::2].repeat(2)[::-1],
    ],
    ids=["list", "integers", "numpy", "big endian", "narrower", "envelope", "strided"],
)
def test_each_form_is_the_same_array_in_the_body(send, value):
    expected = float(value.sum()) if isinstance(value, numpy.ndarray) else 15.0
    assert send("total", value).get(**GET) == expected
    assert send("totals", value).get(**GET) == expected


def test_a_reference_is_read_by_the_executor(send, redis_server):
    array = numpy.random.default_rng(1).standard_normal((700, 1000))  # six keys
    ref = data.put(array)
    assert len(keys(redis_server)) == 6 and redis_server.client.ttl(keys(redis_server)[0]) > 3000
    assert send("total", ref).get(**GET) == pytest.approx(array.sum())
    assert send("total", json.loads(ref.model_dump_json())).get(**GET) == pytest.approx(array.sum())
    assert send("seen", ref).get(**GET)[:3] == ["numpy", "<f8", [700, 1000]]
    assert (data.get(ref) == array).all()
    data.delete(ref)
    assert keys(redis_server) == []


def test_a_model_may_hold_arrays(send):
    signal = {"samples": [1.0, 2.0, 3.0], "rate_hz": 2.0}
    assert send("duration", signal).get(**GET) == ["<f4", 1.5]
    signal["samples"] = data.put(numpy.ones(5, "f4"))
    assert send("duration", signal).get(**GET) == ["<f4", 2.5]


def test_an_array_given_to_delay_travels_inside_when_small_and_by_reference_when_large(send, redis_server):
    before = keys(redis_server)
    small, large = numpy.ones(100), numpy.ones(100_000)
    assert send("total", small).get(**GET) == 100 and new_keys(redis_server, before) == set()
    assert send("total", large).get(**GET) == 100_000 and len(new_keys(redis_server, before)) == 1


def test_results_by_reference_are_arrays_for_who_imports_data_and_small_for_all_others(send, redis_server):
    large = numpy.arange(300_000.0)
    result = send("doubled", large)
    assert (result.get(**GET) == 2 * large).all()
    stored = redis_server.client.get(f"celery-task-meta-{result.id}")
    assert len(stored) < 1000 and json.loads(stored)["result"]["__value__"]["kind"] == "ref"
    found = send("parts", large).get(**GET)
    assert found["mean"] == large.mean() and found["low"].tolist() == [0, 1] and (found["all"][0] == large).all()


def test_a_cpu_task_gets_the_value(app, send):
    """Also in a chain after a result by reference."""
    s = {name: app.tasks[f"tests.apps.data.{name}"].s for name in ("doubled", "on_cpu", "total")}
    values = numpy.arange(50_000.0)
    assert (s["doubled"](values) | s["on_cpu"]()).apply_async().get(**GET) == ["ndarray", 2 * values.sum()]
    assert send("on_cpu", data.put(values)).get(**GET) == ["ndarray", values.sum()]
    assert send("on_cpu", values=data.put(values)).get(**GET) == ["ndarray", values.sum()]
    assert send("on_cpu", [1.0]).get(**GET) == ["list", 1]
    chained = (s["doubled"](values) | s["doubled"]() | s["total"]()).apply_async()
    assert chained.get(**GET) == 4 * values.sum()


@pytest.mark.parametrize("count", [5, 50_000], ids=["inside", "by reference"])
def test_cpu_and_gpu_tasks_hand_arrays_to_each_other(app, count):
    """In the middle of a chain, and in a chord whose header is of both; the last of them to end collects the arrays."""
    names = "doubled halved_on_cpu total sums sums_on_cpu"
    s = {name: app.tasks[f"tests.apps.data.{name}"].s for name in names.split()}
    values = numpy.arange(float(count))
    total = values.sum()
    assert (s["doubled"](values) | s["halved_on_cpu"]() | s["total"]()).apply_async().get(**GET) == total
    header = [s["doubled"](values), s["halved_on_cpu"](values)] * 2
    assert chord(header)(s["sums"]()).get(**GET) == [2 * total, total / 2] * 2
    assert chord(header)(s["sums_on_cpu"]()).get(**GET) == [["ndarray", 2 * total], ["ndarray", total / 2]] * 2


def test_what_is_no_array_of_numbers_is_refused_where_it_is_sent_or_a_list(send):
    with pytest.raises(EncodeError, match="not of <U1; send a list"):
        send("names_on_cpu").get(**GET)
    found = send("names", ARRAY).get(**GET)
    assert found["names"] == ["a", "b"] and found["values"].tolist() == ARRAY.tolist()


def test_a_broken_form_in_kombus_envelope_is_told_its_sender(app, redis_server):
    """As another language may write it: the message is not dropped."""
    form = {"__type__": "bridge.array", "__value__": {"kind": "ref"}}
    body = json.dumps([[form], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    with Connection(redis_server.url) as connection:
        connection.Producer().publish(
            body, exchange="", routing_key=QUEUE, headers={"task": "tests.apps.data.total", "id": "broken-form"},
            content_type="application/json", content_encoding="utf-8",
        )  # fmt: skip
    with pytest.raises(errors.PayloadInvalid, match=r"values: .*a broken reference or envelope: dtype: Field required"):
        app.AsyncResult("broken-form").get(**GET)


@pytest.mark.parametrize("name", ["", "values"])
def test_a_cpu_task_whose_data_are_lost_fails_with_that_error(send, name):
    """In the place of its body; what follows it hears of it, and the worker goes on."""
    lost = data.put(numpy.ones(10))
    data.delete(lost)
    result = send("on_cpu", **{name: lost}) if name else send("on_cpu", lost)
    with pytest.raises(errors.DataLost, match="is not in Redis"):
        result.get(**GET)
    assert result.state == "FAILURE" and result.traceback
    assert send("on_cpu", [1.0]).get(**GET) == ["list", 1]


def test_only_what_a_cpu_task_takes_is_read_for_it(app, send, redis_server):
    """Not what waits for later tasks of its chain, which stays where it is."""
    s = {name: app.tasks[f"tests.apps.data.{name}"].s for name in ("on_cpu", "later")}
    ref = data.put(numpy.ones(50_000))
    before = keys(redis_server)
    assert (s["on_cpu"]([1.0]) | s["later"](ref)).apply_async().get(**GET) == 50_000
    assert new_keys(redis_server, before) == set()


def test_a_result_whose_data_are_lost_is_that_error_and_no_others(app, send, redis_server):
    """In the middle of others, and also when it is asked about again."""
    values = numpy.arange(50_000.0)
    good, bad = send("doubled", values), send("doubled", values)
    wait_for(lambda: all(redis_server.client.get(f"celery-task-meta-{each.id}") for each in (good, bad)), "both")
    stored = json.loads(redis_server.client.get(f"celery-task-meta-{bad.id}"))
    data.delete(stored["result"]["__value__"])
    group = ResultSet([app.AsyncResult(each.id) for each in (good, bad)])
    with pytest.raises(errors.DataLost, match="is not in Redis"):
        group.get(**GET)
    assert isinstance(group.get(propagate=False, **GET)[1], errors.DataLost)
    for _ in range(2):
        with pytest.raises(errors.DataLost):
            bad.get(**GET)
    assert (good.get(**GET) == 2 * values).all()


def test_data_meant_for_one_task_go_when_it_has_ended(send, redis_server):
    def once():
        return data.put(numpy.ones(10), once=True)

    before = keys(redis_server)
    assert send("total", once()).get(**GET) == 10
    assert send("again", once()).get(**GET) == 10  # kept while it is retried
    with pytest.raises(ValueError, match="as asked"):
        send("fails", once()).get(**GET)
    wait_for(lambda: not new_keys(redis_server, before), "all of it to be deleted")


def test_also_of_a_task_that_has_not_succeeded(app, send, redis_server):
    """Refused, too late, past its hard limit, withdrawn before or while it ran."""

    def once():
        return data.put(numpy.ones(10), once=True)

    before, stays = keys(redis_server), app.tasks["tests.apps.data.stays"]
    with pytest.raises(errors.PayloadInvalid):
        send("square", once()).get(**GET)
    with pytest.raises(TaskRevokedError, match="expired"):
        stays.apply_async((once(), 0), expires=-1).get(**GET)
    with pytest.raises(TimeLimitExceeded):
        stays.apply_async((once(), 60), time_limit=0.2).get(**GET)
    running = send("stays", once(), 60)
    wait_for(lambda: running.id in str(inspected(app, NAME, "active")), "it to start")
    waiting = stays.apply_async((once().model_dump(mode="json"), 60), countdown=1)
    app.control.revoke([running.id, waiting.id], terminate=True)
    for each in (running, waiting):
        with pytest.raises(TaskRevokedError):
            each.get(**GET)
    wait_for(lambda: not new_keys(redis_server, before), "all of it to be deleted")


def test_what_is_put_expires(send, redis_server):
    before = keys(redis_server)
    ref = data.put(numpy.ones(10), keep_s=0.2)
    wait_for(lambda: not new_keys(redis_server, before), "its end")
    with pytest.raises(errors.DataLost, match="it has expired"):
        send("total", ref).get(**GET)
    with pytest.raises(errors.DataLost):
        data.get(ref)


def changed(ref, **fields):
    return {**ref.model_dump(mode="json"), **fields}


WRONG = {
    "another dtype": (
        "total", lambda ref: numpy.ones(3, complex),
        r"values: .*expected float64 of any shape, found complex128 of shape \(3,\)",
    ),
    "another shape": (
        "square", lambda ref: numpy.ones((2, 3)), r"expected float64 of shape \(n, n\), found float64 of shape \(2, 3\)"
    ),
    "another shape by reference": (
        "square", lambda ref: ref, r"expected float64 of shape \(n, n\), found float64 of shape \(4,\)"
    ),
    "beyond bounds": ("square", lambda ref: (numpy.ones((2, 2)), [1] * 4), r"few: .*shape \(1..3\), found a list"),
    "no number": ("total", lambda ref: [1, "x"], "found a list with an element that is no number"),
    "ragged": ("total", lambda ref: [[1, 2], [3]], "found a list whose rows have different lengths"),
    "lossy": ("square", lambda ref: (numpy.ones((2, 2)), [1.5]), "found a list of float64"),
    "no array": ("total", lambda ref: 3, "expected float64 of any shape, found int"),
    "another kind": ("total", lambda ref: {"kind": "door"}, "its kind must be one of npy, ref"),
    "no base64": ("total", lambda ref: {"kind": "npy", "data": "§"}, "data is not base64"),
    "no npy": ("total", lambda ref: {"kind": "npy", "data": "AAAA"}, "not the .npy format"),
    "a broken reference": ("total", lambda ref: changed(ref, shape=[3]), "has 24 bytes, not 32"),
    "a reference with an address": ("total", lambda ref: changed(ref, host="elsewhere"), "host: Extra inputs"),
    "objects": ("total", lambda ref: changed(ref, dtype="|O"), "only numbers and truth values"),
    "NaN in a list": ("finite", lambda ref: [1.0, float("nan")], r"found NaN or an infinity at \(1,\)"),
    "NaN by reference": ("finite", lambda ref: data.put(numpy.array([1, numpy.inf])), "found NaN or an infinity"),
}  # fmt: skip


@pytest.mark.parametrize("name, make, text", WRONG.values(), ids=WRONG)
def test_a_wrong_array_names_field_expected_and_found(send, name, make, text):
    given = make(data.put(numpy.ones(4)))
    with pytest.raises(errors.PayloadInvalid, match=text):
        send(name, *(given if isinstance(given, tuple) else (given,))).get(**GET)


FAULTS = {
    "missing": (lambda ref, keys: data.delete(ref), None, errors.DataLost, "is not in Redis"),
    "truncated": (lambda ref, keys: cut(keys), None, errors.DataCorrupt, "not of the 320 bytes"),
    "other bytes": (lambda ref, keys: spoil(keys), None, errors.DataCorrupt, "another checksum"),
    "an unknown checksum": (None, {"checksum": "md5:00"}, errors.DataRefused, "'md5' are not known"),
    "another key": (None, {"url": "redis:../../secret"}, errors.DataRefused, "is no reference to data in Redis"),
    "a file": (None, {"url": "file:///etc/passwd"}, errors.DataRefused, "not below an allowed root"),
    "a URL": (None, {"url": "http://169.254.169.254/latest"}, errors.DataRefused, "not below an allowed root"),
}


def cut(client_and_key):
    client, key = client_and_key
    client.set(key, client.get(key)[:-8], keepttl=True)


def spoil(client_and_key):
    client, key = client_and_key
    client.setrange(key, 8, b"\xff")


@pytest.mark.parametrize("harm, fields, error, text", FAULTS.values(), ids=FAULTS)
def test_data_that_cannot_be_had_fail_their_task_alone(send, redis_server, harm, fields, error, text):
    """In the task and in the producer alike; an item of a batch fails alone."""
    ref = data.put(numpy.ones(40))
    if harm:
        harm(ref, (redis_server.client, f"bridge-data-{ref.url.removeprefix('redis:')}-0"))
    given = changed(ref, **(fields or {}))
    if harm is None or harm is not FAULTS["missing"][0]:
        assert send("total", [1.0]).get(**GET) == 1.0
    with pytest.raises(error, match=text):
        send("total", given).get(**GET)
    with pytest.raises(error, match=text):
        data.get(given)
    batch = [send("totals", each) for each in ([1.0], given, [2.0])]
    assert [batch[0].get(**GET), batch[2].get(**GET)] == [1.0, 2.0]
    with pytest.raises(error, match=text):
        batch[1].get(**GET)


def test_what_can_never_fit_is_not_retried_also_when_only_the_gpu_node_sees_it(send):
    ref = data.put(numpy.array([numpy.nan]))
    result = send("finite", ref)
    with pytest.raises(errors.PayloadInvalid):
        result.get(**GET)
    with pytest.raises(errors.PayloadInvalid):
        send("retries_all", numpy.ones(3, complex)).get(**GET)


def test_in_an_event_loop(send):
    """The loop goes on meanwhile: it opens the gate that what is put waits at."""
    gate = threading.Event()

    class Late:
        def __array__(self, dtype=None, copy=None):
            assert gate.wait(30), "the loop stands still"
            return numpy.arange(3.0)

    async def both():
        asyncio.get_running_loop().call_later(0.05, gate.set)
        ref = await data.aput(Late())
        return (await data.aget(ref)).tolist()

    assert asyncio.run(both()) == [0, 1, 2]


def test_a_producer_loads_neither_ray_nor_cupy(environment):
    program = (
        "import sys, numpy; from bridge import data; from celery import Celery;"
        "app = Celery(broker=sys.argv[1], backend=sys.argv[1]); app.set_current(); ref = data.put(numpy.ones(3));"
        "r = app.send_task('tests.apps.data.total', [ref], queue='data').get(timeout=60);"
        "print(r, sorted({'ray', 'cupy'} & {name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, environment["CELERY_BROKER_URL"]], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.split("\n")[0] == "3.0 []", done.stderr


def test_the_worker_and_the_driver_touch_no_bytes(app, send, worker):
    """What a reference costs them does not depend on its size."""
    pids = [worker.popen.pid, *inspected(app, NAME, "stats")["pool"]["gpu"]["drivers"]]
    send("total", data.put(numpy.ones(10))).get(**GET)

    def peak():
        return sum(int(open(f"/proc/{pid}/status").read().partition("VmHWM:")[2].split()[0]) for pid in pids)

    before = peak()
    for _ in range(3):
        send("total", data.put(numpy.ones(4 << 20))).get(**GET)  # 32 MiB
    assert peak() - before < 16 << 10


def test_once_costs_no_other_task_its_data(app, send, redis_server):
    """A task whose arguments nobody checks must not take over what the one before it has."""
    keep = data.put(numpy.ones(10), once=True)
    waiting = send("again", keep, 1.0)
    wait_for(lambda: waiting.state == "RETRY", "its retry to be sent")
    mapped = app.tasks["tests.apps.data.total"].map([[1.0], [2.0]]).apply_async()
    assert mapped.get(**GET) == [1.0, 2.0]
    assert waiting.get(**GET) == 10


def test_what_a_body_asks_celery_to_send_goes_by_reference_when_it_is_large(send, redis_server):
    """Its executor has put it: the driver, which sends it, must not wait for a store."""
    before = keys(redis_server)
    assert send("doubles_again", 20).get(**GET) == 40
    assert new_keys(redis_server, before) == set()
    assert send("doubles_again", 20_000).get(**GET) == 40_000
    assert len(new_keys(redis_server, before)) == 1
