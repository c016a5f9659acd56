"""Runnable measurements; each writes a small file into `results/`."""
