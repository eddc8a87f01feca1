"""What all tests share."""

import jax
import pytest


def pytest_configure(config):
    """Compiled code is kept in pytest's cache: a second run of the suite takes a fraction."""
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="module")
def x64():
    """Double precision for a whole module (use it in all of its tests)."""
    with jax.enable_x64(True):
        yield
