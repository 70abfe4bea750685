"""Every GPU task on CUDA against the same task on NumPy. Needs a CUDA device and CuPy; skipped where there is none."""

import base64
import io

import numpy
import pytest
from PIL import Image as pillow

from actors.batching import batch_of, run_batch
from actors.bodies import innermost
from actors.executor.device import DeviceUnusable, array_module, open_device
from celery_app.tasks import arrays, images, linalg, vectors

pytestmark = pytest.mark.gpu

random = numpy.random.default_rng(7)
SIGNAL = random.normal(2.0, 3.0, 10_001).tolist()
SQUARE = (random.normal(size=(60, 60)) + 10 * numpy.eye(60)).tolist()
TALL = (random.normal(size=(300, 12)) @ numpy.diag(numpy.arange(12, 0, -1.0))).tolist()


def photograph(height, width):
    y, x = numpy.mgrid[0:height, 0:width] / 20
    shapes = numpy.stack([numpy.sin(x) * numpy.cos(y), numpy.sin(y + 1), numpy.cos(x - y)], axis=2)
    noisy = (shapes * 0.4 + 0.5) * 255 + numpy.random.default_rng(8).normal(0, 5, shapes.shape)
    file = io.BytesIO()
    pillow.fromarray(noisy.clip(0, 255).astype(numpy.uint8)).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


PHOTOGRAPH = photograph(240, 320)

NUMBERS = [
    (arrays.gpu_intensive_task, (SIGNAL,)),
    (arrays.total, (SIGNAL,)),
    (arrays.statistics, (SIGNAL,)),
    (arrays.statistics, ([5.0],)),
    (arrays.power_spectrum, (SIGNAL, 1000.0)),
    (arrays.power_spectrum, (SIGNAL[:-1], 1000.0)),
    (linalg.matmul, (TALL, SQUARE[:12])),
    (linalg.solve, (SQUARE, SIGNAL[:60])),
    (linalg.pca, (TALL, 4)),
    (linalg.pca, ([row[:5] for row in TALL[:3]], 2)),
    (vectors.normalise, ([3e200, 4e200],)),
    (vectors.top_k, (SIGNAL[:64], 10)),
]
PICTURES = [
    (images.denoise, (PHOTOGRAPH, 1)),
    (images.denoise, (PHOTOGRAPH, 3)),
    (images.edges, (PHOTOGRAPH, 1.5)),
    (images.equalise, (PHOTOGRAPH, 2.5)),
    (images.resize, (PHOTOGRAPH, 111, 77)),
    (images.resize, (PHOTOGRAPH, 500, 400)),
    (images.enhance, (PHOTOGRAPH,)),
    (images.enhance, (photograph(1, 5),)),
]
REFUSALS = [
    (linalg.solve, ([[1, 2], [2, 4]], [1, 1]), "singular"),
    (linalg.pca, ([[1, 2], [1, 2]], 1), "all equal"),
    (vectors.normalise, ([0.0, 0.0],), "no direction"),
    (vectors.top_k, ([0.0] * 64,), "no direction"),
    (vectors.top_k, ([1.0],), "query has 1 numbers"),
    (arrays.statistics, ([],), "data is empty"),
]


@pytest.fixture(scope="module")
def on_cpu():
    """What NumPy gives for every case, computed before CUDA is touched."""
    open_device("cpu", "90%")
    return {id(case): case[0](*case[1]) for case in (*NUMBERS, *PICTURES)}


@pytest.fixture(scope="module", autouse=True)
def cuda(on_cpu):
    try:
        device = open_device("cuda", "90%")
    except DeviceUnusable as error:
        open_device("cpu", "90%")
        pytest.skip(f"no usable CUDA device: {error}")
    vectors.corpus.drop()
    yield device
    vectors.corpus.drop()
    open_device("cpu", "90%")


@pytest.fixture
def computed_on_the_device(cuda):
    """Such a test must have taken device memory, else it compared NumPy with NumPy."""

    class Watch(cuda.xp.cuda.MemoryHook):
        name = "watch"
        allocated_bytes = 0

        def malloc_postprocess(self, **block):
            self.allocated_bytes += block["size"]

    with Watch() as watch:
        yield
    assert watch.allocated_bytes > 0


@pytest.mark.parametrize("case", NUMBERS, ids=lambda case: case[0].__name__)
def test_numbers_agree_with_numpy(case, on_cpu, computed_on_the_device):
    task, arguments = case
    agree(task(*arguments), on_cpu[id(case)])


@pytest.mark.parametrize("case", PICTURES, ids=lambda case: case[0].__name__)
def test_pictures_agree_with_numpy(case, on_cpu, computed_on_the_device):
    task, arguments = case
    ours, theirs = (pixels(payload) for payload in (task(*arguments), on_cpu[id(case)]))
    assert ours.shape == theirs.shape
    difference = numpy.abs(ours - theirs)
    # float32 sums in another order: a level apart here and there. An equalised level can fall to the next tone.
    assert difference.max() <= 3
    assert (difference > 1).mean() < 0.001


def test_a_batch_agrees_with_numpy(computed_on_the_device):
    items = [random.normal(size=size).tolist() for size in (64, 3, 64, 1)] + [[0.0, 0.0]]
    results = run_batch(batch_of(innermost(vectors.normalise)), [([item], {}) for item in items])
    for item, result in zip(items[:-1], results[:-1], strict=True):
        assert result == pytest.approx((numpy.array(item) / numpy.linalg.norm(item)).tolist())
    assert isinstance(results[-1], ValueError)


def test_the_corpus_stays_on_the_device():
    assert array_module().__name__ == "cupy"
    assert type(vectors.corpus()).__module__.startswith("cupy")
    assert vectors.corpus() is vectors.corpus()


@pytest.mark.parametrize(("task", "arguments", "reason"), REFUSALS)
def test_the_same_is_refused(task, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        task(*arguments)


def agree(ours, theirs):
    """Compare nested results: same shape and kind, numbers nearly equal, whole numbers exactly."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            agree(ours[key], theirs[key])
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            agree(one, other)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
    else:
        assert ours == theirs


def pixels(payload):
    return numpy.asarray(pillow.open(io.BytesIO(base64.b64decode(payload)))).astype(int)
