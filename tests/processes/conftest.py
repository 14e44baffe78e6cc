import pytest

from tests.processes.pool import Pool


@pytest.fixture(scope="session")
def pools():
    """Pools by their size; each starts with its first function."""
    found = {size: Pool(size) for size in (2, 4)}
    yield found
    for pool in found.values():
        pool.stop()
