"""An installation without the extra `server`: the core works, and the rest names the extra."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import ROOT

Run = Callable[..., subprocess.CompletedProcess[str]]

SERVER_PACKAGES = ("waitress", "prometheus_client")
CORE = ["", ".caching", ".cli", ".extension", ".limiting", ".manager.client", ".manager.server", ".manager.starter"]
STORES = [".stores.manager", ".stores.memcached", ".stores.memory", ".stores.redis", ".stores.sql"]
CREATE_APP = ("-c", "from counter_server.server.web import create_app; print(create_app().name)")


@pytest.fixture
def run_without(tmp_path: Path) -> Run:
    """Return a function that runs Python, and every process that it starts, without some packages."""

    def run(packages: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
        hidden = "".join(f"sys.modules[{package!r}] = None\n" for package in packages)
        (tmp_path / "sitecustomize.py").write_text(f"import sys\n{hidden}")
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_the_core_imports_no_package_of_the_server(run_without: Run) -> None:
    imports = "; ".join(f"import counter_server{module}" for module in [*CORE, *STORES])
    done = run_without(SERVER_PACKAGES, "-c", imports)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_core_counts_without_the_packages_of_the_server(run_without: Run, on_demand: str) -> None:
    """The manager too, which is started on demand."""
    done = run_without(SERVER_PACKAGES, "-m", "counter_server", "increment", "x", "--store", on_demand)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


@pytest.mark.parametrize("command", [("run", "--port", "0"), ("prove", "--seconds", "1")], ids=["run", "prove"])
@pytest.mark.parametrize("missing", SERVER_PACKAGES)
def test_a_command_without_a_package_of_the_server_names_the_extra(
    run_without: Run, command: tuple[str, ...], missing: str, tmp_path: Path
) -> None:
    done = run_without((missing,), "-m", "counter_server", *command)
    assert done.returncode == 1
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    package = missing.replace("_", "-")
    assert line.startswith("Error: ")
    assert line.endswith(f"the server needs {package}: pip install 'counter-server[server]'")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "instance").exists()


def test_the_application_without_a_package_of_its_own_names_the_extra(run_without: Run) -> None:
    done = run_without(("prometheus_client",), *CREATE_APP)
    assert done.returncode == 1
    assert done.stderr.endswith("the server needs prometheus-client: pip install 'counter-server[server]'\n")


def test_the_application_needs_no_waitress_under_another_launcher(run_without: Run) -> None:
    done = run_without(("waitress",), *CREATE_APP)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_demonstration_without_waitress_names_the_extra(run_without: Run) -> None:
    done = run_without(("waitress",), "-m", "counter_server", "demo", "--json", "--only", "waitress/ours")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "waitress not installed: pip install 'counter-server[demo]'" in done.stdout
