"""Runnable examples: `python -m examples.digits`."""

import os

# Before torch is imported: OpenMP threads that wait by spinning slow each other down tenfold as soon as anything else
# wants a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
