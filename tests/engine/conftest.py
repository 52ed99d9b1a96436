"""Engines on a CPU, whose self-tests compute what they compare with."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_references(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the self-test keeps from earlier times is kept for the session alone: what computes it must work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
