"""An installation without the optional packages: the core works, and the rest names the extra."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import PATIENCE, ROOT

pytestmark = pytest.mark.slow

Run = Callable[..., subprocess.CompletedProcess[str]]

SERVER_PACKAGES = ("waitress", "prometheus_client")
CORE = ["", ".caching", ".cli", ".extension", ".limiting", ".manager.client", ".manager.server", ".manager.starter"]
STORES = [".stores.memcached", ".stores.memory", ".stores.redis", ".stores.sql"]
CREATE_APP = "from counter_server.server.web import create_app; print(create_app().name)"
USE_THE_BLUEPRINT = """
from flask import Flask
from counter_server import SharedState
app = Flask('app')
app.config['COUNTER_SERVER_STORE'] = 'memory://'
app.register_blueprint(SharedState(app).blueprint(allow=lambda: True))
paths = ('counters', 'docs', 'livez', 'readyz', 'api/v1/counters', 'metrics')
answers = [app.test_client().get(f'/-/counters/{path}') for path in paths]
print(*(answer.status_code for answer in answers), answers[-1].get_json()['detail'])
"""
USE_A_CACHE = """
from cachelib import BaseCache
from counter_server.caching import ManagerCache
cache = ManagerCache('memory://')
print(isinstance(cache, BaseCache), cache.set('a', [1]), cache.get('a'), cache.inc('b'), cache.clear())
print(cache.default_timeout, cache.ignore_delete_many_errors, cache.get_dict('a', 'b'))
"""


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


def test_the_core_works_without_the_packages_of_the_server(run_without: Run, on_demand: str) -> None:
    """The manager too, which is started on demand."""
    imports = "; ".join(f"import counter_server{module}" for module in [*CORE, *STORES])
    by_state = f"print(counter_server.open_state({on_demand!r}, deadline={PATIENCE}).counter('x').increment())"
    by_command = f"counter_server.cli.main(['increment', 'x', '--store', {on_demand!r}])"
    done = run_without(SERVER_PACKAGES, "-c", f"{imports}; {by_state}; {by_command}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n2\n", "")


def needs(what: str, package: str, extra: str) -> str:
    return f"{what} needs {package}: pip install 'counter-server[{extra}]'"


@pytest.mark.parametrize(
    ("missing", "arguments", "says"),
    [
        ("waitress", ("-m", "counter_server", "run", "--port", "0"), needs("Error: the server", "waitress", "server")),
        ("prometheus_client", ("-m", "counter_server", "prove"), needs("the server", "prometheus-client", "server")),
        ("rich", ("-m", "counter_server", "top", "--once"), needs("Error: top", "rich", "top")),
        ("prometheus_client", ("-c", CREATE_APP), needs("the server", "prometheus-client", "server")),
        ("cachelib", ("-c", "import counter_server.caching"), needs("ImportError: a cache", "cachelib", "cache")),
        ("limits", ("-c", "import counter_server.limiting"), needs("Error: a limit's storage", "limits", "limits")),
    ],
)
def test_without_a_package_the_error_names_the_extra(
    run_without: Run, missing: str, arguments: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    done = run_without((missing,), *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith(f"{says}\n")
    assert "-m" not in arguments or "Traceback" not in done.stderr
    assert not (tmp_path / "instance").exists()


@pytest.mark.parametrize(
    ("missing", "program", "output"),
    [
        ("waitress", CREATE_APP, "counter_server.server.web\n"),
        ("flask_caching", USE_A_CACHE, "True True [1] 1 True\n300 True {'a': None, 'b': None}\n"),
    ],
)
def test_a_package_that_is_not_used_is_not_needed(run_without: Run, missing: str, program: str, output: str) -> None:
    done = run_without((missing,), "-c", program)
    assert (done.returncode, done.stdout, done.stderr) == (0, output, "")


def test_the_blueprint_needs_no_server_and_its_metrics_name_what_they_need(run_without: Run) -> None:
    done = run_without(SERVER_PACKAGES, "-c", USE_THE_BLUEPRINT)
    says = needs("this page", "prometheus-client", "server")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"200 200 200 200 200 501 {says}\n", "")
