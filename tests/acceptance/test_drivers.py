"""``--drivers N``: several driver processes of one worker, one of them killed."""

import os
import signal
import socket

from tests.support.services import Worker, inspected, wait_for

GET = {"timeout": 60}


def test_two_drivers_share_the_tasks_and_one_carries_on_when_the_other_dies(environment, producer, tmp_path):
    worker = Worker(tmp_path, "-c", "1", "-Q", "drivers", "-n", "drivers@%h", "--drivers", "2", env=environment)
    name = f"drivers@{socket.gethostname()}"

    def pids():
        return inspected(producer, name, "gpu")["drivers"]

    before = pids()
    assert len(set(before)) == 2
    results = [producer.send_task("shop.add", [n, 0], queue="drivers") for n in range(40)]
    assert [result.get(**GET) for result in results] == list(range(40))
    os.kill(before[1], signal.SIGKILL)
    results = [producer.send_task("shop.add", [n, 0], queue="drivers") for n in range(40)]
    ended = [result.get(propagate=False, **GET) for result in results]
    lost = [each for each in ended if type(each).__name__ == "WorkerLostError"]
    assert [each for each in ended if each not in lost] == [n for n, each in enumerate(ended) if each not in lost]
    assert len(lost) <= 32, "what the dead driver had started, and no more"
    wait_for(lambda: pids()[1] not in (None, before[1]), "the next driver")
    assert pids()[0] == before[0]
    assert worker.stop() == 0, worker.output[-3000:]
