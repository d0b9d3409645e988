"""Fixtures: the servers that the studio can work with, started for tests and ended after them."""

import ctypes
import getpass
import glob
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

import httpx
import pytest
import redis
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from app import database, queue, storage, tables, valkey
from app.settings import settings


def missing(what: str, how: str) -> NoReturn:
    """Leave the test out, saying why; with CI_ALL set it fails instead."""
    sentence = f"{what} is missing: {how}."
    if os.environ.get("CI_ALL"):
        pytest.fail(sentence)
    pytest.skip(sentence)


def wait_for(true: Callable[[], object], seconds: float = 30.0) -> bool:
    """Whether it became true in that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.02)
    return bool(true())


def at_once(script: str, count: int, seconds: float = 120.0) -> list[str]:
    """What each of so many processes says that run the script at the same moment.

    They work on the test's home and database; `name` is theirs, p0, p1 and so on. What they
    import must be imported up to the line "GO". Raises AssertionError with what one complains of.
    """
    waiting = "print('ready', flush=True); name = sys.stdin.readline().strip()"
    environment = {
        "STUDIO_HOME": settings.home,
        "STUDIO_DATABASE_URL": settings.database_url,
        "STUDIO_FILES_URL": settings.files_url,
        "PATH": "",
    } | {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    begun = [
        subprocess.Popen(
            [sys.executable, "-c", "import sys\n" + script.replace("GO", waiting)],
            cwd=storage.REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
            preexec_fn=partial(die_with_tests, signal.SIGKILL),
        )
        for _ in range(count)
    ]
    for process in begun:
        assert process.stdout
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    for number, process in enumerate(begun):
        assert process.stdin
        process.stdin.write(f"p{number}\n")
        process.stdin.flush()
    said = [process.communicate(timeout=seconds) for process in begun]
    for process, (_, complaint) in zip(begun, said, strict=True):
        assert process.returncode == 0, complaint
    return [out for out, _ in said]


def die_with_tests(number: signal.Signals = signal.SIGINT) -> None:
    """In a child: end when the tests are killed."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, number)


def _postgres_program(name: str) -> str:
    for path in sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"), reverse=True):
        return path
    return shutil.which(name) or missing("PostgreSQL", "install it with `apt install postgresql`")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """A temporary PostgreSQL on a unix socket; the URL of its databases, less their names."""
    with serving_postgres() as url:
        yield url


@contextmanager
def serving_postgres(password: str = "", options: Sequence[str] = ()) -> Iterator[str]:
    """A temporary PostgreSQL; with a password it listens on a port of this machine."""
    folder = Path(tempfile.mkdtemp(prefix="studio-pg-"))
    user = getpass.getuser()
    if os.getuid() == 0:  # PostgreSQL does not run as root
        user = "postgres"
        shutil.chown(folder, user, user)
    as_user = {"user": user, "group": user} if os.getuid() == 0 else {}
    url, where = _new_cluster(folder, password, as_user)
    with (folder / "log").open("w") as log:
        running = subprocess.Popen(
            [_postgres_program("postgres"), "-D", str(folder / "data"), "-F", *where, *options],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            preexec_fn=die_with_tests,
            **as_user,
        )
    admin = create_engine(url.format(name="postgres").replace("://", "+psycopg://"))
    try:
        assert wait_for(lambda: _answers(admin), 30), (folder / "log").read_text()
        yield url
    finally:
        admin.dispose()
        running.send_signal(signal.SIGQUIT)
        running.wait()
        shutil.rmtree(folder)


def _new_cluster(folder: Path, password: str, as_user: dict[str, str]) -> tuple[str, list[str]]:
    """Its URL, less the database's name, and the options that make the server listen there."""
    (folder / "password").write_text(password + "\n")
    how = ["scram-sha-256", "--pwfile", str(folder / "password")] if password else ["trust"]
    options = ["-D", str(folder / "data"), "-U", "studio", "-E", "UTF8", "--no-sync", "-A", *how]
    subprocess.run(
        [_postgres_program("initdb"), *options],
        check=True,
        capture_output=True,
        cwd=folder,
        **as_user,
    )
    if not password:
        return f"postgresql://studio@/{{name}}?host={folder}", ["-k", str(folder), "-h", ""]
    port = free_port()
    where = ["-k", str(folder), "-h", "127.0.0.1", "-p", str(port)]
    return f"postgresql://studio:{password}@127.0.0.1:{port}/{{name}}", where


def _answers(engine: object) -> bool:
    try:
        with engine.connect() as connection:  # type: ignore[attr-defined]
            connection.execute(text("SELECT 1"))
    except Exception:
        return False
    return True


def use_database(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    database.engine().dispose()
    monkeypatch.setattr(settings, "database_url", url)
    database.engine.cache_clear()


def new_database(server: str) -> str:
    """An empty database, which goes with its server; its URL."""
    name = f"test_{secrets.token_hex(4)}"
    admin = create_engine(
        server.format(name="postgres").replace("://", "+psycopg://"), isolation_level="AUTOCOMMIT"
    )
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    admin.dispose()
    return server.format(name=name)


@pytest.fixture
def empty_postgres(
    postgres_server: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The studio works on an empty database of PostgreSQL, without tables; its URL."""
    use_database(new_database(postgres_server), monkeypatch)
    yield settings.database_url
    database.engine().dispose()
    database.engine.cache_clear()


@pytest.fixture(scope="session")
def _postgres_with_tables(postgres_server: str) -> str:
    url = new_database(postgres_server)
    engine = create_engine(url.replace("://", "+psycopg://"))
    tables.Table.metadata.create_all(engine)
    engine.dispose()
    return url


@pytest.fixture
def postgres(
    _postgres_with_tables: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The studio works on PostgreSQL, its tables empty; the database's URL."""
    use_database(_postgres_with_tables, monkeypatch)
    yield _postgres_with_tables
    with database.session() as db:
        for table in reversed(tables.Table.metadata.sorted_tables):
            db.execute(table.delete())
        db.commit()
    database.engine().dispose()
    database.engine.cache_clear()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def any_db(request: pytest.FixtureRequest, home: Path) -> Iterator[Session]:
    """A session; the test runs once on SQLite and once on PostgreSQL."""
    if request.param == "postgres":
        request.getfixturevalue("postgres")
    with database.session() as opened:
        yield opened


def fresh_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget brokers of earlier tests."""
    queue.celery.cache_clear()
    monkeypatch.setattr(queue, "_silent_until", 0.0)


@pytest.fixture
def broker(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[redis.Redis]:
    """The embedded Valkey, running; a client of it."""
    monkeypatch.setattr(settings, "redis_url", "")
    fresh_queue(monkeypatch)
    valkey.start()
    client = redis.Redis.from_url(queue.redis_url())
    yield client
    client.close()
    queue.celery().close()
    valkey.stop()
    shutil.rmtree(storage.socket_folder(), ignore_errors=True)


@pytest.fixture
def redis_server(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[redis.Redis]:
    """The system's Redis, reached by URL and password as on several machines; a client of it."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        missing("Redis", "install it with `apt install redis-server`")
    port, password = free_port(), secrets.token_hex(8)
    options = ["--bind", "127.0.0.1", "--dir", str(tmp_path), "--requirepass", password]
    running = subprocess.Popen(
        [program, "--port", str(port), *options],
        stdout=subprocess.DEVNULL,
        preexec_fn=die_with_tests,
    )
    monkeypatch.setattr(settings, "redis_url", f"redis://:{password}@127.0.0.1:{port}/0")
    fresh_queue(monkeypatch)
    client = redis.Redis.from_url(settings.redis_url)
    assert wait_for(queue.is_up)
    yield client
    client.close()
    queue.celery().close()
    running.terminate()
    running.wait()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A stand-in for S3, with a bucket named "studio"; its address."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    httpx.put(f"http://{host}:{port}/studio")
    yield f"http://{host}:{port}"
    server.stop()


def use_s3(address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new folder there; its URL. Processes started from now on find it too."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return f"s3://studio/{secrets.token_hex(4)}"


@pytest.fixture(params=["file", "s3"])
def shared_store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The studio has a store for several machines: once a folder, once S3; its URL."""
    url = f"file://{tmp_path}/share"
    if request.param == "s3":
        url = use_s3(request.getfixturevalue("s3_server"), monkeypatch)
    monkeypatch.setattr(settings, "files_url", url)
    monkeypatch.setenv("STUDIO_FILES_URL", url)
    return url


class Machines:
    """Takes the test from one machine, with a home of its own, to another."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch

    def on(self, name: str) -> None:
        """Go there; processes started from now on are there too."""
        self.monkeypatch.setattr(settings, "home", str(self.folder / f"home-{name}"))
        self.monkeypatch.setenv("STUDIO_HOME", settings.home)


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    """Several machines: the database is one, the homes are many."""
    return Machines(tmp_path, monkeypatch)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])
