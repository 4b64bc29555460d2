"""Benchmarks run on a model: resumable, on one process or many, with uncertainty and a record of how."""
