"""Data in Ray's object store: for producers inside the cluster, for results, and what others are told."""

import json
import os
import socket
import subprocess
import sys

import numpy
import pytest

from bridge import data, errors
from tests.apps.data import QUEUE
from tests.apps.data import app as data_app
from tests.support.joined import Joined
from tests.support.services import ROOT, Worker, wait_for

GET = {"timeout": 60}
NAMESPACE = "tests"  # as all workers on this cluster have, whose one GPU they share
COUNT = 500_000  # 4 MB


@pytest.fixture(scope="module")
def env(environment):
    return environment | {"BRIDGE_DATA_URL": "ray"}


@pytest.fixture(scope="module")
def worker(env, tmp_path_factory):
    options = ("-c", "1", "-n", f"ray-store@{socket.gethostname()}", "-Q", QUEUE)
    folder = tmp_path_factory.mktemp("ray-store")
    process = Worker(folder, *options, app="tests.apps.data:app", env=env, ready=False)  # while the producer joins
    yield process
    assert process.stop() == 0, process.output[-5000:]


@pytest.fixture(scope="module")
def inside(env, worker, ray_cluster):
    process = Joined(ray_cluster.address, NAMESPACE, "tests.apps.data:app", env)
    process("""
def send(name, *args):
    return app.tasks['tests.apps.data.' + name].apply_async(args)
""")
    worker.says(" ready.")
    yield process
    process.end()


@pytest.fixture
def send(redis_server, worker):
    """From this process, which has not joined the cluster."""
    data_app.conf.update(broker_url=redis_server.url, result_backend=redis_server.url)
    data_app.set_current()
    yield lambda name, *args: data_app.tasks[f"tests.apps.data.{name}"].apply_async(args)
    data_app.backend.result_consumer.stop()
    data_app.close()


@pytest.fixture(autouse=True)
def nothing_stays(inside):
    before = inside("answer = store.holdings()")
    yield
    wait_for(lambda: inside("answer = store.holdings()") <= before, "nothing more to be kept than before")


def test_a_producer_inside_puts_an_array_once_and_tasks_take_it(inside, redis_server):
    before = redis_server.client.info("stats")["total_net_input_bytes"]
    found = inside(f"""
array = numpy.arange({COUNT}.0)
ref = data.put(array, store='ray')
blob = data.put_bytes(b'x' * 3_000_000)
answer = [ref.url[:4], store.holdings(), [send('total', ref).get(timeout=60) for _ in range(3)], len(data.get(blob)),
          send('on_cpu', ref).get(timeout=60), ref.expires_at > 0]
data.delete(ref)
data.delete(blob)
""")
    total = COUNT * (COUNT - 1) / 2
    assert found == ["ray:", [2, 8 * COUNT + 3_000_000], [total] * 3, 3_000_000, ["ndarray", total], True]
    assert redis_server.client.info("stats")["total_net_input_bytes"] - before < 200_000


def test_results_are_read_where_they_lie(inside, redis_server):
    """Twice the same memory: no copy. It outlives its reference while somebody has it."""
    assert inside(f"""
given = data.put(numpy.ones({COUNT}), once=True)
result = send('doubled', given)
result.get(timeout=60)
import json
ref = json.loads(app.backend.client.get('celery-task-meta-' + result.id))['result']['__value__']
one, two = data.get(ref), data.get(ref)
data.delete(ref)
one_at, two_at = (each.__array_interface__['data'][0] for each in (one, two))
answer = [type(one).__name__, one.dtype.str, one.flags.writeable, one_at == two_at, float(one.sum())]
""") == ["ndarray", "<f8", False, True, 2.0 * COUNT]


def test_a_process_outside_is_told(send, inside):
    ref = inside("answer = data.put(numpy.ones(10)).model_dump(mode='json')")
    for do in (lambda: data.get(ref), lambda: data.put(numpy.ones(3), store="ray")):
        with pytest.raises(errors.StoreUnavailable, match=r"call ray.init\(address\) first"):
            do()
    with pytest.raises(ValueError, match="store is"):
        data.put(numpy.ones(3), store="disk")
    inside("data.delete(ref)", ref=ref)


def test_a_producer_that_chose_this_store_joins_by_itself_and_what_it_puts_outlives_it(inside, env, send):
    code = (
        "import os, sys\nfrom tests.apps.data import app\nfrom bridge import data, errors, settings\nimport numpy\n"
        "app.set_current()\nassert 'ray' not in sys.modules\n"
        "head, os.environ['BRIDGE_RAY_ADDRESS'] = os.environ['BRIDGE_RAY_ADDRESS'], '127.0.0.1:1'\n"
        "try:\n    data.put(numpy.ones(1))\n"
        "except errors.StoreUnavailable as error:\n    assert 'nothing answers at 127.0.0.1:1' in str(error)\n"
        "else:\n    raise AssertionError\n"
        "os.environ['BRIDGE_RAY_ADDRESS'] = head\nsettings.settings.cache_clear()\n"
        "ref, once = data.put(numpy.arange(5.0)), data.put(numpy.ones(2000), once=True)\n"
        "assert data.get(ref).sum() == 10\nprint(f'[{ref.model_dump_json()}, {once.model_dump_json()}]')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, cwd=ROOT,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ref, once = json.loads(done.stdout)
    assert ref["url"].startswith("ray:") and send("total", ref).get(**GET) == 10
    assert send("total", once).get(**GET) == 2000
    inside("data.delete(ref)", ref=ref)


def changed(ref, **fields):
    return {**ref, **fields}


FAULTS = {
    "deleted": ("data.delete(ref)", {}, "DataLost", "is not in Ray's object store: it has expired, was deleted"),
    "never put": ("pass", {"url": "ray:" + "0" * 32}, "DataLost", "is not in Ray's object store"),
    "another size": ("pass", {"shape": [9], "size_bytes": 72}, "DataCorrupt", "is not of the 72 bytes"),
    "no name": ("pass", {"url": "ray:../../secret"}, "DataRefused", "is no reference to data in Redis, nor in Ray"),
    "a keeper that has ended": ("ray.kill(store._found())", {}, "DataLost", "with the actor that keeps such data"),
}


@pytest.mark.parametrize("do, fields, error, text", FAULTS.values(), ids=FAULTS)
def test_a_reference_that_is_not_good_fails_its_task_alone(inside, send, do, fields, error, text):
    ref = inside("answer = data.put(numpy.ones(10)).model_dump(mode='json')")
    inside(do, ref=ref)
    with pytest.raises(getattr(errors, error), match=text):
        send("total", changed(ref, **fields)).get(**GET)
    with pytest.raises(RuntimeError, match=f"{error}: .*{text}"):
        inside("data.get(ref)", ref=changed(ref, **fields))
    inside("data.delete(ref)", ref=ref)
    assert send("total", [1.0, 2.0]).get(**GET) == 3


def test_what_is_put_expires_and_there_is_only_so_much_room(inside):
    assert inside("""
from actors.data.stores import Stores
small = RayStore('tests', StoreConfig(ray_bytes=100))
kept = small.write(bytes(80), 3600.0)
try:
    small.write(bytes(21), 3600.0)
except Exception as error:
    answer = [type(error).__name__, str(error)]
small.delete(kept, 80)
try:
    Stores(app, StoreConfig(ray_bytes=100)).put(numpy.ones(13), store='ray')
except Exception as error:
    answer.append(str(error))
small.delete(small.write(bytes(21), 3600.0), 21)
""") == [
        "StoreUnavailable",
        "Ray's object store takes no 21 B more: 1 of 80 B together are kept, and BRIDGE_DATA_RAY_BYTES allows 100 B",
        "Ray's object store takes no 104 B: BRIDGE_DATA_RAY_BYTES allows 100 B",
    ]
    ref = inside("answer = data.put(numpy.ones(10), keep_s=0.2).model_dump(mode='json')")
    wait_for(lambda: inside("answer = store.holdings()")[0] == 0, "its end")
    with pytest.raises(RuntimeError, match=r"DataLost.*has expired"):
        inside("data.get(ref)", ref=ref)


def test_what_is_put_too_late_is_not_kept(inside):
    """The keeper stands still until the put has been given up."""
    assert (
        inside("""
import os, signal
data.delete(data.put(numpy.ones(3)))  # there is a keeper
pid = ray.get(store._found().__ray_call__.remote(lambda keeper: os.getpid()))
os.kill(pid, signal.SIGSTOP)
try:
    RayStore('tests', StoreConfig(timeout_s=0.3)).write(bytes(1000), 3600.0)
except Exception as error:
    answer = str(error)
finally:
    os.kill(pid, signal.SIGCONT)
""")
        == "1000 B for Ray's object store: Ray has not answered in time"
    )
    wait_for(lambda: inside("answer = store.holdings()") == [0, 0], "it to be forgotten")


def test_errors_of_rays_are_named_in_a_line(inside):
    """As the keeper's own arrive, with a traceback in their text."""
    assert inside("""
from actors.data.ray_store import _answers
answer = []
for cause in (ray.exceptions.OutOfDiskError('no space'), OSError(5, 'broken')):
    try:
        with _answers('1 B for it'):
            raise ray.exceptions.RayTaskError('keep', 'Traceback ...', cause).as_instanceof_cause()
    except Exception as error:
        answer.append(f'{type(error).__name__}: {error}')
""") == [
        "StoreUnavailable: 1 B for it: Ray's memory is full, and its disk",
        "StoreUnavailable: 1 B for it: OSError: [Errno 5] broken",
    ]


def test_what_is_on_its_way_between_actors_ends_with_its_actor(inside):
    """And what is kept for longer does not."""
    assert inside("""
@ray.remote(num_cpus=0)
class Maker:
    def make(self, is_brief):
        return RayStore('tests', StoreConfig()).write(bytes(1_000_000), 3600.0, is_brief)
maker = Maker.remote()
urls = [ray.get(maker.make.remote(is_brief)) for is_brief in (True, False)]
here = [store.lend(url, 1_000_000).nbytes for url in urls[1:]]
ray.kill(maker)
answer = here + [store.lend(urls[1], 1_000_000).nbytes]
import time
deadline = time.monotonic() + 60
while True:
    try:
        store.lend(urls[0], 1_000_000)
        assert time.monotonic() < deadline
    except Exception as error:
        answer.append(type(error).__name__)
        break
for url in urls:
    store.delete(url, 1_000_000)
""") == [1_000_000, 1_000_000, "DataLost"]
