"""What all tests share."""

import contextlib
import gc
import os

# Before diffrax is imported: it then compiles no Python callbacks, which JAX cannot cache.
os.environ.setdefault("EQX_ON_ERROR", "nan")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Programs, those of subprocesses too, compile fast and run slowly: most tests compile more than they
# compute. What users run is in the tests that use `optimised`, and in the heavy ones.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest


def pytest_configure(config):
    """Compiled code is kept in pytest's cache: a second run of the suite takes a fraction."""
    if config.option.collectonly:
        return
    folder = str(config.cache.mkdir("xla"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)  # of subprocesses
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_module():
    """Frees a module's compiled programs: each is several maps of memory, of which Linux gives a process
    65,530; a worker that had compiled for all modules crashed there."""
    yield
    gc.collect()
    jax.clear_caches()


@pytest.fixture(scope="module")
def x64():
    """Double precision for a whole module (use it in all of its tests)."""
    with jax.enable_x64(True):
        yield


@contextlib.contextmanager
def optimisations():
    """Programs compiled within are those that users run."""
    few = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
    jax.config.update("jax_disable_most_optimizations", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        yield
    jax.config.update("jax_disable_most_optimizations", few)


@pytest.fixture(scope="module")
def optimised():
    """`optimisations` for a whole module (use it in all of its tests)."""
    with optimisations():
        yield


@pytest.fixture(autouse=True)
def optimised_if_heavy(request):
    """`optimisations` for heavy tests, which compute more than they compile."""
    with optimisations() if request.node.get_closest_marker("heavy") else contextlib.nullcontext():
        yield


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """A cache folder of the module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELAXNET_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# The files that take longest, in this order: started first, so that no core idles at the end.
LONGEST = ("symmetry", "training", "potential", "cli", "predict", "options", "solver", "real_data")


def pytest_collection_modifyitems(config, items):
    """Long files first; heavy tests only when asked for (-m heavy, -m "heavy or not heavy")."""
    rank = {f"test_{name}": k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    if "heavy" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="heavy: run with pytest -m heavy")
    for item in items:
        if "heavy" in item.keywords:
            item.add_marker(skip)
