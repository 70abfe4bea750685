"""GPU tasks on one list of numbers. All compute in float64."""

from typing import Annotated

from pydantic import Field

from bridge import Gpu, array_module
from celery_app.application import app
from celery_app.tasks.payloads import Numbers, vector_of

#: At warm-up, as long as real arrays: CuPy compiles reductions anew for longer ones.
_EXAMPLE = [float(number % 7) for number in range(10_000)]


@app.task(gpu=Gpu(example=(_EXAMPLE,)))
def gpu_intensive_task(data: Numbers) -> float:
    """The sum of squares of `data`.

    Raises:
        ValueError: `data` is empty.
    """
    values = vector_of(data, "data")
    return float((values * values).sum())


@app.task(gpu=Gpu(example=(_EXAMPLE,)))
def total(data: Numbers) -> float:
    """The sum of `data`.

    Raises:
        ValueError: `data` is empty.
    """
    return float(vector_of(data, "data").sum())


@app.task(gpu=Gpu(example=(_EXAMPLE,)))
def statistics(data: Numbers) -> dict[str, float]:
    """Key figures of `data`: count, mean, std (of the population), min, lower_quartile, median, upper_quartile, max.

    Raises:
        ValueError: `data` is empty.
    """
    xp = array_module()
    values = vector_of(data, "data")
    # The five quantiles come from one sort, and all figures leave the device in one copy.
    figures = xp.concatenate(
        [xp.stack([values.mean(), values.std()]), xp.percentile(values, xp.asarray([0.0, 25.0, 50.0, 75.0, 100.0]))]
    )
    names = ("mean", "std", "min", "lower_quartile", "median", "upper_quartile", "max")
    return {"count": len(data), **dict(zip(names, figures.tolist(), strict=True))}


@app.task(gpu=Gpu(example=(_EXAMPLE, 1.0)))
def power_spectrum(
    data: Annotated[Numbers, Field(min_length=2)], sample_rate_hz: Annotated[float, Field(gt=0, allow_inf_nan=False)]
) -> dict[str, float | list[float]]:
    """The one-sided power spectrum of a real signal.

    Args:
        data: samples at equal distances, 2 or more.
        sample_rate_hz: samples per second.

    Returns:
        frequencies_hz and power, lists of len(data) // 2 + 1 in ascending frequency, and peak_hz, the frequency with
        the most power above 0 Hz. Power is in the square of the data's unit; it sums to the mean square of `data`.

    Raises:
        ValueError: fewer than 2 samples, or a rate that is not above 0.
    """
    if len(data) < 2:
        raise ValueError(f"data has {len(data)} samples: a spectrum needs at least 2")
    if not sample_rate_hz > 0:
        raise ValueError(f"sample_rate_hz must be above 0, got {sample_rate_hz}")
    xp = array_module()
    power = xp.abs(xp.fft.rfft(vector_of(data, "data"))) ** 2 / len(data) ** 2
    # A real signal has its power half at negative frequencies; 0 Hz and, for even lengths, the last have no such twin.
    power[1 : (len(data) + 1) // 2] *= 2
    frequencies = xp.fft.rfftfreq(len(data), 1 / sample_rate_hz)
    return {
        "frequencies_hz": frequencies.tolist(),
        "power": power.tolist(),
        "peak_hz": float(frequencies[1 + int(power[1:].argmax())]),
    }
