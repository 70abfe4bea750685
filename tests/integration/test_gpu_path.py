"""The chain of `benchmarks.gpu` through a real executor, on NumPy: the way it takes, not what it counts."""

from benchmarks import gpu_path


def test_a_chain_runs_and_nothing_is_claimed_that_no_counter_has_seen():
    """On NumPy no step copies anything, so a counter that says 0 proves nothing; and PyTorch is not installed."""
    assert gpu_path.chain({"copy_mib": 1}, "cpu") == ({}, {})
