"""Arrays of other libraries and of no numbers: what becomes of them in a task's signature, in messages and stores."""

from typing import Annotated, Any

import numpy
import pytest
from celery.exceptions import SoftTimeLimitExceeded
from kombu.exceptions import EncodeError
from kombu.serialization import dumps, loads
from pydantic import TypeAdapter, ValidationError

from actors.contract import StoreConfig
from actors.data.arrays import ArraySpec, Inline
from actors.data.stores import Stores
from actors.executor.device import CpuDevice
from actors.executor.opening import Opener
from bridge import data
from bridge.errors import DataLost, StoreUnavailable

ARRAY = numpy.arange(3.0)
FLOATS = TypeAdapter(Annotated[Any, ArraySpec("float64")])


class Speaks:
    """An array that NumPy knows by DLPack alone, of a library that may not let it be read."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def __dlpack__(self, **options: Any) -> Any:
        if self.error is not None:
            raise self.error
        return ARRAY.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class OnAGpu:
    """As a CUDA array of PyTorch in a process without a GPU: its dtype is not NumPy's."""

    dtype, shape = "torch.float64", (3,)
    __cuda_array_interface__ = {"shape": (3,), "typestr": "<f8", "data": (1, False), "version": 3}

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")


class Shown:
    """As a picture of Pillow: it has NumPy's interface, and no dtype."""

    __array_interface__ = ARRAY.__array_interface__


class Cupys:
    """As CuPy's arrays: NumPy's functions take none unless asked to."""

    __module__ = "cupy"

    def __init__(self, array: Any) -> None:
        self.array, self.dtype, self.shape = array, array.dtype, array.shape

    def get(self) -> Any:
        return self.array

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return getattr(ufunc, method)(*[each.array for each in inputs], **options)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A store, of which nothing expires."""
    stores = Stores(None, StoreConfig(f"file://{tmp_path}/home"))
    monkeypatch.setattr(data, "_stores", lambda: stores)
    yield tmp_path / "home"
    data.settings.cache_clear()


def sent(value):
    content_type, encoding, text = dumps(value, "json")
    return loads(text, content_type, encoding, accept=["application/json"])


def test_what_numpy_can_read_is_an_array():
    for value in (Speaks(), Shown()):
        assert FLOATS.validate_python(value).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Speaks(BufferError("export it first")), "float64 of any shape, found Speaks, .* read here: export it first"),
        (Speaks(RuntimeError("requires grad")), "requires grad"),
        (OnAGpu(), "found OnAGpu, which cannot be read here: .*Use Tensor.cpu"),
    ],
    ids=["BufferError", "RuntimeError", "CUDA"],
)
def test_what_its_library_does_not_give_out_is_said(value, text):
    with pytest.raises(ValidationError, match=text):
        FLOATS.validate_python(value)


def test_a_soft_limit_within_a_library_is_no_broken_array():
    with pytest.raises(SoftTimeLimitExceeded):
        FLOATS.validate_python(Speaks(SoftTimeLimitExceeded()))


def test_a_cupy_array_is_looked_through_for_nan_too():
    wanted = ArraySpec("float64", None, True)
    assert wanted.read(Cupys(ARRAY)).array is ARRAY
    with pytest.raises(ValueError, match=r"found NaN or an infinity at \(1,\)"):
        wanted.read(Cupys(numpy.array([1, numpy.nan])))


@pytest.mark.parametrize("make", [lambda: Cupys(ARRAY), Speaks, lambda: ARRAY, ARRAY.tolist])
def test_they_are_put_as_what_they_hold(folder, make):
    assert data.get(data.put(make())).tolist() == [0, 1, 2]


def test_a_cupy_array_travels_in_messages(folder, monkeypatch):
    assert sent({"values": Cupys(ARRAY)})["values"].tolist() == [0, 1, 2] and not folder.exists()
    monkeypatch.setenv("BRIDGE_DATA_INLINE_BYTES", "10")
    data.settings.cache_clear()
    monkeypatch.setattr(data.arrays, "keeps_forms", True)
    assert sent(Cupys(ARRAY)).kind == "ref" and len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (numpy.array(["a", "b"]), "not of <U1; send a list"),
        (numpy.array(["2026-01-01"], "M8[D]"), r"not of datetime64\[D\]; send a list"),
        (numpy.array([None]), "not of object; send a list"),
        (numpy.ma.masked_array([1.0, 2.0], [0, 1]), "would lose its mask"),
    ],
    ids=["text", "dates", "objects", "masked"],
)
def test_what_no_reader_would_take_is_refused_where_it_is_sent(folder, array, text):
    """And not by whoever reads it, in a message that others wait for as well."""
    with pytest.raises(EncodeError, match=text):
        dumps({"result": array}, "json")
    with pytest.raises(ValueError, match=text):
        data.put(array)
    assert not folder.exists()


def test_a_store_that_takes_nothing_is_named_to_who_sends(monkeypatch):
    """kombu wraps whatever an encoder raises."""
    monkeypatch.setattr(data, "_stores", lambda: Stores(None, StoreConfig("redis://127.0.0.1:1")))
    with pytest.raises(EncodeError, match="Redis did not take 781") as caught:
        dumps([numpy.ones(100_000)], "json")
    assert isinstance(caught.value.args[0], StoreUnavailable)
    with pytest.raises(StoreUnavailable, match="Redis did not take"):
        data.put(ARRAY)


def test_a_result_that_holds_no_array_of_numbers_is_a_failure_of_its_own(monkeypatch):
    monkeypatch.setattr(data.arrays, "keeps_forms", False)
    found = sent({"status": "SUCCESS", "result": Inline.of(numpy.array(["a"])), "task_id": "1"})
    assert found["status"] == "FAILURE" and "only numbers and truth values" in str(found["result"])


def test_text_in_a_result_by_reference_is_a_list_and_leaves_nothing_in_the_store(folder):
    opener = Opener.__new__(Opener)
    opener.stores, opener._reach, opener._device, opener._made = data._stores(), _call, CpuDevice(""), []
    found = opener.stored({"names": numpy.array(["a", "b"]), "values": ARRAY})
    assert found["names"].tolist() == ["a", "b"] and data.get(found["values"]).tolist() == [0, 1, 2]
    assert len(list(folder.iterdir())) == 1


def _call(function: Any, *args: Any) -> Any:
    return function(*args)


@pytest.mark.parametrize("keep_s", [0, -1.0, float("inf"), float("nan")])
def test_a_time_to_live_that_means_nothing_is_refused(folder, keep_s):
    with pytest.raises(ValueError, match="keep_s is for how many seconds"):
        data.put(ARRAY, keep_s=keep_s)
    assert not folder.exists()


def test_nobody_makes_room_for_what_is_not_there():
    def lost():
        raise DataLost("it has expired")
        yield b""

    with pytest.raises(DataLost):  # and no MemoryError: there is no machine with a pebibyte
        CpuDevice("").receive(lost(), (1 << 50,), "|u1")
