"""Benchmarks: ratios in one run, alternating, medians."""
