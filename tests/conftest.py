"""Shared by all tests: one torch thread per process, because two busy OpenMP teams on two cores crawl."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
