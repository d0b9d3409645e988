"""Fixtures: a home folder and database of a test's own, and a small model."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from app import database, tables
from app.settings import settings
from tests import tiny

pytest_plugins = ["tests.servers"]

# As the studio starts its own processes: threads that spin while they wait for each other take the
# processor from whatever else runs. Torch reads it when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
MEMORY = Path("/dev/shm")
LEAST_MEMORY = 8_000_000_000


def pytest_configure(config: pytest.Config) -> None:
    """Have the temporary folders in memory where there is plenty: nobody waits for a disk then."""
    if not config.option.basetemp and _free_memory() > LEAST_MEMORY:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def _free_memory() -> int:
    """Bytes of it that files may take and that are free; 0 where files cannot be there."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (available,) = (int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        return min(available * 1024, shutil.disk_usage(MEMORY).free)
    except (OSError, ValueError):
        return 0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty home folder with a fresh SQLite database in it."""
    monkeypatch.setattr(settings, "home", str(tmp_path / "home"))
    monkeypatch.setattr(settings, "database_url", "")
    database.engine.cache_clear()
    tables.Table.metadata.create_all(database.engine())
    yield tmp_path / "home"
    database.engine().dispose()
    database.engine.cache_clear()


@pytest.fixture
def db(home: Path) -> Iterator[Session]:
    """A session on the test's own database."""
    with database.session() as opened:
        yield opened


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama; read it only."""
    return tiny.model(tmp_path_factory.mktemp("tiny") / "llama")
