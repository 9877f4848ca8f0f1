"""The shortest sequence of layers that has every adjacent pair, against a search through all of them."""

from __future__ import annotations

import random
from heapq import heappop, heappush
from itertools import pairwise
from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.shrink.walk import shortest_walk


def at_least(least: int, multiple: int = 1):  # type: ignore[no-untyped-def]
    return lambda length: length >= least and length % multiple == 0


@pytest.mark.parametrize(
    ("kinds", "least", "walk"),
    [
        ([0], 1, [0]),
        ([0] * 94, 1, [0, 0]),
        ([0] * 94, 4, [0, 0, 0, 0]),
        ([0] + [1] * 26, 1, [0, 1, 1]),
        ([0] * 3 + [1] * 58, 1, [0, 0, 1, 1]),
        ([0, 1] * 24, 1, [0, 1, 0]),
        ([0, 0, 0, 1] * 12, 1, [0, 0, 1, 0]),
    ],
    ids=["one", "alike", "one-per-stage", "dense-first", "three-dense", "alternating", "every-fourth"],
)
def test_layers_shrink_to_the_shortest_walk(kinds: list[int], least: int, walk: list[int]) -> None:
    found = shortest_walk(kinds, at_least(least))
    assert len(found) == len(walk)
    assert_walks(found, kinds)


def assert_walks(found: list[int], kinds: list[int]) -> None:
    assert found[0] == kinds[0]
    assert set(found) == set(kinds)
    assert set(pairwise(found)) == set(pairwise(kinds))


def fewest(kinds: list[int], dear: set[int]) -> tuple[int, int]:
    """Layers, and layers of the dear kinds, of the best walk, by Dijkstra over the pairs that are seen."""
    pairs = sorted(set(pairwise(kinds)))
    start = (kinds[0], frozenset[tuple[int, int]]())
    best = {start: (1, int(kinds[0] in dear))}
    queue = [(*best[start], kinds[0], sorted(start[1]))]
    while True:
        layers, dears, kind, seen = heappop(queue)
        if len(seen) == len(pairs):
            return layers, dears
        for pair in pairs:
            if pair[0] == kind:
                state = (pair[1], frozenset([*seen, pair]))
                cost = (layers + 1, dears + (pair[1] in dear))
                if cost < best.get(state, (len(kinds) + 1, 0)):
                    best[state] = cost
                    heappush(queue, (*cost, pair[1], sorted(state[1])))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=14), st.sets(st.integers(0, 3), max_size=3))
def test_no_walk_is_shorter_or_has_fewer_dear_layers(kinds: list[int], dear: set[int]) -> None:
    found = shortest_walk(kinds, dear=dear)
    assert_walks(found, kinds)
    assert (len(found), sum(kind in dear for kind in found)) == fewest(kinds, dear)
    assert found == shortest_walk(kinds, dear=dear)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 12), st.integers(1, 4))
def test_a_longer_walk_is_as_long_as_asked_or_the_layers_themselves(
    kinds: list[int], least: int, multiple: int
) -> None:
    found = shortest_walk(kinds, at_least(least, multiple))
    assert_walks(found, kinds)
    assert at_least(least, multiple)(len(found)) or found == kinds
    assert len(found) <= len(kinds)


@pytest.mark.parametrize("kinds", [1, 2, 5, 8])
def test_ten_thousand_layers_take_no_time(kinds: int) -> None:
    chance = random.Random(kinds)
    layers = [chance.randrange(kinds) for _ in range(10_000)]
    start = perf_counter()
    found = shortest_walk(layers, at_least(7, 4), {0})
    assert perf_counter() - start < 1
    assert_walks(found, layers)
    assert len(found) <= kinds * kinds + 8


def test_dear_layers_are_passed_by_where_another_way_is_as_short() -> None:
    # From 3 back to 0 there are two ways of the same length, through 1 and through 2.
    kinds = [0, 1, 0, 2, 0, 3, 1, 0, 3, 2, 0, 3]
    for dear in (1, 2):
        walk = shortest_walk(kinds, dear={dear})
        assert walk.count(dear) <= walk.count(3 - dear)
