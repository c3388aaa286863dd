"""Imports keep to the contracts of pyproject.toml, which import-linter checks."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests.processes import ROOT


def lint_imports(directory: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([program, "--no-cache"], cwd=directory, capture_output=True, text=True, check=False)


def test_imports_keep_to_the_contracts() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout


def test_imports_that_break_the_contracts_are_found(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "counter_server", tmp_path / "counter_server")
    for file, line in [
        ("errors.py", "from .state import State"),
        ("manager/wire.py", "import waitress"),
        ("server/prove/__init__.py", "from ..demo import command"),
    ]:
        with (tmp_path / "counter_server" / file).open("a") as source:
            source.write(f"\n{line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout
    assert "Contracts: 0 kept, 4 broken." in result.stdout


def test_every_module_has_a_name_that_says_something() -> None:
    names = {path.stem for path in (ROOT / "counter_server").rglob("*.py")}
    assert not {"utils", "helpers", "constants", "types", "common", "misc"} & names
