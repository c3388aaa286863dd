"""The documents are true: their examples run, and the tests and files that they name exist."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from flask import Flask

from counter_server import SharedState
from tests.processes import ROOT, Server
from tests.soak_faults import Faults

BESIDE = ["README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"]
DOCUMENTS = [*(ROOT / name for name in BESIDE), *sorted((ROOT / "docs").glob("*.md"))]


def examples(document: Path | str) -> list[str]:
    """Return the indented blocks of a document, or of a text."""
    text = document if isinstance(document, str) else document.read_text()
    blocks = re.findall(r"(?:^ {4}.*\n(?:\n{1,2}(?= {4}))?)+", text, re.MULTILINE)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in blocks]


def example(document: str, start: str) -> str:
    (found,) = (block for block in examples(ROOT / document) if block.startswith(start))
    return found


@pytest.mark.parametrize("document", ["README.md", "docs/any-app.md"])
def test_the_lines_for_any_app_count(document: str) -> None:
    app = Flask(__name__)
    app.config["COUNTER_SERVER_STORE"] = "memory://"
    (code,) = (block for block in examples(ROOT / document) if "SharedState(app)" in block)
    names: dict[str, object] = {"app": app}
    with app.app_context():
        exec(code, names)  # noqa: S102 - the example of our own document
    assert names["number"] == 1


def test_the_examples_for_any_app_return_the_values_beside_them(on_demand: str, tmp_path: Path) -> None:
    """Those of a dict, a visitor's counter, a cache and limits, in a temporary directory; and those without Flask."""

    def code(start: str) -> str:
        return example("docs/any-app.md", start).replace("manager:///var/lib/counters", on_demand)

    app = Flask(__name__, instance_path=str(tmp_path))
    app.config.update(COUNTER_SERVER_STORE=on_demand, SECRET_KEY="for this test")
    names: dict[str, object] = {"app": app, "shared": SharedState(app)}
    # All declarations come before the first use.
    (carts, *uses), (basket, use) = (code(start).strip().split("\n") for start in ("carts = ", "basket = "))
    declarations = (
        code(s) for s in ("from flask_caching", "from counter_server.caching", "import counter_server.limiting")
    )
    for statement in (carts, basket, *declarations):
        exec(statement, names)  # noqa: S102 - the examples of our own document
    with app.test_request_context():
        for line in (use, *uses):
            run_example_line(line, names)
    assert names["items"] == 1

    head, with_line, *lines = (line for line in code("from counter_server import open_state").split("\n") if line)
    exec(head, names)  # noqa: S102 - as above
    assert with_line.endswith(" as state:")
    with eval(with_line.removeprefix("with ").removesuffix(" as state:"), names) as names["state"]:  # noqa: S307 - so
        assert sum(run_example_line(line.strip(), names) for line in lines) == 5


def run_example_line(line: str, names: dict[str, object]) -> bool:
    """Run a line; if it has a value beside it, check that the line returns it, and return whether it had one."""
    statement, _, told = (part.strip() for part in line.partition("  #"))
    if told.startswith(("'", "[")) or told[:1].isdigit():
        value = told.partition(",")[0] if told[0].isdigit() else told
        assert repr(eval(statement, names)) == value, statement  # noqa: S307 - as above
        return True
    exec(statement, names)  # noqa: S102 - as above
    return False


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl: install the Debian package curl")
def test_the_readmes_commands_for_counters_work(start_server: Callable[..., Server], data_dir: Path) -> None:
    commands = example("README.md", ".venv/bin/counter-server increment").replace(
        "instance/counter-server", str(data_dir)
    )
    commands = commands.replace("http://127.0.0.1:8000", start_server("--workers", "1").url)
    commands = commands.replace(".venv/bin/counter-server", f"{sys.executable} -m counter_server")
    lines = [shlex.split(command.replace("curl ", "curl -s ")) for command in commands.strip().split("\n")]
    told = [subprocess.run(line, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() for line in lines]
    assert told == ["1", '{"counter":"visits","value":2}', '{"counter":"stock","value":-1}']


def test_every_test_named_in_a_document_exists() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for document in [*DOCUMENTS, *(ROOT / "docs").glob("*.py")]:
        for name in re.findall(r"(?:`|::)(test_\w+)", document.read_text()):
            assert f"def {name}(" in tests, f"{document.name} names {name}"


def test_every_file_named_in_a_document_exists() -> None:
    for document in DOCUMENTS:
        text = document.read_text()
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
        for path in re.findall(r"`(tests/[\w/]+\.py|docs/[\w-]+\.md)`", text):
            assert (ROOT / path).exists(), f"{document.name} names {path}"


def test_the_measured_faults_include_every_kind() -> None:
    page = (ROOT / "docs" / "guarantees.md").read_text()
    told = re.findall(r"^\| ([^|]+) \| \d+ \| [\d.]+ s \|", page, re.MULTILINE)
    assert set(told) >= {*Faults.replacing, *Faults.passing}


def test_no_line_of_a_document_needs_a_scroll_bar() -> None:
    """Allow at most 140 columns, except for tables and commands."""
    for document in DOCUMENTS:
        for line in document.read_text().splitlines():
            assert len(line) <= 140 or line.startswith(("|", "    ")), f"{document.name}: {line[:60]}…"


def test_the_figures_of_the_scale_page_come_from_the_model() -> None:
    told = subprocess.run([sys.executable, "docs/scale.py"], capture_output=True, text=True, check=True, cwd=ROOT)
    page = (ROOT / "docs" / "scale.md").read_text()
    tables = told.stdout.strip().split("\n\n")
    assert len(tables) == 3
    assert re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE) == [f"{table}\n" for table in tables]
