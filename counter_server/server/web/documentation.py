"""The API's document, and the page that shows it."""

import shlex
from typing import Any
from urllib.parse import quote, urlencode

import msgspec
from flask import Blueprint, Response, current_app, render_template, request

from .described import Answer, described
from .openapi import Document, document

_DOCUMENT = "counter_server.document"  # in an app's `extensions`; made when it is first asked for, of all its views


def blueprint() -> Blueprint:
    documentation = Blueprint("documentation", __name__)

    @documentation.get("/openapi.json")
    @described("This document", answers={200: Answer("OpenAPI 3.1", {"openapi": "3.1.0"})}, stored=False)
    def openapi() -> Response:
        """What you are reading, for programs."""
        return Response(msgspec.json.encode(_document()), content_type="application/json")

    @documentation.get("/docs")
    def page() -> str:
        """The same for people."""
        made = _document()
        operations = [
            {
                "method": method.upper(),
                "path": path,
                **operation,
                "responses": [(status, _resolved(made, answer)) for status, answer in operation["responses"].items()],
                "curl": _curl(request.url_root.rstrip("/"), method, path, operation),
            }
            for path, item in made["paths"].items()
            for method, operation in item.items()
        ]
        return render_template("documentation.html", document=made, operations=operations)

    return documentation


def _document() -> Document:
    app = current_app
    made: Document | None = app.extensions.get(_DOCUMENT)
    if made is None:
        made = app.extensions[_DOCUMENT] = document(app)
    return {**made, "servers": [{"url": request.script_root or "/"}]}


def _resolved(made: Document, part: Document) -> Document:
    """A part of the document, or what it refers to."""
    if "$ref" in part:
        for name in part["$ref"].removeprefix("#/").split("/"):
            made = made[name]
        return made
    return part


def _curl(root: str, method: str, path: str, operation: dict[str, Any]) -> str:
    """A command that makes the call, with the document's own examples."""
    words = ["curl"]
    if method != "get":
        words += ["--request", method.upper()]
    query = {}
    for parameter in operation["parameters"]:
        example = parameter["schema"].get("examples", [None])[0]
        if example is None:
            continue
        if parameter["in"] == "path":
            path = path.replace(f"{{{parameter['name']}}}", quote(example, safe=""))
        elif parameter["in"] == "header":
            words += ["--header", f"{parameter['name']}: {example}"]
        else:
            query[parameter["name"]] = example
    if "requestBody" in operation:
        example = operation["requestBody"]["content"]["application/json"]["example"]
        words += ["--json", msgspec.json.encode(example).decode()]
    command = shlex.join([*words, root + path + ("?" + urlencode(query) if query else "")])
    if operation.get("security"):  # in double quotes, for the shell to fill in
        command += ' --header "Authorization: Bearer $COUNTER_SERVER_TOKEN"'
    return command
