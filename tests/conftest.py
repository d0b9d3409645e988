"""Fixtures: a home folder and database of a test's own, and a small model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from app import database, tables
from app.settings import settings
from tests import tiny

pytest_plugins = ["tests.servers"]


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
