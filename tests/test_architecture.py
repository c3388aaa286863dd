"""Imports keep to the contracts of pyproject.toml, which import-linter checks."""

import subprocess
import sys
from pathlib import Path

from tests.processes import ROOT


def test_imports_keep_to_the_contracts() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
