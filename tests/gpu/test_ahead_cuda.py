"""Reading ahead on a real GPU: a kernel runs while the actor reads what the next call needs."""

import numpy
import pytest
from celery import Celery

from actors.contract import StoreConfig
from actors.data.redis_values import CHUNK_BYTES
from actors.data.stores import Stores
from tests.integration.test_ahead import is_ready, keys_of, taking
from tests.integration.test_executor import Driver, exists, kinds, make_config, path, task, value  # noqa: F401
from tests.support.services import RedisServer, wait_for

APP = """
from pathlib import Path
import cupy
from celery import Celery
from bridge.data import Array

app = Celery("ahead", broker="memory://", set_as_current=False)
CODE = 'extern "C" __global__ void spins() { long long from = clock64(); while (clock64() - from < 10000000); }'
SPINS = cupy.RawKernel(CODE, "spins")

@app.task(gpu=True)
def hold(started, release):
    Path(started).touch()
    for _ in range(10_000):
        SPINS((1,), (1,), ())
        cupy.cuda.get_current_stream().synchronize()
        if Path(release).exists():
            break

@app.task(gpu=True)
def total(values: Array): return [type(values).__module__.partition(".")[0], float(values.sum())]
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("store"))
    yield server
    server.kill_group()


@pytest.fixture(scope="module")
def driver(tmp_path_factory, store):
    try:
        import cupy

        assert cupy.cuda.runtime.getDeviceCount() > 0
    except Exception as error:
        pytest.skip(f"no CUDA device here: {type(error).__name__}: {error}")
    folder = tmp_path_factory.mktemp("ahead")
    (folder / "ahead_app.py").write_text(APP)
    tasks = ["ahead_app.hold", "ahead_app.total"]
    config = make_config(folder, "ahead", "ahead_app", tasks, stores=StoreConfig(store.url))
    driver = Driver()
    driver.hello(config._replace(device="cuda"), ready=False)
    wait_for(lambda: driver.health.state == "ready", "the executor to be warm", 180)
    yield driver
    driver.end()


@pytest.mark.parametrize("mib", [1, 12])
def test_the_next_calls_data_are_read_while_a_kernel_runs(driver, store, path, mib):  # noqa: F811
    """All of them; nobody asks again, for they are gone from Redis before the second body starts."""
    stores = Stores(Celery(set_as_current=False), StoreConfig(store.url))
    array = numpy.arange(mib * CHUNK_BYTES / 8)
    driver.values(taking(stores.put(array), ahead=False))  # and the actor has a connection now
    first, ref = driver.send(task("ahead_app.hold", path, path + "-end")), stores.put(array)
    wait_for(lambda: exists(path), "the body")
    second = driver.send(taking(ref))
    wait_for(is_ready(driver, ref.size_bytes), "what the second call needs")
    store.client.delete(*keys_of(ref))
    open(path + "-end", "w").close()
    assert kinds(first.outcomes()) == ["succeeded"]
    kind, total = value(second.outcomes()[0])
    assert kind == "cupy" and total == pytest.approx(array.sum())
