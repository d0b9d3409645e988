"""The plan of the house, checked against the code: who imports whom, what is where, how long."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from app.storage import REPOSITORY


class Import(NamedTuple):
    """A module of this project that another one imports."""

    source: str
    target: str
    at_load: bool  # not inside a function, and not for type checkers alone


def _name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


FILES = sorted([*(REPOSITORY / "app").rglob("*.py"), *(REPOSITORY / "worker").rglob("*.py")])
PATHS = {_name(path): path for path in FILES}
TREES = {name: ast.parse(path.read_text()) for name, path in PATHS.items()}
ROUTES = tuple(f"app.web.{folder}." for folder in ("routes", "api", "openai"))


def _own(name: str) -> bool:
    return name.split(".")[0] in {"app", "worker"}


def _at_load(node: ast.AST) -> Iterator[ast.stmt]:
    """Statements that run when the module is loaded."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.stmt):
            yield child
        yield from _at_load(child)


def _imported(statement: ast.AST) -> list[str]:
    """Dotted names that an import statement names: `from a import b` names a.b."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    if isinstance(statement, ast.ImportFrom):
        return [f"{statement.module}.{alias.name}" for alias in statement.names]
    return []


def _imports(name: str) -> Iterator[tuple[str, bool]]:
    """What a module imports, and whether when it is loaded."""
    loaded = set(map(id, _at_load(TREES[name])))
    for node in ast.walk(TREES[name]):
        for imported in _imported(node):
            yield imported, id(node) in loaded


def _module(imported: str) -> str:
    """The module of ours that a dotted name stands for or stands in."""
    return imported if imported in PATHS else imported.rpartition(".")[0]


OWN = [
    Import(name, _module(imported), at_load)
    for name in PATHS
    for imported, at_load in _imports(name)
    if _own(imported)
]


def test_relative_imports_are_not_used() -> None:
    """They would escape the tests below."""
    found = [
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert found == []


def test_every_import_of_ours_is_understood() -> None:
    assert {one.target for one in OWN} <= set(PATHS)
    assert len(OWN) > 200


# --- Who may import whom ----------------------------------------------------------------------


def _crossing(source: str, target: str) -> list[tuple[str, str]]:
    return [
        (one.source, one.target)
        for one in OWN
        if f"{one.source}.".startswith(source) and f"{one.target}.".startswith(target)
    ]


def test_the_studio_does_not_know_its_workers() -> None:
    assert _crossing("app.", "worker.") == []


def test_workers_do_not_know_the_web() -> None:
    assert _crossing("worker.", "app.web.") == []


def test_only_the_web_knows_http() -> None:
    assert [one for one in _crossing("app.", "app.web.") if not one[0].startswith("app.web")] == []
    http = {"fastapi", "starlette", "uvicorn", "jinja2"}
    found = [
        (name, imported)
        for name in PATHS
        if not name.startswith("app.web")
        for imported, _ in _imports(name)
        if imported.split(".")[0] in http
    ]
    # The chat formats of models are Jinja templates; they are filled in a sandbox.
    assert {name for name, _ in found} <= {"app.chat"}


def test_the_studio_loads_no_torch() -> None:
    heavy = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "gguf"}
    found = [
        (name, imported)
        for name in PATHS
        if name.startswith("app")
        for imported, at_load in _imports(name)
        if at_load and imported.split(".")[0] in heavy
    ]
    assert found == []


@pytest.mark.parametrize("module", ["app.web.main", "app.cli", "worker.tasks"])
def test_these_processes_never_hold_torch(module: str) -> None:
    """The web starts in a second; the worker's consumer beside a training process stays light."""
    script = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert loaded.isdisjoint({"torch", "transformers", "peft", "scipy", "nltk", "pandas"})


# From the ground up. A module may use those of lower floors; what it uses on its own floor is
# listed below. A name with a dot at its end stands for all modules of that folder.
FLOORS: list[set[str]] = [
    {"errors", "settings", "units"},
    {"storage", "processes"},
    {"file_store", "crashpoints", "fingerprints", "zips"},
    {"database", "files"},
    {
        "tables",
        "vote_tables",
        "worker_tables",
        "queue",
        "methods.",
        "examples",
        "example_columns",
        "example_files",
        "example_json",
        "example_lines",
        "prompts",
        "chat",
        "migrate",
        "valkey",
    },
    {"inspection"},
    {"snapshots", "datasets", "naming", "assignments"},
    {"questions", "capacity", "lengths", "pace", "rehearsals", "overlap", "grouping"},
    {"draws"},
    {"arithmetic", "calibration"},
    {"forecast"},
    {
        "runs",
        "space",
        "registry",
        "order",
        "claims",
        "workers",
        "points",
        "samples",
        "base_models",
        "tuned_models",
    },
    {"misfits", "verdicts"},
    {"admission"},
    {
        "comparison.",
        "experiments",
        "more_runs",
        "completions",
        "invariants",
        "schedule",
        "notices",
        "trash",
        "disk",
        "leftovers",
    },
    {"model_cards", "receipt_files", "results"},
    {"supervisor", "tuning", "adding", "backups", "restores", "doctor", "holdings", "receipts"},
    {"commands"},
    {"cli", "web."},
]
SAME_FLOOR = {
    ("tables", "vote_tables"),
    ("tables", "worker_tables"),
    ("valkey", "queue"),  # where the socket is
    ("prompts", "chat"),
    ("prompts", "examples"),
    ("examples", "example_columns"),
    ("examples", "example_files"),
    ("examples", "example_json"),
    ("examples", "example_lines"),
    ("example_files", "example_columns"),
    ("example_files", "example_json"),
    ("example_files", "example_lines"),
    ("example_json", "example_lines"),
    ("more_runs", "experiments"),  # what they are added to
    ("claims", "space"),  # a sweep puts back what waited for room on the disk
    ("space", "runs"),
    ("registry", "runs"),
    ("claims", "runs"),  # a claim is a move of a run
    ("claims", "order"),  # nothing is claimed while the queue is held
    ("order", "runs"),  # what has a place in the queue
    ("points", "runs"),  # a point is stored only while its run is held
    ("samples", "runs"),  # likewise
    ("workers", "claims"),  # for the clock that several machines share
    ("doctor", "supervisor"),  # whether there should be a broker
    ("restores", "supervisor"),  # not while a studio runs
    ("restores", "backups"),  # what a backup looks like
    ("adding", "tuning"),  # it follows runs the same way
    ("tuning", "supervisor"),  # `studio tune` starts workers of its own if none run
}


def _floor(name: str) -> int:
    """Raises AssertionError for a module that has no floor yet: give it one."""
    for number, floor in enumerate(FLOORS):
        if name in floor or any(one[-1] == "." and f"{name}.".startswith(one) for one in floor):
            return number
    raise AssertionError(f"app.{name} has no floor")


def _together(source: str, target: str) -> bool:
    """Both in the same folder of the studio, which is one floor by itself."""
    return source.split(".")[0] == target.split(".")[0]


def test_arrows_go_down() -> None:
    wrong, used = [], set()
    for one in OWN:
        source, target = one.source.removeprefix("app."), one.target.removeprefix("app.")
        if "app" in {source, target} or one.source.startswith("worker") or source == target:
            continue
        if _together(source, target):
            continue
        if (source, target) in SAME_FLOOR:
            used.add((source, target))
        elif _floor(target) >= _floor(source):
            wrong.append((source, target))
    assert wrong == []
    assert used == SAME_FLOOR  # what is no longer needed is no longer allowed


def test_no_two_modules_need_each_other() -> None:
    needs: dict[str, set[str]] = {name: set() for name in PATHS}
    for one in OWN:
        if one.at_load and one.source != one.target:
            needs[one.source].add(one.target)
    while ready := [name for name, rest in needs.items() if not rest]:
        for name in ready:
            del needs[name]
        for rest in needs.values():
            rest.difference_update(ready)
    assert needs == {}


def test_routes_are_leaves() -> None:
    """They do not use each other, and nothing uses them but the application."""
    found = {
        (one.source, one.target)
        for one in OWN
        if one.target.startswith(ROUTES)
        and one.source not in {"app.web.main", one.target.rpartition(".")[0]}
    }
    # The JSON of an experiment holds the JSON of its runs.
    assert found - {("app.web.api.experiments", "app.web.api.runs")} == set()


# --- What is where ----------------------------------------------------------------------------


def _uses(name: str, *dotted: str) -> list[str]:
    """Which of these names, such as os.environ, the module uses."""
    imported = {found for found, _ in _imports(name)}
    written = {
        ast.unparse(node) for node in ast.walk(TREES[name]) if isinstance(node, ast.Attribute)
    }
    return [one for one in dotted if one in written | imported]


def test_only_storage_joins_paths() -> None:
    found = {
        name
        for name in PATHS
        if _uses(name, "os.path", "os.path.join")
        or any(imported.split(".")[0] in {"pathlib", "glob"} for imported, _ in _imports(name))
    }
    assert found == {"app.storage"}


# Who writes, deletes or counts these files. Whoever reads them asks `files`, which fetches what is
# on another machine.
WRITERS = {
    "dataset_file": {
        "app.backups",
        "app.datasets",
        "app.holdings",
        "app.invariants",
        "app.trash",
    },
    "base_model_folder": {
        "app.backups",
        "app.doctor",
        "app.holdings",
        "app.trash",
        "app.web.snippets",
        "worker.prepare",
    },
    "tuned_model_folder": {
        "app.holdings",
        "app.invariants",
        "worker.recorder",
        "worker.run",
        "worker.sharing",
    },
    "last_model_folder": {"app.holdings", "app.invariants", "worker.recorder"},
    "whole_model_folder": {"app.holdings", "worker.export"},
}


def test_shared_files_are_read_through_the_store() -> None:
    for place, writers in WRITERS.items():
        users = {name for name in PATHS if _uses(name, f"storage.{place}")}
        assert users == writers | {"app.files"}, place


def test_only_settings_read_the_environment() -> None:
    readers = {
        name for name in PATHS if _uses(name, "os.environ", "os.getenv", "os.environb", "os.putenv")
    }
    assert readers == {"app.processes"}  # hands it on to children, with who their parent is
    assert "BaseSettings" in PATHS["app.settings"].read_text()


def test_only_the_queue_knows_celerys_settings() -> None:
    users = {
        name
        for name in PATHS
        if any(imported.split(".")[0] in {"celery", "kombu"} for imported, _ in _imports(name))
    }
    assert users == {"app.queue"}
    setters = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in {"conf", "config_from_object"}
    }
    assert setters == {"app.queue"}


def test_routes_hold_no_query() -> None:
    asking = {"execute", "scalar", "scalars", "query", "add", "commit", "flush", "delete"}
    found = [
        (name, ast.unparse(node))
        for name, tree in TREES.items()
        if name.startswith("app.web")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in asking
        and ast.unparse(node.func.value) in {"db", "session"}
    ]
    found += [
        (name, imported)
        for name in PATHS
        if name.startswith("app.web")
        for imported, _ in _imports(name)
        if imported.startswith("sqlalchemy.")
        and not imported.startswith(("sqlalchemy.exc.", "sqlalchemy.orm.Session"))
    ]
    assert found == []


def test_every_process_we_start_dies_with_who_started_it() -> None:
    """Each module that is started as a process asks for that first thing in its main function."""
    starters = ("worker.tuner", "worker.generator", "worker.launch", "app.supervisor")
    text = "".join(PATHS[name].read_text() for name in starters)
    started = {name for name in PATHS if f'"{name}"' in text}
    assert started >= {"worker.run", "worker.answer", "worker.prepare", "worker.export"}
    assert started >= {"worker.tasks", "worker.rank", "app.web.serve"}
    for name in started:
        (main,) = [node for node in TREES[name].body if getattr(node, "name", "") == "main"]
        assert "processes.die_with_parent(signal." in ast.unparse(main), name


# --- Safety -----------------------------------------------------------------------------------


def _calls() -> Iterator[tuple[str, ast.Call, str]]:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield name, node, ast.unparse(node.func)


def test_no_code_of_a_model_is_ever_run() -> None:
    """Every call that could run a downloaded model's code says that it must not."""
    num_calls, wrong = 0, []
    for name, call, function in _calls():
        owner, _, method = function.rpartition(".")
        if method not in {"from_pretrained", "from_config"} or owner.endswith("PeftModel"):
            continue  # an adapter holds no code
        num_calls += 1
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if given.get("trust_remote_code") != "False":
            wrong.append(f"{name}:{call.lineno}")
    assert wrong == []
    assert num_calls >= 4
    assert not [name for name in PATHS if "trust_remote_code=True" in PATHS[name].read_text()]


def test_no_format_is_read_that_can_hold_code() -> None:
    unsafe = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
    found = [
        (name, imported)
        for name in PATHS
        for imported, _ in _imports(name)
        if imported.split(".")[0] in unsafe
    ]
    found += [
        (name, function)
        for name, _, function in _calls()
        if function in {"torch.load", "torch.save", "eval", "exec", "numpy.load", "np.load"}
        or function in {"os.system", "os.popen", "yaml.load"}
    ]
    found += [
        (name, function)
        for name, call, function in _calls()
        if any(keyword.arg == "shell" for keyword in call.keywords)
    ]
    assert found == []


# --- Size and form ----------------------------------------------------------------------------

LONGEST_FILE, LONGEST_FUNCTION, LONGEST_HANDLER, MOST_SCRIPT = 250, 40, 12, 650
THE_LOOP = "worker.train"


def _functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield name, node


def _lines(statements: list[ast.stmt]) -> int:
    return (statements[-1].end_lineno or 0) - statements[0].lineno + 1 if statements else 0


def test_files_are_short() -> None:
    sizes = {name: len(path.read_text().splitlines()) for name, path in PATHS.items()}
    assert {name: size for name, size in sizes.items() if size > LONGEST_FILE} == {}


def test_functions_are_short() -> None:
    long = {
        f"{name}.{function.name}": _lines([function])
        for name, function in _functions()
        if _lines([function]) > LONGEST_FUNCTION and name != THE_LOOP
    }
    assert long == {}


def _is_handler(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    verbs = {"get", "post", "put", "patch", "delete", "head", "api_route"}
    return any(
        isinstance(decorator, ast.Call)
        and isinstance(decorator.func, ast.Attribute)
        and decorator.func.attr in verbs
        for decorator in function.decorator_list
    )


def test_handlers_are_short() -> None:
    handlers = [
        (name, function)
        for name, function in _functions()
        if name.startswith("app.web") and _is_handler(function)
    ]
    assert len(handlers) > 10
    long = {}
    for name, function in handlers:
        body = function.body[1:] if ast.get_docstring(function) else function.body
        if _lines(body) > LONGEST_HANDLER:
            long[f"{name}.{function.name}"] = _lines(body)
    assert long == {}


def test_handlers_that_touch_the_database_are_not_async() -> None:
    """A query in an async handler would hold up everybody; streams look into threads."""
    found = [
        f"{name}.{function.name}"
        for name, function in _functions()
        if isinstance(function, ast.AsyncFunctionDef)
        and _is_handler(function)
        and any("Db" in ast.unparse(one.annotation) for one in function.args.args if one.annotation)
    ]
    assert found == []


def test_every_module_says_its_duty() -> None:
    assert [name for name, tree in TREES.items() if not ast.get_docstring(tree)] == []
    for path in (REPOSITORY / "migrations").rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_no_class_is_called_what_says_nothing() -> None:
    empty = ("Manager", "Helper", "Utils", "Handler")
    found = [
        node.name
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith(empty)
    ]
    assert found == []


def test_own_scripts_are_few() -> None:
    scripts = list((REPOSITORY / "static").glob("*.js"))
    assert scripts
    assert sum(len(path.read_text().splitlines()) for path in scripts) < MOST_SCRIPT


# In these folders every file is one of a kind: the tree names the folder.
ALIKE = ("app/methods", "app/web/routes", "app/web/api", "app/web/openai")


@pytest.mark.skipif(not (REPOSITORY / "README.md").exists(), reason="There is no README.md yet.")
def test_the_readmes_tree_names_every_module() -> None:
    tree = (REPOSITORY / "README.md").read_text().partition("## The tree")[2]
    wanted = set()
    for path in FILES:
        place = path.relative_to(REPOSITORY)
        alike = next((folder for folder in ALIKE if str(place).startswith(f"{folder}/")), None)
        wanted.add(f"{Path(alike).name}/" if alike else place.name)
    wanted.discard("__init__.py")
    assert sorted(name for name in wanted if name not in tree) == []
