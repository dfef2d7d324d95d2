"""Fixtures of the benchmarks: the tests' tiny bundle, made the same way (and kept in SDRT_TEST_CACHE, if that is set).

    python -m pytest benchmarks/ --benchmark-columns=min,median,iqr,rounds

Measured here is what is ours; ``--benchmark-json``, ``--benchmark-autosave`` and ``--benchmark-compare`` keep figures.
"""

from tests.conftest import _store, bundle, checkpoint, cli, models, null

__all__ = ["_store", "bundle", "checkpoint", "cli", "models", "null"]
