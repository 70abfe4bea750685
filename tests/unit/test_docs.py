"""The documents say what the code says: settings, exit codes, links, files, functions, commands."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from celery import Celery
from celery.bin.celery import celery as celery_command
from celery.worker.control import Panel

from actors import contract
from bridge import errors
from bridge.driver import loop
from bridge.marks import find_marks
from bridge.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
OWN = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs", "examples", "benchmarks")
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def _documents():
    for name in OWN:
        path = ROOT / name
        yield from sorted(path.rglob("*.md")) if path.is_dir() else [path]


DOCUMENTS = [str(path.relative_to(ROOT)) for path in _documents()]


def read(name):
    return (ROOT / name).read_text()


def blocks(name, language):
    return re.findall(rf"^```{language}\n(.*?)^```", read(name), flags=re.MULTILINE | re.DOTALL)


def settings_table():
    """The table of docs/settings.md, from bridge/settings.py; CONTRIBUTING.md says how to print it."""
    rows = ["| variable | default | allowed | meaning |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        bounds = [
            f"{sign} {getattr(limit, key):g}"
            for limit in field.metadata
            for key, sign in SIGNS.items()
            if hasattr(limit, key)
        ]
        choices = [f"`{choice}`" for choice in getattr(field.annotation, "__args__", ()) if isinstance(choice, str)]
        default = "not set" if field.default is None else f"`{_as_variable(field.default)}`"
        meaning = (field.description or "").replace("<", "&lt;")
        allowed = ", ".join(bounds or choices)
        rows.append(f"| `BRIDGE_{name.upper()}` | {default} | {allowed} | {meaning} |")
    return "\n".join(rows)


def _as_variable(default):
    if isinstance(default, float):
        return f"{default:.10g}"
    return str(default).lower() if isinstance(default, bool) else str(default)


def test_every_setting_is_in_the_table_as_it_is():
    assert settings_table() in read("docs/settings.md"), f"docs/settings.md needs this table:\n{settings_table()}"


def test_every_variable_the_documents_name_is_a_setting():
    known = {f"BRIDGE_{name.upper()}" for name in Settings.model_fields}
    for name in DOCUMENTS:
        text = read(name)
        found = set(re.findall(r"BRIDGE_[A-Z_]*[A-Z](?!_\*)\b", text))
        assert found <= known, f"{name}: {sorted(found - known)}"
        for beginning in re.findall(r"(BRIDGE_[A-Z_]*_)\*", text):
            assert any(each.startswith(beginning) for each in known), f"{name}: {beginning}*"


def celery_commands():
    """Each documented `celery ... inspect`, `control` or `gpu`, as words from there on, with its document."""
    said = re.compile(r"\bcelery (?:-[Ab] \S+ )*((?:inspect|control|gpu)\b[^`\n#|;)]*)")
    return [(name, shlex.split(words)) for name in DOCUMENTS for words in said.findall(read(name)) if "/" not in words]


def test_celery_has_every_command_that_the_documents_show():
    commands = celery_commands()
    assert len(commands) > 10
    for name, (command, *words) in commands:
        click_command = celery_command.commands[command]
        try:
            options, _, _ = click_command.make_parser(click.Context(click_command)).parse_args(words)
        except click.UsageError as error:
            pytest.fail(f"{name}: celery {command} {' '.join(words)}: {error}")
        if isinstance(options.get("command"), str):
            meta = Panel.meta.get(options["command"])
            assert meta is not None and meta.type == command, f"{name}: celery {command} {options['command']}"


@pytest.mark.parametrize("error", errors.StartupError.__subclasses__(), ids=lambda error: error.__name__)
def test_every_start_up_error_is_in_the_table(error):
    assert f"| {error.exit_code} | `{error.__name__}` |" in read("docs/bring-up.md")


@pytest.mark.parametrize(("module", "process"), [(loop, "driver"), (contract, "executor")])
def test_exit_codes_of_other_processes_are_in_the_table(module, process):
    codes = [value for name, value in vars(module).items() if name.startswith("EXIT_")]
    assert codes
    for code in codes:
        assert f"| {code} | {process} |" in read("docs/bring-up.md")


def anchors(text):
    """GitHub's names of a document's headings."""
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_resolve(document):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(linked.read_text()), f"{target}: no such heading"


def names_in(source):
    """Top-level functions and classes, and ``Class.method``."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef))


@pytest.mark.parametrize("document", ["docs/journey.md", "docs/glossary.md", "docs/states.md"])
def test_files_and_functions_exist(document):
    text = read(document)
    for file in set(re.findall(r"`([\w/]+\.py)`", text)):
        assert (ROOT / file).is_file(), f"{document} names {file}"
    # `file.py` `name`, `name`: the names are of that file
    for file, names in re.findall(r"`([\w/]+\.py)`((?:,? `[A-Za-z_][\w.]*`)+)", text):
        known = set(names_in(read(file)))
        for name in re.findall(r"`([\w.]+)`", names):
            assert name in known, f"{document}: {file} has no {name}"


def test_the_journey_names_every_file_of_a_tasks_way():
    journey = read("docs/journey.md")
    for folder, files in {
        "bridge": ("pool", "link"),
        "bridge/worker": ("consumer", "supervisor"),
        "bridge/driver": ("loop", "scheduler", "fleet", "outcomes"),
        "actors": ("contract", "journal"),
        "actors/actor": ("gpu_actor", "shell", "entries", "child"),
        "actors/executor": ("loop", "runner", "outcomes"),
    }.items():
        for file in files:
            assert f"`{folder}/{file}.py`" in journey


@pytest.mark.parametrize(
    "init",
    [str(each.relative_to(ROOT)) for each in (*ROOT.glob("bridge/*/__init__.py"), *ROOT.glob("actors/*/__init__.py"))],
)
def test_each_folder_of_a_process_names_its_files(init):
    files = {each.stem for each in (ROOT / init).parent.glob("*.py") if not each.stem.startswith("__")}
    assert files <= set(re.findall(r"`(\w+)`", read(init)))


def test_the_readmes_example_is_an_app_with_the_marks_it_shows():
    code, *_ = blocks("README.md", "python")
    scope = {"__name__": "shop"}
    exec(compile(code, "README.md", "exec"), scope)
    app = scope["app"]
    assert isinstance(app, Celery)
    app.finalize()
    own = [task for name, task in app.tasks.items() if name.startswith("shop.") and task.app is app]
    assert set(find_marks(own, [])) == {"shop.norm", "shop.mean", "shop.double", "shop.look_up"}
    assert (scope["norm"]([3.0, 4.0]), scope["double"](2.0), scope["look_up"](7)) == (5.0, 4.0, 7)


def test_the_example_tests_pass_as_they_are_written(tmp_path):
    (shop, *_), (tests, *_) = blocks("README.md", "python"), blocks("docs/howto/testing.md", "python")
    (tmp_path / "shop.py").write_text(shop)
    (tmp_path / "test_shop.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr


def test_make_targets_the_documents_name_exist():
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), flags=re.MULTILINE))
    for name in DOCUMENTS:
        commands = "\n".join(blocks(name, "bash"))
        found = set(re.findall(r"`make ([a-z-]+)", read(name)) + re.findall(r"\bmake ([a-z-]+)", commands))
        assert found <= targets, f"{name}: {sorted(found - targets)}"


def test_the_licence_is_the_one_pyproject_names():
    assert 'license = "Apache-2.0"' in read("pyproject.toml")
    assert "Version 2.0, January 2004" in read("LICENSE") and "END OF TERMS AND CONDITIONS" in read("LICENSE")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_path_of_one_machine(document):
    assert not re.findall(r"(?<![\w.])/(?:home|root|work|Users)/", read(document))


def test_every_test_that_reliability_names_exists():
    """`file::test`, a bare test of the file named before it, or a file; every row of the fault table names one."""
    table = read("docs/reliability.md").partition("## Faults")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if re.match(r"\| \d+b? \|", line)]
    assert {row.split("|")[1].strip() for row in rows} >= {*map(str, range(1, 33)), "1b", "7b", "23b"}
    for row in rows:
        file, found = None, 0
        for name in re.findall(r"`([^`]*test_[^`]*)`", row.split("|")[4]):
            path, _, test = name.rpartition("::") if "::" in name else ("", "", name)
            if not path and test.endswith(".py"):
                path, test = test, ""
            file = file if not path else ROOT / "tests" / (path if "/" in path else f"acceptance/{path}")
            assert file.is_file(), name
            assert not test or re.search(rf"^def {test}\(", file.read_text(), flags=re.MULTILINE), f"{file}: {test}"
            found += 1
        assert found, f"no test in {row[:60]}"
