import base64
import io

import numpy
import pytest
from PIL import Image as pillow

from celery_app.tasks.arrays import power_spectrum, statistics
from celery_app.tasks.reports import contact_sheet, make_signal, summarise


def test_make_signal_is_its_tones():
    times = numpy.arange(250) / 500
    expected = numpy.sin(2 * numpy.pi * 20 * times) + numpy.sin(2 * numpy.pi * 60 * times)
    assert make_signal(0.5, 500, [20, 60], noise=0) == pytest.approx(expected.tolist())


def test_noise_has_its_deviation_and_depends_on_the_seed_alone():
    noise = make_signal(10, 1000, [], noise=0.5, seed=3)
    assert numpy.std(noise) == pytest.approx(0.5, rel=0.05)
    assert noise == make_signal(10, 1000, [], noise=0.5, seed=3)
    assert noise != make_signal(10, 1000, [], noise=0.5, seed=4)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [((0, 100), "0 samples"), ((1e9, 100), "1 to 1000000 are allowed"), ((1, 100, [50]), "below 50.0 Hz")],
)
def test_make_signal_refuses(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        make_signal(*arguments)


def test_cpu_to_gpu_to_cpu():
    signal = make_signal(1.0, 1000.0, [50.0], noise=0.0)
    assert power_spectrum(signal, 1000.0)["peak_hz"] == 50.0
    assert summarise(statistics(signal)).startswith("1000 values from -1 to 1: mean ")


def test_summarise_says_every_figure():
    stats = {"count": 3, "min": 1.0, "max": 9.0, "mean": 4.33333333, "std": 3.3993463, "median": 3.0}
    assert summarise(stats) == "3 values from 1 to 9: mean 4.333, standard deviation 3.399, median 3"
    assert summarise(stats | {"count": 1}).startswith("1 value from")


def test_summarise_names_what_is_missing():
    with pytest.raises(ValueError, match="stats lacks max, median"):
        summarise({"count": 3, "min": 1.0, "mean": 4.0, "std": 3.0})


@pytest.fixture
def pairs(tmp_path):
    """Three originals in red, as files, and their results in green, as payloads."""
    originals = []
    for number in range(3):
        originals.append(str(tmp_path / f"{number}.jpg"))
        pillow.new("RGB", (90, 60), "red").save(originals[-1])
    file = io.BytesIO()
    pillow.new("RGB", (90, 60), "lime").save(file, format="PNG")
    return originals, [base64.b64encode(file.getvalue()).decode()] * 3


def test_contact_sheet_shows_each_pair_side_by_side(pairs, tmp_path):
    originals, results = pairs
    target = tmp_path / "new" / "sheet.png"
    summary = contact_sheet(results, originals, ["One", "Two", "Three"], str(target))
    page = pillow.open(target)
    assert summary == {
        "path": str(target),
        "pictures": 3,
        "width": page.width,
        "height": page.height,
        "bytes": target.stat().st_size,
    }
    colours = {colour: count for count, colour in page.convert("RGB").getcolors(1 << 24)}
    for colour in ((254, 0, 0), (0, 255, 0)):
        assert colours[colour] == pytest.approx(3 * 420 * 300, rel=0.03)  # but for the tags upon them
    row = [page.getpixel((x, 200)) for x in range(page.width)]
    assert row.index((254, 0, 0)) < row.index((0, 255, 0))


def test_one_pair_makes_a_narrow_page(pairs, tmp_path):
    originals, results = pairs
    one = contact_sheet(results[:1], originals[:1], ["One"], str(tmp_path / "one.png"))
    three = contact_sheet(results, originals, ["One", "Two", "Three"], str(tmp_path / "three.png"))
    assert one["width"] < three["width"]
    assert one["height"] < three["height"]


def test_contact_sheet_refuses(pairs, tmp_path):
    originals, results = pairs
    with pytest.raises(ValueError, match="results is empty"):
        contact_sheet([], [], [], "sheet.png")
    with pytest.raises(ValueError, match="3 results, 3 originals and 1 captions"):
        contact_sheet(results, originals, ["One"], "sheet.png")
    with pytest.raises(ValueError, match=r"must end in \.png, got passwd"):
        contact_sheet(results, originals, ["a", "b", "c"], "/etc/passwd")
    with pytest.raises(FileNotFoundError):
        contact_sheet(results[:1], [str(tmp_path / "none.jpg")], ["a"], str(tmp_path / "sheet.png"))
    assert not (tmp_path / "sheet.png").exists()
