"""What the way to the GPU costs: `python -m benchmarks.noop`. Method and caveats are in README.md."""
