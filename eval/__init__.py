"""Measures LENS models and baselines on retrieval data sets: `python eval/run.py --help`."""
