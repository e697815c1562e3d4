"""Benchmarks: one file per subject, one shared harness, results by device."""
