"""What every case needs: the plant, and a tiny model that learns."""

from pathlib import Path

import pytest

from tests import tiny
from tests.faults.plant import plant as plant


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose validation loss falls for a while."""
    return tiny.model(tmp_path_factory.mktemp("faults") / "llama", initializer_range=0.15)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real processes on a busy machine take their time."""
    for item in items:
        if "faults" in item.path.parts:
            item.add_marker(pytest.mark.timeout(3600 if item.get_closest_marker("faults") else 900))
