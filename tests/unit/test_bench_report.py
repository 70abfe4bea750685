"""What the benchmarks make of their samples: pure parts only; tests/integration/test_benchmarks.py runs them."""

import importlib
import json
from contextlib import ExitStack

import pytest

from benchmarks.__main__ import NAMES
from benchmarks.approaches import APPROACHES, BASELINES, chosen
from benchmarks.batching import Run, batches
from benchmarks.cpu import Kind, Usage, spent
from benchmarks.noop import targets as noop_targets
from benchmarks.records import Record, across, lanes_of, noise, over, pooled, ratio, record_table, summary_of
from benchmarks.report import as_json, failures, kind_table, number, ratio_table, remarks, report, show, table
from benchmarks.run import Benchmark, parse
from benchmarks.runs import Ran, busy_share, by_executor, gaps_ms, in_slices, runs_of, shared_window, used_s
from benchmarks.samples import Sample, Spread, percentile, spread, summarise
from benchmarks.session import Session, rotated
from benchmarks.targets import at_least, at_most, target_table

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
    summary = [s.model_dump() for s in summarise(samples, TITLES, BASELINES)]
    text = as_json({"benchmark": "noop"}, summary, [s.model_dump() for s in samples])
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
    from benchmarks.readme import RESULT, data_table, gpu_table, stored, stored_gpu, table, targets_table

    readme, results = (RESULT.parents[2] / "README.md").read_text(), stored()
    tables = table(results["noop"]), targets_table(results), data_table(results["data"]), gpu_table(stored_gpu())
    for wanted in tables:
        assert wanted in readme, "run `python -m benchmarks.readme` and paste its tables"


def benchmark_of(name):
    """The one `Benchmark` that a module defines."""
    module = importlib.import_module(f"benchmarks.{name}")
    (found,) = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Benchmark) and value.__module__ == module.__name__
    ]
    return found()


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_has_a_name_unique_lanes_and_sizes_that_options_can_set(name):
    benchmark = benchmark_of(name)
    lanes = [a.name for a in benchmark.approaches]
    assert benchmark.name == name and benchmark.title
    assert len(set(lanes)) == len(lanes)
    assert all(0 <= a.cluster < len(benchmark.gpus) for a in benchmark.approaches)
    assert all(usual <= full for usual, _, full in benchmark.sizes.values())
    usual, quick = parse(benchmark, []), parse(benchmark, ["--quick", "--rounds", "7"])
    assert usual.name == name and usual.size == {key: values[0] for key, values in benchmark.sizes.items()}
    assert quick.name == f"{name}-quick" and quick.size["rounds"] == 7


def test_an_unknown_lane_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(benchmark_of("waiting"), ["--only", "nonsense"])
    assert "there are bridge, blocking-ray, prefork" in capsys.readouterr().err


def test_a_target_is_judged_by_its_median_and_a_missing_measurement_is_neither():
    assert at_most("a", Spread(0.9, 0.5, 2.0), 0.9).verdict == "met"
    assert at_most("a", Spread(0.91, 0.5, 2.0), 0.9).verdict == "missed"
    assert at_least("a", Spread(1.15, 0.5, 2.0), 1.15).verdict == "met"
    assert at_least("a", Spread(1.14, 0.5, 2.0), 1.15).verdict == "missed"
    assert at_least("a", None, 1.15).verdict == "not measured"


def test_the_table_of_targets_shows_what_was_asked_and_measured():
    shown = target_table([at_most("cost", Spread(1.2344, 1.0, 3.0), 0.9), at_least("speed", None, 2, "x", True)])
    _, _, first, second = shown.splitlines()
    assert first.split() == ["cost", "<=", "0.9", "x", "1.234", "(1.000..3.00)", "MISSED"]
    assert second.split() == ["speed", ">=", "2", "x", "(chosen)", "-", "NOT", "MEASURED"]
    assert target_table([]) == ""


def test_the_noops_targets_compare_within_rounds_and_latency_by_difference():
    samples = [
        sample("prefork", 1, seconds=1.0, latencies_ms=[2.0]),
        sample("bridge", 1, seconds=0.5, cpu_ms={"worker": 0.8}, latencies_ms=[3.0]),
        sample("prefork", 2, seconds=2.0, latencies_ms=[4.0]),
        sample("bridge", 2, seconds=1.0, cpu_ms={"worker": 0.8}, latencies_ms=[5.0]),
    ]
    cpu, throughput, ray_cpu, ray_throughput, p50 = noop_targets(samples)
    assert cpu.measured == Spread(0.8, 0.8, 0.8) and cpu.verdict == "met"
    assert throughput.measured == Spread(2.0, 2.0, 2.0)
    assert ray_cpu.measured is None and ray_throughput.verdict == "not measured"
    assert p50.measured == Spread(1.0, 1.0, 1.0) and p50.unit == "ms"


def record(lane, round, lists=None, **figures):
    return Record(lane=lane, round=round, figures=figures, lists=lists or {})


RECORDS = [
    record("bridge", 1, {"ms": [1.0, 2.0]}, rate=10.0, cost=1.0),
    record("plain", 1, rate=5.0),
    record("bridge", 2, {"ms": [3.0]}, rate=30.0),
    record("plain", 2, rate=10.0),
    record("bridge", 3, rate=20.0),
]


def test_records_are_summed_up_over_rounds():
    assert over(RECORDS, "bridge", "rate") == Spread(20.0, 10.0, 30.0)
    assert over(RECORDS, "bridge", "cost") == Spread(1.0, 1.0, 1.0)
    assert over(RECORDS, "nobody", "rate") is None
    assert ratio(RECORDS, "rate", "bridge", "plain") == Spread(2.5, 2.0, 3.0)
    assert across(RECORDS, lambda mine: mine["bridge"]["rate"], ("bridge", "nobody")) is None
    assert pooled(RECORDS, "bridge", "ms") == [1.0, 2.0, 3.0]
    assert lanes_of(RECORDS) == ["bridge", "plain"]
    assert summary_of(RECORDS)[1] == {"lane": "plain", "rate": Spread(7.5, 5.0, 10.0)}


def test_a_table_of_records_has_a_row_for_each_lane_that_was_measured():
    titles = {"plain": "Plain", "bridge": "Bridge", "nobody": "Nobody"}
    head, _, *rows = record_table(RECORDS, titles, {"rate": "tasks/s", "cost": "CPU"}, "lane").splitlines()
    assert head.split() == ["lane", "tasks/s", "CPU"]
    assert [row.split()[0] for row in rows] == ["Plain", "Bridge"]
    assert rows[0].endswith("-")


def test_a_round_in_which_the_clock_saw_nothing_of_the_baseline_gives_no_ratio():
    def round_of(number, mine, base):
        return [Record(lane=lane, round=number, figures={"cpu": cpu}) for lane, cpu in [("mine", mine), ("base", base)]]

    records = round_of(1, 10.0, 0.0) + round_of(2, 30.0, 10.0)
    assert ratio(records, "cpu", "mine", "base") == (3.0, 3.0, 3.0)
    assert ratio(records[:2], "cpu", "mine", "base") is None


def test_noise_says_when_ratios_only_can_be_trusted():
    assert "trust ratios only" in noise([0.2, 0.3], 0.1)
    assert "trust" not in noise([0.05, 0.3, 0.0], 0.1)
    assert noise([], 0.1) == ""


def test_runs_of_a_batch_are_counted_once_and_stand_in_order():
    values = [[2, 5.0, 6.0, 7], [2, 5.0, 6.0, 7], [1, 1.0, 2.0, 8]]
    assert runs_of(values) == [Ran(1.0, 2.0, 8), Ran(5.0, 6.0, 7)]
    assert batches(values) == [Run(1.0, 2.0, 1), Run(5.0, 6.0, 2)]
    assert by_executor(runs_of(values)) == {8: [Ran(1.0, 2.0, 8)], 7: [Ran(5.0, 6.0, 7)]}


def test_the_busy_share_ends_with_the_last_beginning():
    """Two executors, the second idle for half of the time until the last body began; what runs out is not counted."""
    runs = runs_of([[0, 0.0, 1.0, 1], [0, 0.0, 1.0, 2], [0, 1.0, 2.0, 1], [0, 2.0, 3.0, 1]])
    assert busy_share(runs, 2) == pytest.approx(0.75)
    assert busy_share(runs[:1], 2) == 1.0
    assert gaps_ms(runs) == [0.0, 0.0]


def test_shares_of_two_workers_count_while_both_have_work():
    first, second = [Ran(0.0, 1.0, 1), Ran(1.0, 4.0, 1)], [Ran(0.5, 2.0, 2), Ran(3.0, 4.0, 2)]
    window = shared_window(first, second)
    assert window == (0.5, 1.0)
    assert used_s(first, *window) == pytest.approx(0.5)
    assert used_s(second, *window) == pytest.approx(0.5)


def test_the_course_of_a_round_is_cut_into_slices():
    seconds, shares = in_slices([Ran(10.0, 11.0, 1), Ran(11.0, 12.0, 2)], 2, slices=4)
    assert seconds == [0.0, 0.5, 1.0, 1.5]
    assert shares == pytest.approx([50.0] * 4)


def test_a_lane_that_fails_is_dropped_and_the_others_go_on(tmp_path):
    session, measured = Session(ExitStack(), tmp_path), []
    session.lanes = {"good": "good", "bad": "bad"}

    def measure(round, lane):
        if lane == "bad" and round == 2:
            raise RuntimeError("its worker has ended")
        measured.append((round, lane))

    session.rounds(3, measure)
    assert measured == [(1, "bad"), (1, "good"), (2, "good"), (3, "good")]
    assert session.failed == {"bad": "RuntimeError: its worker has ended"}
