"""Shared by all tests: one torch thread per process, because two busy OpenMP teams on two cores crawl; and property
tests are not judged by the clock.
"""

import os

from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("baton", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("baton")
