"""The house keeps its shape: imports point downwards only."""

import ast
from pathlib import Path

import counter_server

PACKAGE = Path(counter_server.__file__).parent

# From the top of the house to its foundation. A module may import what stands below it, or in its own room.
ROOMS = [
    ("__main__",),
    ("cli",),
    ("server.demo.command",),
    ("server.demo.picture", "server.demo.progress", "server.demo.report"),
    ("server.demo.demonstration",),
    ("server.demo.outcome", "server.demo.stage"),
    ("server.demo.clients", "server.demo.plan"),
    ("server.demo.gunicorn_conf", "server.demo.servers", "server.demo.serving"),
    ("server.demo.app",),
    ("server.demo.taking",),
    ("server.demo.dirty", "server.demo.strategies", "server.demo.textbook"),
    ("server.demo.some_obj",),
    ("server.demo",),
    ("server.prove.command",),
    ("server.prove.progress",),
    ("server.prove.proof",),
    ("server.prove.verdict",),
    ("server.prove.faults",),
    ("server.prove.load", "server.prove.guard"),
    ("server.prove.history", "server.prove.processes"),
    ("server.prove",),
    ("options",),
    ("doctor", "upkeep"),
    ("server.supervisor",),
    ("server.replacement",),
    ("server.child", "server.managing", "server.worker"),
    ("server.application", "server.channel", "server.logs", "server.processes", "server.service_manager"),
    ("server.refusal",),
    ("server",),
    ("server.web",),
    (
        "server.web.api",
        "server.web.badge",
        "server.web.dashboard",
        "server.web.documentation",
        "server.web.health",
        "server.web.lab",
        "server.web.pages",
        "server.web.sign_in",
    ),
    ("server.web.lab.strategies",),
    ("server.web.lab.runs",),
    ("server.web.access", "server.web.openapi"),
    ("server.web.rate_limit",),
    ("server.web.badge_picture", "server.web.described", "server.web.forms", "server.web.names"),
    (
        "server.web.headers",
        "server.web.hosts",
        "server.web.navigation",
        "server.web.operators",
        "server.web.origin",
        "server.web.problems",
    ),
    (
        "server.web.figures",
        "server.web.listing",
        "server.web.metrics",
        "server.web.readiness",
        "server.web.request_log",
        "server.web.signing",
        "server.web.visits",
    ),
    ("caching", "limiting"),
    ("extension",),
    ("visitors",),
    ("",),  # counter_server itself: what users import
    ("state",),
    ("handles",),
    ("session",),
    ("dicts", "recent", "windows"),
    ("stores",),
    ("stores.manager", "stores.memcached", "stores.memory", "stores.redis", "stores.sql"),
    ("stores.memcached_protocol", "stores.postgresql", "stores.redis_findings", "stores.sqlite"),
    ("stores.pipeline", "stores.postgresql_findings", "stores.tables"),
    ("stores.base",),
    ("manager.server",),
    ("manager.client",),
    ("manager.ending", "manager.services"),
    ("manager.wire", "manager.starter"),
    ("manager.directory",),
    ("manager",),
    ("journal",),
    ("journal_file",),
    ("objects",),
    ("ledger",),
    ("combiner",),
    ("operations", "status"),
    ("plain",),
    ("settings",),
    ("errors", "output"),
]
RANK = {module: rank for rank, room in enumerate(ROOMS) for module in room}
# The package's own front says lazily what is in the extension above it.
ALLOWED_UPWARDS = {("", "extension")}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix("__init__").removesuffix(".")] = path
    return found


def imports(module: str, path: Path) -> set[str]:
    """The modules of this package that a module imports, inside functions too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package.split(".") if package else []
            base = base[: len(base) - node.level + 1]
            target = ".".join(filter(None, [*base, node.module]))
            for alias in node.names:
                inner = f"{target}.{alias.name}".lstrip(".")
                found.add(inner if inner in modules() else target)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.module.startswith("counter_server"), f"{module}: imports within the package are relative"
    return found - {module}


def test_every_module_has_its_room() -> None:
    assert set(modules()) == set(RANK)


def test_imports_point_downwards_only() -> None:
    upwards = [
        f"{module or 'counter_server'} imports {target}"
        for module, path in modules().items()
        for target in imports(module, path)
        if RANK[target] <= RANK[module] and (module, target) not in ALLOWED_UPWARDS
    ]
    assert upwards == []


def test_nothing_is_called_by_a_name_that_says_nothing() -> None:
    assert not {"utils", "helpers", "constants", "types", "common", "misc"} & {
        name.rpartition(".")[2] for name in modules()
    }
