"""Each recipe of the documentation is run as it stands, by the server or the test client of its framework."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.launchers import Answer, Browser, launch, listening_port
from tests.load import at_once
from tests.processes import PATIENCE, ROOT, Program, end_manager, eventually, holder
from tests.test_documentation import examples

pytestmark = pytest.mark.slow

Serve = Callable[..., str]
HEADINGS = {  # each has a test below
    *("A background job's progress", "A model loaded once per machine", "Who is online", "A budget for each tenant"),
    *("FastAPI", "Django"),
}


def recipe(heading: str, **changes: str) -> str:
    """Return the program under a heading. `changes` replaces parts of it, each of which occurs once."""
    (program,) = examples(section(heading))
    for before, after in changes.items():
        assert program.count(before) == 1
        program = program.replace(before, after)
    return program


def section(heading: str) -> str:
    page = (ROOT / "docs" / "recipes.md").read_text()
    return page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


@pytest.fixture
def set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNTER_SERVER_DEADLINE", str(PATIENCE))  # on a busy machine a manager starts slowly


@pytest.fixture
def serve(tmp_path: Path, stack: ExitStack, on_demand: str, set_up: None) -> Serve:
    """Serve a program by gunicorn, with 4 workers of 8 threads; return its URL. The manager ends with the test."""

    def start(program: str) -> str:
        (tmp_path / "app.py").write_text(program.replace("manager:///var/lib/counters", on_demand))
        return launch(stack, "gunicorn, gthread, preloaded", tmp_path)[1]

    return start


def ask(url: str, path: str = "/", method: str = "GET") -> tuple[int, Any]:
    return told(Browser(url).visit(path, method))


def told(answer: Answer) -> tuple[int, Any]:
    content = answer.content
    return answer.status, json.loads(content) if isinstance(content, bytes) and content[:1] == b"{" else content


def content_of_success(answer: tuple[int, Any]) -> Any:
    status, content = answer
    return content if status == 200 else None


def test_every_recipe_is_tested() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert {line[3:] for line in page.splitlines() if line.startswith("## ")} == HEADINGS


def test_a_jobs_progress_is_shown_by_every_worker(serve: Serve, tmp_path: Path) -> None:
    """Its work waits for a file here, halfway."""
    gate = tmp_path / "gate"
    wait = f"while step == 5 and not __import__('os').path.exists({str(gate)!r}): __import__('time').sleep(0.01)"
    url = serve(recipe("A background job's progress", **{"# ... a tenth of the work": wait}))
    status, begun = ask(url, "/reports", "POST")
    assert status == 202
    path = f"/reports/{begun['job']}"
    eventually(lambda: ask(url, path) == (200, {"percent": 40}), "the first half")
    assert at_once(16, lambda: ask(url, path)) == [(200, {"percent": 40})] * 16
    gate.touch()
    eventually(lambda: ask(url, path) == (200, {"percent": 100}), "the end of the job")
    assert ask(url, "/reports/unknown")[0] == 404


def test_a_model_is_loaded_by_one_process_and_used_by_all_workers(serve: Serve, tmp_path: Path) -> None:
    """Also after a kill -9 of that process, without a failed request."""
    data = tmp_path / "instance" / "counter-server"
    url = serve(recipe("A model loaded once per machine"))
    score = "/score?text=a+good+and+great+day"
    managers = set()
    for _ in range(2):
        answers = at_once(40, lambda: ask(url, score))
        managers.add(holder(data))
        assert answers == [(200, {"score": 3, "process": holder(data)})] * 40
        # Chance may have sent none of the requests to one worker, which then tells the loss here.
        assert eventually(lambda: content_of_success(ask(url, "/answers")), "the number of answers") == {"answers": 40}
        end_manager(data / "manager.lock")
        for _ in range(20):  # each worker meets the loss once
            assert ask(url, score)[0] == 200
        assert ask(url, score)[0] == 200
        end_manager(data / "manager.lock")
    assert len(managers) == 2


def test_people_are_online_for_a_while_after_their_last_request(serve: Serve) -> None:
    url = serve(recipe("Who is online", **{"ttl=60": "ttl=2"}))
    anna, ben = Browser(url), Browser(url)
    assert told(anna.visit("/sign-in/anna", "POST")) == (200, {"name": "anna"})
    assert told(ben.visit("/sign-in/ben", "POST")) == (200, {"name": "ben"})
    assert "ben" in told(ben.visit("/online"))[1]["online"]
    # Anna asks again and again; Ben does not.
    eventually(lambda: told(anna.visit("/online")) == (200, {"online": ["anna"]}), "the end of Ben's visit")
    assert told(anna.visit("/sign-out", "POST")) == (200, {})
    assert ask(url, "/online") == (200, {"online": []})


def test_simultaneous_requests_spend_a_budget_exactly(serve: Serve) -> None:
    url = serve(recipe("A budget for each tenant", **{"BUDGET = 1000": "BUDGET = 100"}))
    answers = at_once(50, lambda: ask(url, "/tenants/acme/calls/3", "POST"))
    spent = sorted((content["used"], content["left"]) for status, content in answers if status == 200)
    assert spent == [(used, 100 - used) for used in range(3, 100, 3)]
    refused = [content for status, content in answers if status == 409]
    assert len(refused) == 50 - 33
    assert b"LimitReached" in refused[0]
    assert b"outcome: not_applied" in refused[0]
    assert ask(url, "/tenants/acme") == (200, {"used": 99})
    assert ask(url, "/tenants/acme/calls/1", "POST") == (200, {"used": 100, "left": 0})
    assert ask(url, "/tenants/other/calls/100", "POST") == (200, {"used": 100, "left": 0})


def test_fastapi_counts_in_its_threads(stack: ExitStack, tmp_path: Path, on_demand: str, set_up: None) -> None:
    program = recipe("FastAPI", **{"manager:///var/lib/counters": on_demand, "maximum=100": "maximum=20"})
    (tmp_path / "app.py").write_text(program)
    command = ["-m", "uvicorn", "app:app", "--port", "0"]
    server = stack.enter_context(Program(*command, cwd=tmp_path, environment={"PYTHONPATH": str(ROOT)}))
    port = eventually(lambda: listening_port(server.pid) or not server.running, "uvicorn listens")
    assert server.running, server.errors
    url = f"http://127.0.0.1:{port}"
    assert sorted(content["visits"] for _, content in at_once(32, lambda: ask(url))) == list(range(1, 33))
    tickets = at_once(32, lambda: ask(url, "/tickets", "POST"))
    assert sorted(content["ticket"] for status, content in tickets if status == 200) == list(range(1, 21))
    assert [content for status, content in tickets if status == 409] == [{"detail": "sold out"}] * 12
    server.stop()
    assert any("Application shutdown complete" in line for line in server.errors)  # after its lifespan


def test_django_counts_in_all_its_workers(serve: Serve) -> None:
    url = serve(recipe("Django"))
    answers = at_once(100, lambda: ask(url))
    assert sorted(content["visits"] for _, content in answers) == list(range(1, 101))
