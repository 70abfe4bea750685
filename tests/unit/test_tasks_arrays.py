import numpy
import pytest

from celery_app.tasks.arrays import gpu_intensive_task, power_spectrum, statistics, total

DATA = numpy.random.default_rng(1).normal(3.0, 2.0, 501).tolist()


def test_gpu_intensive_task_is_the_sum_of_squares():
    result = gpu_intensive_task(DATA)
    assert type(result) is float
    assert result == pytest.approx(sum(value * value for value in DATA))


def test_total_is_the_sum():
    result = total(DATA)
    assert type(result) is float
    assert result == pytest.approx(sum(DATA))


def test_whole_numbers_are_computed_as_floats():
    assert gpu_intensive_task([4_000_000_000, 4_000_000_000]) == 3.2e19  # would overflow as 64-bit integers


def test_statistics_are_those_of_the_population():
    ordered = sorted(DATA)
    mean = sum(DATA) / 501
    assert statistics(DATA) == pytest.approx(
        {
            "count": 501,
            "mean": mean,
            "std": (sum((value - mean) ** 2 for value in DATA) / 501) ** 0.5,
            "min": ordered[0],
            "lower_quartile": ordered[125],
            "median": ordered[250],
            "upper_quartile": ordered[375],
            "max": ordered[-1],
        }
    )


def test_statistics_of_one_value():
    assert statistics([7]) == {
        "count": 1,
        "mean": 7.0,
        "std": 0.0,
        "min": 7.0,
        "lower_quartile": 7.0,
        "median": 7.0,
        "upper_quartile": 7.0,
        "max": 7.0,
    }


def test_power_spectrum_of_two_tones():
    rate, count = 1000.0, 500
    times = numpy.arange(count) / rate
    signal = 1.5 + 3 * numpy.sin(2 * numpy.pi * 50 * times) + numpy.sin(2 * numpy.pi * 120 * times)
    spectrum = power_spectrum(signal.tolist(), rate)
    power = dict(zip(spectrum["frequencies_hz"], spectrum["power"], strict=True))
    assert spectrum["peak_hz"] == pytest.approx(50)
    assert power[50.0] == pytest.approx(4.5)  # a sine of amplitude a has mean square a * a / 2
    assert power[120.0] == pytest.approx(0.5)
    assert power[0.0] == pytest.approx(1.5**2)


@pytest.mark.parametrize("count", [2, 3, 64, 65])
def test_power_sums_to_the_mean_square(count):
    signal = numpy.random.default_rng(count).standard_normal(count)
    spectrum = power_spectrum(signal.tolist(), 10.0)
    two_sided = numpy.abs(numpy.fft.fft(signal)) ** 2 / count**2
    assert sum(spectrum["power"]) == pytest.approx((signal**2).mean())
    assert spectrum["power"][1] == pytest.approx(two_sided[1] * (1 if count == 2 else 2))
    assert spectrum["frequencies_hz"] == pytest.approx([k * 10.0 / count for k in range(count // 2 + 1)])


@pytest.mark.parametrize("task", [gpu_intensive_task, total, statistics])
def test_empty_data_is_refused(task):
    with pytest.raises(ValueError, match="data is empty"):
        task([])


@pytest.mark.parametrize(("data", "rate", "reason"), [([1.0], 1.0, "at least 2"), ([1.0, 2.0], 0.0, "sample_rate_hz")])
def test_power_spectrum_refuses(data, rate, reason):
    with pytest.raises(ValueError, match=reason):
        power_spectrum(data, rate)
