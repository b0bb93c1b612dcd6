"""Shared settings of the tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Two OpenMP threads that spin on shared cores run many times slower than one; set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each of the test processes that share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.insert(0, str(Path(__file__).parent))
