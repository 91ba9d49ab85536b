"""Background work: each worker is a list of jobs that one process at a time runs; see ``runner.py``."""
