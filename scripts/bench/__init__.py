"""Benchmarks, with the libraries that they are measured against (torch, transformers); scripts/bench.py runs them."""
