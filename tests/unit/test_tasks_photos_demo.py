"""The photographs demo without a worker: its producer, its pictures, its child process and its tables."""

import ast
import io
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image as pillow
from rich.console import Console

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # examples are no installed package

from celery_app import app  # noqa: E402
from celery_app.tasks.payloads import MAX_IMAGE_BYTES  # noqa: E402
from examples.photos import demo, producer, summary, worker  # noqa: E402
from examples.photos.photographs import LONGEST_SIDE, PHOTOGRAPHS, write_photographs  # noqa: E402

app.loader.import_default_modules()

STATS = {
    "total": {"celery_app.tasks.reports.contact_sheet": 1, "celery_app.tasks.vectors.normalise": 241},
    "pool": {
        "max-concurrency": 2,
        "gpu": {
            "cluster": "127.0.0.1:6379",
            "slots": 32,
            "in_flight": 0,
            "actors": [
                {
                    "slot": 0,
                    "node": "node-a",
                    "pid": 1,
                    "executor_pid": 2,
                    "state": "ready",
                    "device": {
                        "kind": "cuda",
                        "name": "NVIDIA H200",
                        "memory_bytes": 150_754_820_096,
                        "libraries": "CuPy 14.2.0",
                        "note": "",
                    },
                    "warm_s": 3.25,
                    "tasks": 249,
                    "calls": 70,
                    "crashes": 0,
                    "by_task": {
                        "celery_app.tasks.images.enhance": {"tasks": 8, "runs": 8, "mean_s": 0.0123},
                        "celery_app.tasks.vectors.normalise": {"tasks": 241, "runs": 50, "mean_s": 0.0004},
                    },
                },
                {"slot": 1, "node": "node-b", "state": "starting", "device": None, "warm_s": None, "by_task": {}},
            ],
        },
    },
}


def test_the_producer_loads_celery_and_nothing_of_this_project():
    tree = ast.parse(Path(producer.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert {module.partition(".")[0] for module in imported} - set(sys.stdlib_module_names) == {"celery"}
    code = (
        "import sys, examples.photos.producer\n"
        "print([name for name in ('bridge', 'actors', 'celery_app', 'ray', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize(
    ("name", "queue"),
    [
        (producer.ENHANCE, producer.GPU_QUEUE),
        (producer.NORMALISE, producer.GPU_QUEUE),
        (producer.CONTACT_SHEET, producer.CPU_QUEUE),
    ],
)
def test_the_producer_names_tasks_that_exist_and_their_queues(name, queue):
    assert name in app.tasks
    assert app.amqp.router.route({}, name)["queue"].name == queue


def test_every_photograph_is_in_the_wheel_and_small_enough_for_json(tmp_path):
    files = write_photographs(tmp_path)
    assert len({file.name for file in files}) == len(PHOTOGRAPHS) == 8
    for file in files:
        with pillow.open(file) as picture:
            assert (picture.format, picture.mode) == ("JPEG", "RGB")
            assert max(picture.size) <= LONGEST_SIDE
        assert file.stat().st_size < 150_000 < MAX_IMAGE_BYTES


def test_work_is_told_per_actor_and_the_rest_per_worker():
    assert summary.work_done(STATS) == [
        summary.Work("actor 0 on node-a", "NVIDIA H200", "celery_app.tasks.images.enhance", 8, 8, 0.0123),
        summary.Work("actor 0 on node-a", "NVIDIA H200", "celery_app.tasks.vectors.normalise", 241, 50, 0.0004),
        summary.Work("worker", "CPU", "celery_app.tasks.reports.contact_sheet", 1),
    ]
    assert summary.count_of(STATS, producer.NORMALISE) == (241, 50)
    assert summary.count_of(STATS, "unknown") == (0, 0)


def printed(stats, burst, timings=None):
    console = Console(file=io.StringIO(), width=120)
    summary.show(console, stats, timings or summary.Timings(), burst)
    return console.file.getvalue()


def test_the_tables_say_where_how_many_at_once_and_how_fast():
    timings = summary.Timings(9.5, 12.25, 1.5, 0.25, [0.004] * 39 + [1.0])
    text = " ".join(printed(STATS, (200, 40), timings).split())
    for part in (
        "actor 0 on node-a NVIDIA H200 vectors.normalise 241 50 4.8 0.40 ms",
        "actor 0 on node-a NVIDIA H200 images.enhance 8 8 1.0 12.30 ms",
        "worker CPU reports.contact_sheet 1",
        "worker answers 9.5 s",
        "first GPU result 12.2 s",
        "warming the executor 3.2 s",
        "burst of 200 vectors 0.25 s, 40 runs of 5.0 tasks",
        "p50 4.0 ms",
        "p95 4.0 ms",
    ):
        assert part in text
    assert "NumPy" not in text


def test_an_actor_without_a_gpu_says_why():
    device = {"kind": "cpu", "name": "NumPy on CPU", "note": "no NVIDIA driver"}
    stats = {"pool": {"gpu": {"actors": [{"slot": 0, "node": "a", "device": device, "by_task": {}}]}}}
    assert "Actor 0 has no GPU (no NVIDIA driver). The same code ran on NumPy." in printed(stats, (200, 40))


@pytest.mark.parametrize("stats", [{}, {"pool": {}}, {"total": {"a.b": 3}, "pool": {"max-concurrency": 2}}])
def test_a_worker_without_the_bridge_gets_its_tables_too(stats):
    text = printed(stats, (200, 0))
    assert "This worker says nothing of GPU actors" in text
    assert "burst of 200 vectors" in text
    assert "runs of" not in text


def started(tmp_path, code, echoed):
    command = f"{sys.executable} -u -c '{code}'"
    return worker.Worker(command, "redis://127.0.0.1:1/0", tmp_path / "log", echoed.append)


def test_a_worker_that_dies_is_noticed_with_its_last_words(tmp_path):
    echoed = []
    with started(tmp_path, 'print("no GPU here"); raise SystemExit(71)', echoed) as process:
        process._process.wait(10)
        with pytest.raises(worker.WorkerDied, match=r"exit code 71.*\nno GPU here"):
            process.check()
    assert echoed == ["no GPU here"]
    assert (tmp_path / "log").read_text() == "no GPU here\n"


def test_a_worker_gets_the_broker_and_is_stopped_by_sigterm_when_the_block_ends(tmp_path):
    code = 'import os, signal; print(os.environ["CELERY_BROKER_URL"]); signal.pause()'
    echoed = []
    with pytest.raises(KeyboardInterrupt), started(tmp_path, code, echoed) as process:
        process.check()
        wait_until(lambda: echoed == ["redis://127.0.0.1:1/0"])
        raise KeyboardInterrupt
    assert process._process.returncode == -15


def test_a_worker_that_does_not_stop_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "STOP_TIMEOUT_S", 0.3)
    code = 'import signal, time; signal.signal(15, signal.SIG_IGN); print("deaf"); time.sleep(60)'
    echoed = []
    with started(tmp_path, code, echoed) as process:
        wait_until(lambda: echoed)
    assert process._process.returncode == -9
    assert echoed[-1] == "no warm shutdown within 0 s: killed"


def test_the_demo_fails_with_the_output_of_a_worker_that_cannot_start(tmp_path, capsys):
    command = f"{sys.executable} -c 'raise SystemExit(\"no such setting\")'"
    assert demo.main(["--out", str(tmp_path), "--worker", command]) == 1
    text = capsys.readouterr().out
    assert "demo failed: the worker ended with exit code 1" in text
    assert "no such setting" in text


def test_the_demo_says_what_it_waited_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "START_TIMEOUT_S", 0.6)
    command = f"{sys.executable} -c 'import signal; signal.pause()'"
    assert demo.main(["--out", str(tmp_path), "--broker", "redis://127.0.0.1:1/0", "--worker", command]) == 1
    assert "still waiting for Redis at 127.0.0.1:1" in capsys.readouterr().out.replace("\n", " ")


def wait_until(condition, timeout_s=10):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
