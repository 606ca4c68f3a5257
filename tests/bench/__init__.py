"""Benchmarks: Headway beside its peers, interleaved in one run. How to run each, and the last figures: README.md."""
