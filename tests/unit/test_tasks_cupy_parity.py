"""Every GPU body on a make-believe CuPy: what a machine without CUDA can check of the CUDA path.

Arrays here refuse to mix with NumPy's, as CuPy's do, and every function a body calls must exist in CuPy under that name
with those keywords. The numbers themselves are compared on a real GPU in `tests/gpu/test_tasks_cuda.py`.
"""

import inspect
import warnings

import numpy
import pytest
import scipy.ndimage

from bridge.marks import find_marks
from celery_app import app
from celery_app.tasks import arrays, images, linalg, payloads, vectors

app.loader.import_default_modules()
EXAMPLES = {mark.name: mark.gpu.example for mark in find_marks(app.tasks.values(), []).values()}
EXAMPLES["celery_app.tasks.vectors.normalise"] = ([3.0, 4.0],)


class DeviceArray(numpy.ndarray):
    """An array that lives on the device: NumPy's arrays may not touch it, and only `get` brings it to the host."""

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        refuse_host_arrays(ufunc.__name__, inputs)
        if "out" in options:
            options["out"] = tuple(bare(out) for out in options["out"])
        return on_device(getattr(ufunc, method)(*bare(inputs), **options))

    def __array_function__(self, function, types, args, options):
        raise TypeError(f"numpy.{function.__name__} was called with a device array; call it on array_module()")

    @property
    def __array_interface__(self):
        raise TypeError("implicit conversion of a device array to a host array")

    def get(self):
        return self.view(numpy.ndarray).copy()


def on_device(value):
    if isinstance(value, tuple | list):
        return tuple(on_device(item) for item in value)
    return numpy.asanyarray(value).view(DeviceArray) if isinstance(value, numpy.ndarray | numpy.generic) else value


def bare(value):
    if isinstance(value, tuple | list):
        return type(value)(bare(item) for item in value)
    return value.view(numpy.ndarray) if isinstance(value, DeviceArray) else value


def refuse_host_arrays(name, values):
    for value in values:
        if type(value) is numpy.ndarray:
            raise TypeError(f"{name}: unsupported type numpy.ndarray")
        if isinstance(value, tuple | list):
            refuse_host_arrays(name, value)


class MakeBelieve:
    """A module of NumPy or SciPy that offers what `counterpart`, a module of CuPy, offers."""

    def __init__(self, real, counterpart):
        self._real, self._counterpart = real, counterpart

    def __getattr__(self, name):
        theirs = getattr(self._counterpart, name, None)
        assert theirs is not None, f"{self._counterpart.__name__} has no {name}"
        ours = getattr(self._real, name)
        if inspect.ismodule(ours):
            return MakeBelieve(ours, theirs)
        if isinstance(ours, type) or not callable(ours):
            return ours

        def call(*args, **options):
            if name != "asarray":
                refuse_host_arrays(name, [*args, *options.values()])
            check_keywords(theirs, options)
            return on_device(ours(*bare(args), **{key: bare(value) for key, value in options.items()}))

        return call


def check_keywords(function, options):
    try:
        inspect.signature(function).bind_partial(**options)
    except ValueError:  # a compiled function without a signature
        return


@pytest.fixture
def cupy_of_numpy(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what CuPy says about a machine without CUDA
        cupy = pytest.importorskip("cupy", reason="CuPy is not installed: extra 'test' or 'cuda12'")
        ndimage = pytest.importorskip("cupyx.scipy.ndimage")
    xp = MakeBelieve(numpy, cupy)
    for module in (arrays, images, linalg, payloads, vectors):
        monkeypatch.setattr(module, "array_module", lambda: xp)
    monkeypatch.setattr(images, "scipy_module", lambda name: MakeBelieve(scipy.ndimage, ndimage))
    vectors.corpus.drop()
    yield xp
    vectors.corpus.drop()


def test_the_make_believe_catches_mistakes(cupy_of_numpy):
    device, host = cupy_of_numpy.asarray([1.0, 2.0]), numpy.ones(2)
    for mistake in (
        lambda: device + host,
        lambda: host * device,
        lambda: cupy_of_numpy.concatenate([device, host]),
        lambda: numpy.concatenate([device, device]),
        lambda: device.__array_interface__,
        lambda: cupy_of_numpy.clip(device, minimum=0),
    ):
        with pytest.raises(TypeError):
            mistake()
    with pytest.raises(AssertionError, match="cupy has no busday_count"):
        cupy_of_numpy.busday_count  # noqa: B018


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_a_body_uses_what_cupy_has_and_mixes_no_arrays(name, cupy_of_numpy, monkeypatch):
    result = app.tasks[name](*EXAMPLES[name])
    monkeypatch.undo()
    vectors.corpus.drop()
    assert result == app.tasks[name](*EXAMPLES[name])
