"""The project's own app under its own worker: every GPU task against NumPy, and canvases across CPU and GPU."""

import base64
import io
import re
from pathlib import Path

import numpy
import pytest
from PIL import Image

from bridge import data
from tests.support.services import Worker

GET = {"timeout": 90}
RANDOM = numpy.random.default_rng(3)
DATA = RANDOM.normal(size=500).tolist()
SQUARE = (RANDOM.normal(size=(8, 8)) + 8 * numpy.eye(8)).tolist()


@pytest.fixture(scope="module")
def app_worker(environment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    process = Worker(folder, "-c", "1", "-Q", "celery,gpu", app="celery_app", env=environment)
    yield process
    assert process.stop() == 0, process.output[-3000:]


@pytest.fixture
def task(producer, app_worker):
    """``task("arrays.total", data)``: what a plain producer sends, to the queue the app's routes name."""

    def signature(name, *args, **kwargs):
        queue = "celery" if name.startswith("reports.") else "gpu"
        return producer.signature(f"celery_app.tasks.{name}", args, kwargs, queue=queue)

    return signature


def run(signature):
    return signature.apply_async().get(**GET)


def picture(height=40, width=60):
    file = io.BytesIO()
    Image.fromarray(RANDOM.integers(0, 255, (height, width, 3), dtype=numpy.uint8)).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def size(image):
    return Image.open(io.BytesIO(base64.b64decode(image))).size


def test_arrays(task):
    assert run(task("arrays.gpu_intensive_task", DATA)) == pytest.approx(float(numpy.square(DATA).sum()))
    assert run(task("arrays.total", DATA)) == pytest.approx(sum(DATA))
    found = run(task("arrays.statistics", DATA))
    assert (found["mean"], found["std"]) == pytest.approx((numpy.mean(DATA), numpy.std(DATA)))
    spectrum = run(task("arrays.power_spectrum", numpy.sin(numpy.arange(400) * 0.5).tolist(), 100.0))
    assert isinstance(spectrum, dict)


def test_linalg(task):
    assert numpy.allclose(run(task("linalg.matmul", SQUARE, SQUARE)), numpy.matmul(SQUARE, SQUARE))
    assert numpy.allclose(run(task("linalg.solve", SQUARE, [1.0] * 8)), numpy.linalg.solve(SQUARE, [1.0] * 8))
    assert set(run(task("linalg.pca", SQUARE, 2))) >= {"components"}


def test_images(task):
    image = picture()
    assert size(run(task("images.resize", image, 30, 20))) == (30, 20)
    for name in ("denoise", "edges", "equalise", "enhance"):
        assert size(run(task(f"images.{name}", image))) == (60, 40)


def test_images_by_reference(task, producer):
    """The same task, the same result; what comes out is base64 of a PNG for any producer."""
    image = picture()
    producer.set_current()
    ref = data.put_bytes(base64.b64decode(image))
    for form in (ref, ref.model_dump(mode="json"), {"kind": "bytes", "data": image}):
        assert run(task("images.denoise", form)) == run(task("images.denoise", image))
    data.delete(ref)


def test_vectors(task):
    results = [task("vectors.normalise", [3.0 * n, 4.0 * n]).apply_async() for n in range(1, 30)]
    assert all(result.get(**GET) == pytest.approx([0.6, 0.8]) for result in results)
    neighbours = run(task("vectors.top_k", RANDOM.normal(size=64).tolist(), 3))
    assert len(neighbours) == 3


def test_bursts_larger_than_the_link_takes_at_once(task):
    """What does not fit into the socket to the driver must follow without anything else happening."""
    vector = [1.0] * 64
    for _ in range(12):
        results = [task("vectors.normalise", vector).apply_async() for _ in range(200)]
        assert all(result.get(**GET) == pytest.approx([0.125] * 64) for result in results)


def test_a_chain_cpu_gpu_cpu(task):
    made, analysed, told = task("reports.make_signal"), task("arrays.statistics"), task("reports.summarise")
    text = run(made | analysed | told)
    assert re.search(r"1000", text), text


def test_a_chord_of_gpu_tasks_with_a_cpu_callback(task, tmp_path):
    originals, sheet = [], tmp_path / "sheet.png"
    for number in range(3):
        path = tmp_path / f"{number}.png"
        path.write_bytes(base64.b64decode(picture()))
        originals.append(str(path))
    header = [task("images.enhance", base64.b64encode(Path(path).read_bytes()).decode()) for path in originals]
    callback = task("reports.contact_sheet", originals=originals, captions=["a", "b", "c"], path=str(sheet))
    from celery import chord

    assert chord(header, app=callback.app)(callback).get(**GET)
    assert Image.open(sheet).size[0] > 0


def test_a_refused_picture(task):
    with pytest.raises(Exception) as caught:
        run(task("images.denoise", "not a picture"))
    assert type(caught.value).__name__ == "PayloadInvalid"
