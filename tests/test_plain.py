"""What is encoded as plain data can name no code: a class is found only where it is imported already."""

import re
import sys
from enum import Enum
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
from msgspec import msgpack

from counter_server.modules import place_of
from counter_server.plain import Sealed, decode_plain, decode_sealed, encode_plain, find_class
from tests.hosted_classes import Colour, Measured, Point

OURS = ("tests.hosted_classes",)


def test_a_class_is_found_only_in_modules_that_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy(ModuleType):
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError("something would be imported or called")

    monkeypatch.setitem(sys.modules, "lazy", Lazy("lazy"))
    monkeypatch.delitem(sys.modules, "this", raising=False)
    assert find_class("tests.hosted_classes", "Colour") is Colour
    for module, qualname in (
        *(("this", "d"), ("lazy", "Colour"), ("tests.hosted_classes", "Colour.RED.value"), ("tests", "")),
        *(("tests.hosted_classes", "os.path.join"), ("tests.hosted_classes", "Measured.__init__.__globals__")),
    ):
        assert not isinstance(find_class(module, qualname), type), qualname
    assert "this" not in sys.modules


BAD: list[tuple[int, Any]] = [
    *((14, [*OURS, *end]) for end in (["Colour", "GREEN"], ["Colour", "__class__"], ["Colour", 1], ["Point", "x"])),
    *((14, content) for content in cast(Any, (["builtins", "int", "1"], [], 5))),
    *((15, [*OURS, name, {"x": 1}]) for name in ("Colour", "Toolbox", "os", "Entries.x")),
    *((15, [*OURS, "Point", content]) for content in cast(Any, ({}, {"colour": 1}, [], None))),
    *((6, content) for content in cast(Any, ([], ["x"], [1, 2], None))),
    *((code, [[{}]]) for code in (4, 5, 11, 12, 13)),
    *((13, [name]) for name in ("../../etc/passwd", "Nowhere/City", None, 5)),
    *((code, []) for code in (0, 16, 127)),
]


@pytest.mark.parametrize(("code", "content"), BAD)
def test_bytes_that_are_no_plain_data_are_refused(code: int, content: object) -> None:
    data = msgpack.encode([msgpack.Ext(code, msgpack.encode(content))])
    with pytest.raises(ValueError, match=r"."):
        decode_plain(data)


def test_a_dataclass_of_another_version_gets_its_fields_that_are_sent_and_defaults() -> None:
    def sent(**content: object) -> object:
        named = ["tests.hosted_classes", "Point", content]
        return decode_plain(msgpack.encode(msgpack.Ext(15, msgpack.encode(named))))

    assert sent(x=1, new=5, __class__="no") == Point(1)
    assert sent(x=1, seen=["a"]).seen == ["a"]  # type: ignore[attr-defined]


def test_what_is_sealed_is_kept_as_it_came() -> None:
    values = [Colour.RED, {Point(1): Measured("m")}, (Colour.BLUE,)]
    sealed = decode_sealed(encode_plain(values, "values"))
    assert isinstance(sealed[0], Sealed)
    assert sealed == decode_sealed(encode_plain(values, "values"))
    assert decode_plain(encode_plain(sealed, "sealed")) == values
    assert encode_plain(set("abcdefg"), "a set") == encode_plain(set("gfedcba"), "a set")


class OfMain(Enum):
    ONE = 1


@pytest.mark.parametrize(
    ("file", "spec", "name"),
    [
        ("app.py", None, "app"),
        ("package/app.py", "package.app", "package.app"),  # python -m package.app
        ("elsewhere/app.py", None, "app@[0-9a-f]{8}"),
        ("elsewhere/my-program.py", None, "program@[0-9a-f]{8}"),
        (None, None, "__main__"),
    ],
)
def test_a_class_of_the_main_program_is_one_class_in_all_processes(
    file: str | None, spec: str | None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name_of_directory in ("elsewhere", "package"):
        (tmp_path / name_of_directory).mkdir()

    def as_program(main: str, *others: str) -> None:
        module: Any = ModuleType(main)
        module.OfMain = OfMain
        if file:
            module.__file__ = str(tmp_path / file)
            (tmp_path / file).touch()
        if spec:
            module.__spec__ = type("Spec", (), {"name": spec})
        for other in ("__main__", "__mp_main__", "app", "package.app"):
            monkeypatch.delitem(sys.modules, other, raising=False)
        monkeypatch.setitem(sys.modules, "__main__", ModuleType("another"))
        for other in (main, *others):
            monkeypatch.setitem(sys.modules, other, module)
        monkeypatch.setattr(OfMain, "__module__", main)
        place_of.cache_clear()

    as_program("__main__")
    known, place = place_of("__main__")
    assert re.fullmatch(name, known)
    assert place == (str(tmp_path / file) if file else "")
    # The last one is another program, which imports the module.
    names = [("__main__",), *([] if spec else [("__mp_main__", "__main__")]), *([(known,)] if file else [])]
    sides = [partial(as_program, *each) for each in names]
    for sender in sides:
        sender()
        data = encode_plain(OfMain.ONE, "a member")
        for receiver in sides:
            receiver()
            assert decode_plain(data) is OfMain.ONE
    monkeypatch.undo()
    place_of.cache_clear()
