"""The files in `docs/deploy.md` are right: service units, nginx below a URL prefix, containers and a task queue.

What needs systemd or a container engine as a whole was tried by hand; here are the parts that need only their tools.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from counter_server import open_state
from counter_server.settings import _IN_APP
from tests.launchers import Browser, listening_port
from tests.processes import PATIENCE, ROOT, Program, Server, eventually, holder
from tests.test_documentation import examples

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "deploy.md"
PROGRAMS = str(Path(sys.executable).parent)
APP = """
from flask import Flask
from counter_server import SharedState

app = Flask(__name__)
carts = SharedState(app).dict("carts")

@app.get("/")
def index():
    return str(carts.incr("number"))
"""


def file(name: str) -> str:
    """Return the content of a file in the page; its first line is a comment with its path."""
    (found,) = (block for block in examples(PAGE) if block.startswith(f"# {name}\n"))
    return found


def needs(program: str, package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        shutil.which(program) is None, reason=f"no {program}: install the Debian package {package}"
    )


@needs("systemd-analyze", "systemd")
@pytest.mark.parametrize("name", ["app.service", "counters.service"])
def test_systemd_finds_no_mistake_in_a_unit(name: str, tmp_path: Path) -> None:
    unit, text = tmp_path / name, file(f"/etc/systemd/system/{name}")
    programs = re.findall(r"^ExecStart=(/srv/\w+/.venv/bin)/", text, re.MULTILINE)
    assert len(programs) == 1
    unit.write_text(text.replace(programs[0], PROGRAMS))
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")


def test_a_unit_names_options_that_the_commands_have() -> None:
    for name in ("app.service", "counters.service"):
        (command,) = re.findall(
            r"^ExecStart=/srv/\w+/.venv/bin/(.*)", file(f"/etc/systemd/system/{name}"), re.MULTILINE
        )
        program, *arguments = command.split()
        given = subprocess.run([f"{PROGRAMS}/{program}", *arguments, "--help"], capture_output=True, check=False)
        assert given.returncode == 0, given.stderr


@needs("nginx", "nginx-light")
def test_below_a_prefix_of_nginx_every_page_and_link_works(
    stack: ExitStack, start_server: Callable[..., Server], tmp_path: Path
) -> None:
    server = start_server("--trusted-proxy", "1", "--workers", "1")
    site = file("/etc/nginx/conf.d/counters.conf")
    sock = stack.enter_context(socket.create_server(("127.0.0.1", 0)))  # nginx takes it over, as at an upgrade
    port = sock.getsockname()[1]
    for before, after in (("listen 80;", f"listen 127.0.0.1:{port};"), ("http://127.0.0.1:8001/", f"{server.url}/")):
        assert before in site
        site = site.replace(before, after)
    paths = "".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
    configuration = tmp_path / "nginx.conf"
    configuration.write_text(
        f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log;\nevents {{}}\n"
        f"http {{ access_log off; client_body_temp_path {tmp_path}/body; {paths}\n{site}}}\n"
    )
    options = ("-e", f"{tmp_path}/error.log", "-c", configuration)
    subprocess.run(["nginx", "-t", *options], capture_output=True, check=True)
    inherited = {"NGINX": f"{sock.fileno()};"}
    nginx = stack.enter_context(Program(*options, program="nginx", environment=inherited, descriptors=(sock.fileno(),)))
    browser = Browser(f"http://127.0.0.1:{port}")
    links = {"/counting/"}
    for path in ("", "session", "counters", "docs", "sign-in"):
        page = browser.visit(f"/counting/{path}")
        assert page.status == 200
        links |= set(re.findall(r'(?:href|src|data-live)="([^"#][^"]*)"', page.content.decode()))
    assert len(links) > 10
    for link in links:
        assert link.startswith("/counting/")
        assert browser.visit(link.replace("&amp;", "&")).status == 200, link
    for name in ("a", "a//b", "a%2Fb", "a%20b", "%C3%BC", "100%25"):
        url = f"http://127.0.0.1:{port}/counting/api/v1/counters/{name}/increment"
        request = urllib.request.Request(url, method="POST", headers={"Origin": f"http://127.0.0.1:{port}"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:  # noqa: S310 - to ourselves
            asked = json.load(response)
        with urllib.request.urlopen(f"{server.url}/api/v1/counters/{name}", timeout=PATIENCE) as response:  # noqa: S310 - as above
            assert json.load(response) == asked
    nginx.send_signal(signal.SIGTERM)
    nginx.wait()


def test_gunicorn_ends_its_manager_in_order_so_nothing_in_memory_is_lost(stack: ExitStack, tmp_path: Path) -> None:
    (tmp_path / "gunicorn.conf.py").write_text(file("gunicorn.conf.py"))
    (tmp_path / "app.py").write_text(APP)
    (command,) = re.findall(r"^CMD (.*)", file("Dockerfile"), re.MULTILINE)
    program, *arguments = json.loads(command)
    arguments = [argument.replace("0.0.0.0:8000", "127.0.0.1:0") for argument in arguments]
    data_dir = tmp_path / "data"
    environment = {"COUNTER_SERVER_DATA_DIR": str(data_dir), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{PROGRAMS}:/usr/bin:/bin"
    for number in (1, 2):
        server = Program(*arguments, program=f"{PROGRAMS}/{program}", environment=environment, cwd=tmp_path)
        stack.enter_context(server)
        port = eventually(lambda server=server: listening_port(server.pid), "gunicorn listens")  # type: ignore[misc]
        assert Browser(f"http://127.0.0.1:{port}").visit().content == number
        assert holder(data_dir) is not None
        assert server.stop() == 0
        assert any(line.startswith("The manager") for line in server.output), server.errors


def test_the_manifests_are_for_one_replica_on_a_volume_and_give_it_time_to_end() -> None:
    app = yaml.safe_load(file("compose.yaml"))["services"]["app"]
    variables = dict(re.findall(r"(?<= )(\w+)=(\S+)", file("Dockerfile")))
    (volume,) = app["volumes"]
    assert variables["COUNTER_SERVER_DATA_DIR"].startswith(volume.partition(":")[2] + "/")
    assert variables["COUNTER_SERVER_RUNTIME_DIR"] == app["tmpfs"]
    _, stateful = yaml.safe_load_all(file("app.yaml"))
    pod = stateful["spec"]["template"]["spec"]
    assert stateful["spec"]["replicas"] == 1
    graceful = 30  # seconds, gunicorn's own limit for open requests
    assert int(app["stop_grace_period"].removesuffix("s")) == pod["terminationGracePeriodSeconds"] > graceful
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"data": volume.partition(":")[2], "tmp": app["tmpfs"]}
    claimed = [claim["metadata"]["name"] for claim in stateful["spec"]["volumeClaimTemplates"]]
    assert sorted(mounts) == sorted([*claimed, *(each["name"] for each in pod["volumes"])])


def test_a_task_counts_in_the_directory_of_the_app(on_demand: str, data_dir: Path, tmp_path: Path) -> None:
    """Celery itself was tried by hand: here a task is a function."""
    (tmp_path / "celery.py").write_text(
        "class Celery:\n    def __init__(self, *_, **__): self.task = lambda task: task\n"
    )
    (tmp_path / "tasks.py").write_text(file("tasks.py"))
    (command,) = re.findall(r"/bin/counter-server (.*)", file("crontab of the app's user"))
    environment = {**os.environ, "COUNTER_SERVER_DATA_DIR": str(data_dir), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    for arguments in (["-c", "import tasks; print(tasks.count_visit())"], ["-m", "counter_server", *command.split()]):
        counted = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, check=True)
        assert counted.stdout == b"1\n"
    with open_state(on_demand) as state:
        assert dict(state.counters().counters) == {"visits": 1, "nights": 1}


def test_the_page_names_variables_that_exist() -> None:
    others = {"COUNTER_SERVER_RUNTIME_DIR", "COUNTER_SERVER_TOKEN", "COUNTER_SERVER_TRUSTED_PROXIES"}
    known = {f"COUNTER_SERVER_{name}" for name in _IN_APP} | others
    assert set(re.findall(r"COUNTER_SERVER_\w+", PAGE.read_text())) <= known
