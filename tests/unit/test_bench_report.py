"""What the benchmark makes of its samples: pure parts only; the run itself is `python -m benchmarks.noop --quick`."""

import json

import pytest

from benchmarks.approaches import APPROACHES, BASELINES, chosen
from benchmarks.cpu import Kind, Usage, spent
from benchmarks.noop import rotated
from benchmarks.report import as_json, failures, kind_table, number, ratio_table, remarks, report, show, table
from benchmarks.samples import Sample, Spread, percentile, spread, summarise

TITLES = {"prefork": "plain", "bridge": "this bridge"}


def sample(approach="prefork", round=1, seconds=1.0, cpu_ms=None, **other) -> Sample:
    fields = {
        "tasks": 1000,
        "latencies_ms": [1.0, 2.0, 3.0, 4.0],
        "alone_cpu_ms": {"worker": 1.5},
        "producer_cpu_ms": 0.3,
        "foreign_share": 0.0,
    }
    return Sample(approach=approach, round=round, seconds=seconds, cpu_ms=cpu_ms or {"worker": 1.0}, **(fields | other))


def test_spread_is_the_median_with_the_extremes():
    assert spread([3.0, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0)
    assert spread([1.0, 2.0]) == Spread(1.5, 1.0, 2.0)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.95, 95), (0.0, 1), (1.0, 100)])
def test_percentile_is_a_value_that_was_measured(share, expected):
    assert percentile(list(range(100, 0, -1)), share) == expected


def test_percentile_of_few_values():
    assert percentile([7.0], 0.95) == 7.0
    assert percentile([1.0, 2.0, 3.0], 0.95) == 3.0


def test_ratios_are_taken_within_a_round_so_that_noise_cancels():
    """Round 2 was twice as slow for everyone: the ratio does not change."""
    samples = [
        sample("prefork", 1, seconds=1.0, cpu_ms={"worker": 1.0}),
        sample("bridge", 1, seconds=2.0, cpu_ms={"worker": 1.0, "driver": 0.5}),
        sample("prefork", 2, seconds=2.0, cpu_ms={"worker": 2.0}),
        sample("bridge", 2, seconds=4.0, cpu_ms={"worker": 2.0, "driver": 1.0}),
    ]
    plain, bridge = summarise(samples, TITLES, ["prefork"])
    assert bridge.cpu_ratio == {"prefork": Spread(1.5, 1.5, 1.5)}
    assert bridge.throughput_ratio == {"prefork": Spread(0.5, 0.5, 0.5)}
    assert plain.cpu_ratio == {"prefork": Spread(1.0, 1.0, 1.0)}
    assert bridge.cpu_ms == Spread(2.25, 1.5, 3.0)
    assert bridge.cpu_ms_by_kind == {"worker": 1.5, "driver": 0.75}


def test_rounds_that_the_baseline_missed_do_not_count_for_ratios():
    samples = [sample("bridge", 1), sample("bridge", 2, cpu_ms={"worker": 3.0}), sample("prefork", 2)]
    _, bridge = summarise(samples, TITLES, ["prefork"])
    assert bridge.cpu_ratio["prefork"].median == 3.0


def test_a_missing_baseline_costs_the_ratio_only():
    (bridge,) = summarise([sample("bridge")], TITLES, ["prefork"])
    assert bridge.cpu_ratio == {}
    assert ratio_table([bridge]) == ""
    assert "this bridge" in report([bridge], [sample("bridge")], {})


def test_a_table_lines_up():
    assert table(["name", "n"], [["a", "1"], ["longer", "1000"]]).splitlines() == [
        "name       n",
        "------  ----",
        "a          1",
        "longer  1000",
    ]


def test_kinds_stand_in_the_order_of_a_tasks_way_and_idle_time_is_summed():
    summaries = summarise([sample("bridge", cpu_ms={"redis": 0.1, "driver": 0.4, "worker": 0.5})], TITLES, [])
    head, _, row = kind_table(summaries, {"bridge": {"ray": 20.0, "actor": 5.0}}).splitlines()
    assert head.split()[-5:] == ["worker", "driver", "redis", "idle", "ms/s"]
    assert row.split()[-4:] == ["0.50", "0.40", "0.10", "25.0"]


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (0.123, "0.12"), (12.34, "12.3"), (1234.5, "1234")])
def test_numbers_show_about_three_digits(value, text):
    assert number(value) == text


def test_a_spread_shows_its_extremes_and_a_missing_one_a_dash():
    assert show(Spread(1.0, 0.5, 20.0)) == "1.00 (0.50..20.0)"
    assert show(None) == "-"


def test_a_busy_machine_is_said_so():
    assert "not quiet" in remarks([sample(foreign_share=0.4)])
    assert "not quiet" not in remarks([sample(foreign_share=0.05)])
    assert remarks([]) == ""


def test_failures_name_the_approach_and_show_the_log():
    assert failures({"bridge": "exit code 72\nlast line"}) == "FAILED bridge: exit code 72\nlast line"


def test_the_json_holds_every_sample_on_a_line_of_its_own():
    samples = [sample("prefork"), sample("bridge")]
    text = as_json({"benchmark": "noop"}, summarise(samples, TITLES, BASELINES), samples)
    document = json.loads(text)
    assert [Sample(**s) for s in document["samples"]] == samples
    assert document["benchmark"] == "noop"
    assert sum('"latencies_ms"' in line for line in text.splitlines()) == 2


def test_cpu_of_processes_that_came_and_went_is_counted_once():
    """A child that was there before ended in between: its whole life is in what its parent has reaped."""
    before = {(1, 0.0): Usage(Kind.WORKER, 5.0, 0.0), (2, 0.0): Usage(Kind.CHILD, 3.0, 0.0)}
    after = {(1, 0.0): Usage(Kind.WORKER, 6.0, 3.5), (3, 0.0): Usage(Kind.CHILD, 0.25, 0.0)}
    assert spent(before, after) == {Kind.WORKER: 1.0, Kind.SPAWNED: 0.5, Kind.CHILD: 0.25}


def test_what_rays_processes_reap_is_not_counted():
    before = {(1, 0.0): Usage(Kind.RAY, 5.0, 0.0), (2, 0.0): Usage(Kind.RAY, 3.0, 0.0)}
    after = {(1, 0.0): Usage(Kind.RAY, 5.5, 3.0)}
    assert spent(before, after) == {Kind.RAY: 0.5}


def test_each_round_begins_with_another_approach():
    assert [rotated(["a", "b", "c"], n)[0] for n in range(4)] == ["a", "b", "c", "a"]
    assert rotated([], 1) == []


def test_approaches_are_chosen_by_name():
    assert chosen("") == APPROACHES
    assert [a.name for a in chosen("bridge, prefork")] == ["bridge", "prefork"]
    with pytest.raises(ValueError, match=r"no approach is called nonsense; there are prefork, "):
        chosen("prefork,nonsense")


def test_names_of_approaches_are_unique_and_baselines_are_among_them():
    names = [a.name for a in APPROACHES]
    assert len(set(names)) == len(names)
    assert set(BASELINES) <= set(names)


def test_the_readme_quotes_the_stored_result():
    from benchmarks.readme import RESULT, table

    readme = (RESULT.parents[2] / "README.md").read_text()
    assert table(json.loads(RESULT.read_text())) in readme, "run `python -m benchmarks.readme` and paste its table"
