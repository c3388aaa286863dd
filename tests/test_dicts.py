"""The bounded dict with expiry follows a plain model, and is shared by all workers."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from counter_server import State, open_state
from counter_server.dicts import BoundedDict, SharedDict
from counter_server.errors import InvalidRequest, LimitReached
from counter_server.settings import LARGEST_VALUE
from tests.load import at_once
from tests.processes import PATIENCE, eventually


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


_KEYS: list[Any] = ["a", "é", b"a", 1, None, (1, "a")]
keys = st.sampled_from(_KEYS)
values = st.one_of(st.integers(-3, 3), st.just(2**70), st.just("text"), st.none())
times = st.sampled_from([None, 0.5, 1.0, 2.0, 3.0])
bounds = st.one_of(st.none(), st.integers(-3, 3))


class TheRules(RuleBasedStateMachine):
    """A bounded dict does what a plain dict would, with the documented expiry and eviction.

    The model lists its entries in the order of their last use.
    """

    @initialize(max_entries=st.integers(1, 4))
    def begin(self, max_entries: int) -> None:
        self.clock = Clock()
        self.max_entries = max_entries
        self.dict = BoundedDict(max_entries, self.clock)
        self.model: dict[Any, tuple[Any, float]] = {}

    def expire(self) -> None:
        self.model = {key: entry for key, entry in self.model.items() if self.clock.now < entry[1]}

    def use(self, key: Any) -> Any:
        self.expire()
        self.model[key] = self.model.pop(key)
        return self.model[key][0]

    def write(self, key: Any, value: Any, ttl: float | None, expires: float | None = None) -> None:
        self.expire()
        if key not in self.model and len(self.model) == self.max_entries:
            del self.model[next(iter(self.model))]
        self.model.pop(key, None)
        if expires is None:
            expires = math.inf if ttl is None else self.clock.now + ttl
        self.model[key] = (value, expires)

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0]))
    def time_goes_on(self, seconds: float) -> None:
        self.clock.now += seconds
        self.expire()

    @rule(key=keys)
    def find(self, key: Any) -> None:
        assert self.dict.find(key) == ((self.use(key),) if key in self.model else ())

    @rule(key=keys, value=values, ttl=times)
    def set(self, key: Any, value: Any, ttl: float | None) -> None:
        self.dict.set(key, value, ttl)
        self.write(key, value, ttl)

    @rule(key=keys, value=values, ttl=times)
    def add(self, key: Any, value: Any, ttl: float | None) -> None:
        missing = key not in self.model
        assert self.dict.add(key, value, ttl) is missing
        if missing:
            self.write(key, value, ttl)

    @rule(key=keys, value=values, ttl=times)
    def setdefault(self, key: Any, value: Any, ttl: float | None) -> None:
        found = self.dict.setdefault(key, value, ttl)
        if key not in self.model:
            self.write(key, value, ttl)
        assert found == self.use(key)

    @rule(key=keys)
    def remove(self, key: Any) -> None:
        assert self.dict.remove(key) == ((self.model.pop(key)[0],) if key in self.model else ())

    @rule(key=keys)
    def delete(self, key: Any) -> None:
        assert self.dict.delete(key) is (self.model.pop(key, None) is not None)

    @rule(key=keys, by=st.integers(-3, 3), ttl=times, minimum=bounds, maximum=bounds, renew=st.booleans())
    def incr(
        self, key: Any, by: int, ttl: float | None, minimum: int | None, maximum: int | None, *, renew: bool
    ) -> None:
        try:
            found = self.dict.incr(key, by, ttl, minimum, maximum, renew=renew)
        except TypeError:
            found = math.nan
        there = key in self.model
        number = self.use(key) if there else 0
        if not isinstance(number, int):
            assert found is math.nan
        elif (minimum is not None and number + by < minimum) or (maximum is not None and number + by > maximum):
            assert found is None
        else:
            assert found == number + by
            self.write(key, number + by, ttl, self.model[key][1] if there and not renew else None)

    @rule(key=keys, ttl=times)
    def renew(self, key: Any, ttl: float | None) -> None:
        expected = "default"
        if key in self.model:
            expected = self.use(key)
            self.write(key, expected, ttl)
        assert self.dict.renew(key, "default", ttl) == expected

    @rule()
    def size(self) -> None:
        assert self.dict.size() == len(self.model)

    @rule()
    def clear(self) -> None:
        self.dict.clear()
        self.model.clear()

    @rule(parts=st.integers(1, 5))
    def keys_in_parts(self, parts: int) -> None:
        found = [key for part in range(parts) for key in self.dict.keys(part, parts) or ()]
        assert (len(found), {*found}) == (len(self.model), {*self.model})

    @invariant()
    def the_same_keys_are_there(self) -> None:
        """Use `has`, which changes nothing: `size` would remove expired entries."""
        assert [self.dict.has(key) for key in _KEYS] == [key in self.model for key in _KEYS]


class TheRulesAtLength(TheRules):
    pass


TestTheRules = TheRules.TestCase
TestTheRules.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestTheRulesAtLength = pytest.mark.slow(TheRulesAtLength.TestCase)
TestTheRulesAtLength.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def test_an_entry_that_expires_while_it_is_set_is_not_an_error() -> None:
    """The clock is read more than once in a call, and advances in between."""
    for ttl in (1, 1.5, 2, 3):
        bounded = BoundedDict(10, count().__next__)
        assert [bounded.setdefault("k", "v", ttl) for _ in range(5)] == ["v"] * 5


@pytest.mark.slow
def test_keys_with_equal_hashes_are_listed_in_parts() -> None:
    """Python's hash of an int is its remainder by 2**61 - 1: 1 for all of these, which are too large for one answer."""
    alike = [2 ** (61 * count) for count in range(1000)]
    assert {hash(number) for number in alike} == {1}
    bounded = BoundedDict(1000, Clock())
    for number in alike:
        bounded.set(number, None, None)
    assert bounded.keys(0, 1) is None
    assert sorted(SharedDict(bounded, None).keys()) == alike


@pytest.fixture(params=["memory", pytest.param("manager", marks=pytest.mark.slow)])
def state(request: pytest.FixtureRequest, on_demand: str) -> Iterator[State]:
    with open_state("memory://" if request.param == "memory" else on_demand, deadline=PATIENCE) as state:
        yield state


def test_a_shared_dict_behaves_like_a_dict(state: State) -> None:
    shared, plain = state.dict("d"), dict[Any, Any]()
    for either in (shared, plain):
        either["a"] = 1
        either["é"] = None
        either[1, None] = [1, (2,)]
        either[1.5] = {"b": b"\x00"}
    for read in (
        lambda d: [d[key] for key in plain],
        lambda d: [d.get("a"), d.get("é", 1), d.get("no"), d.get("no", 2)],
        lambda d: ["a" in d, "é" in d, "no" in d, 1.5 in d],
        lambda d: {*d} == {*d.keys()} == {*plain},
        lambda d: [d.setdefault("a", 9), d.setdefault("é", 9), d.setdefault("new", 9), d.setdefault("newer")],
        lambda d: [d.pop("a"), d.pop("a", 3), d.pop("a", None), d.pop("é", 4)],
        lambda d: d.__delitem__("new"),
        lambda d: (len(d), sorted(map(repr, d))),
        lambda d: d.clear(),
        lambda d: (len(d), list(d), "a" in d),
    ):
        assert read(shared) == read(plain)
    for key in ("ключ", (1, "no"), None):
        for missing in (lambda: shared[key], lambda: shared.pop(key), lambda: shared.__delitem__(key)):
            with pytest.raises(KeyError) as error:
                missing()
            assert error.value.args == (key,)
    with pytest.raises(InvalidRequest, match="already has that name"):
        state.dict("d", max_entries=6)
    state.dict("d", ttl=60)["k"] = 1
    assert (shared["k"], shared.keys()) == (1, ["k"])
    default = object()  # it is not sent
    assert shared.get("none", default) is shared.pop("none", default) is default


def test_a_key_or_value_that_cannot_be_kept_changes_nothing(state: State) -> None:
    shared = state.dict("d")
    shared["a"] = 1
    unhashable: list[Any] = [[], {}, ([],), [{"a": 1}]]
    others: list[Any] = [1j, object(), "\ud800", "x" * (LARGEST_VALUE + 1)]
    calls: list[Callable[[Any], object]] = [
        *(shared.get, shared.setdefault, shared.incr, shared.__contains__, shared.__getitem__),
        *(lambda key: shared.set(key, 1), lambda key: shared.pop(key, None)),
    ]
    for call in calls:
        for key in unhashable:
            with pytest.raises(TypeError, match="unhashable"):
                call(key)
        for key in others:
            with pytest.raises(InvalidRequest):
                call(key)
    for value in others:
        with pytest.raises(InvalidRequest):
            shared.set("a", value)
    assert (shared["a"], len(shared)) == (1, 1)
    shared["large"] = large = "x" * (LARGEST_VALUE - 100)
    assert shared["large"] == shared.get("large") == shared.pop("large") == large


def test_only_numbers_within_their_bounds_are_incremented(state: State) -> None:
    shared = state.dict("d")
    assert [shared.incr("n"), shared.incr("n", 2), shared.incr("n", -4), shared.incr("n", 0)] == [1, 3, -1, -1]
    assert [shared.incr("big", 2**200), shared.incr("big")] == [2**200, 2**200 + 1]
    assert [shared.incr("f", 0.5), shared.incr("f")] == [0.5, 1.5]
    assert repr(shared.incr("n", 6)) == "5"  # it stays an int
    others: list[Any] = ["1", b"1", None, [1], (), {}]
    for value in others:
        shared["v"] = value
        for by in (1, 0.5, value):
            for bounds in ({}, {"minimum": 0, "maximum": 10}):
                with pytest.raises(TypeError):
                    shared.incr("v", by, **bounds)
        assert shared["v"] == value
        with pytest.raises(TypeError):
            shared.incr("none", value)
    refused: list[Any] = [
        *((1, {"maximum": 5}), (-1, {"minimum": 5}), (0.5, {"maximum": 5.25}), (10**5000, {"maximum": 5})),
        *((math.inf, {"maximum": 5}), (math.nan, {"maximum": 5}), (math.nan, {"minimum": 5})),
        *((1, {"maximum": math.nan}), (1, {"minimum": 10, "maximum": 0})),
    ]
    for by, bound in refused:
        with pytest.raises(LimitReached) as limit:
            shared.incr("n", by, **bound)
        assert limit.value.outcome == "not_applied"
    with pytest.raises(LimitReached):
        shared.incr("none", minimum=2)
    assert (shared["n"], "none" in shared) == (5, False)
    assert [shared.incr("n", 1, maximum=6), shared.incr("n", -1, minimum=5)] == [6, 5]


def test_an_invalid_time_to_live_or_size_is_refused_and_nothing_is_set() -> None:
    ttls: list[Any] = [True, 0, -1, 0.0, math.nan, math.inf, "1", [], 10**400]
    sizes: list[Any] = [True, 0, -1, 1.0, math.nan, math.inf, "1", None, []]
    with open_state("memory://") as state:
        for size in sizes:
            with pytest.raises(InvalidRequest, match="maximum number of entries"):
                state.dict("d", max_entries=size)
        for ttl in ttls:
            with pytest.raises(InvalidRequest, match="ttl"):
                state.dict("d", max_entries=5, ttl=ttl)
        assert state.declarations == {}
        shared = state.dict("d")
        calls: list[Callable[..., object]] = [partial(shared.set, value=1), shared.setdefault, shared.incr]
        for ttl in ttls:
            for call in calls:
                with pytest.raises(InvalidRequest, match="ttl"):
                    call("k", ttl=ttl)
        assert len(shared) == 0


def test_entries_leave_for_newer_ones_or_after_their_time_to_live(state: State) -> None:
    full, brief, lasting = state.dict("full", max_entries=3), state.dict("brief", ttl=0.05), state.dict("lasting")
    for number in range(10):
        full[number] = number
        assert (full.get(0), len(full)) == (0, min(number + 1, 3))
    assert sorted(full) == [0, 8, 9]
    brief["dict's"] = lasting["dict's"] = 1
    brief.set("own", 1, ttl=3600)
    writes: list[Callable[..., object]] = [partial(lasting.set, value=1), lasting.incr, lasting.setdefault]
    for key, write in enumerate(writes):
        write(key, ttl=0.05)
    eventually(lambda: len(brief) == len(lasting) == 1, "the expiry of the brief entries")
    assert (brief.keys(), lasting.keys()) == (["own"], ["dict's"])


def test_keys_too_large_for_one_answer_come_in_several(state: State) -> None:
    shared, large = state.dict("d"), state.dict("large")
    expected: set[Any] = {f"{number} ключ ".ljust(20_000, "x") for number in range(120)}
    expected |= {*range(100), *((number, b"x" * 20_000) for number in range(40))}
    for key in expected:
        shared[key] = None
    found = shared.keys()
    assert len(found) == len(shared) == len(expected)
    assert {*found} == {*shared} == expected
    for letter in "abc":
        large[letter * (LARGEST_VALUE - 100)] = 1  # a key may be as large as a call
    assert sorted(key[0] for key in large) == ["a", "b", "c"]


def test_of_many_simultaneous_setdefaults_or_pops_exactly_one_wins(state: State) -> None:
    shared, numbers = state.dict("d"), iter(range(1000))
    first = at_once(16, lambda: shared.setdefault("k", next(numbers)))
    assert len({*first}) == 1
    assert sorted(at_once(16, lambda: shared.pop("k", -1))) == [-1] * 15 + first[:1]
