"""Walk: the kinds of a model's layers, in order -> the shortest sequence with the same adjacent pairs.

Kinds are numbers. A pair of adjacent kinds is an edge, and a sequence that has every edge at least once a
walk: the directed Chinese postman problem from the first kind to any. It is solved exactly, by a
minimum-cost flow over the edges that are walked again; the kinds are few, however many the layers.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

Edge = tuple[int, int]

# One layer more outweighs any number of layers of the dear kinds.
_LAYER = 1 << 20


def shortest_walk(
    kinds: Sequence[int],
    fits: Callable[[int], bool] = lambda length: True,
    dear: Collection[int] = (),
) -> list[int]:
    """The shortest sequence with the first and exactly the adjacent pairs of ``kinds``, whatever its last.

    Among the shortest one with the fewest layers of the ``dear`` kinds. Where its length does not fit it is
    lengthened by the shortest detours, or ``kinds`` itself is the answer where that is no longer. The same
    arguments give the same sequence.
    """
    edges = sorted(set(pairwise(kinds)))
    cost = {edge: _LAYER + (edge[1] in dear) for edge in edges}
    found = []
    for last in sorted(set(kinds)):
        again = _again(edges, cost, kinds[0], last)
        if again is None:
            continue
        walk: list[int] | None = _euler(kinds[0], [*edges, *again])
        if walk is not None and not fits(len(walk)):
            walk = _lengthened(walk, cost, fits, len(kinds))
        if walk is not None and len(walk) <= len(kinds):
            found.append(walk)
    return min(found, key=lambda walk: sum(cost[edge] for edge in pairwise(walk)), default=list(kinds))


def _again(edges: Iterable[Edge], cost: Mapping[Edge, int], first: int, last: int) -> list[Edge] | None:
    """The edges to walk again so that one walk from ``first`` to ``last`` has them all, cheapest.

    None where there is no such walk.
    """
    spare: Counter[int] = Counter()  # times that a kind is entered more often than left
    for before, after in edges:
        spare[after] += 1
        spare[before] -= 1
    spare[first] += 1
    spare[last] -= 1
    flow: Counter[Edge] = Counter()
    while any(count > 0 for count in spare.values()):
        path = _cheapest_path(spare, cost, flow)
        if path is None:
            return None
        for edge, step in path:
            flow[edge] += step
        start = path[0][0][0] if path[0][1] > 0 else path[0][0][1]
        end = path[-1][0][1] if path[-1][1] > 0 else path[-1][0][0]
        spare[start] -= 1
        spare[end] += 1
    return [edge for edge in sorted(flow) for _ in range(flow[edge])]


def _cheapest_path(
    spare: Mapping[int, int], cost: Mapping[Edge, int], flow: Mapping[Edge, int]
) -> list[tuple[Edge, int]] | None:
    """From a kind entered too often to one left too often: edges walked again (1) or no longer (-1).

    None where there is no way.
    Bellman-Ford over the residual edges, as a flow taken back has a negative cost.
    """
    distance = {kind: 0 for kind, count in sorted(spare.items()) if count > 0}
    came: dict[int, tuple[int, Edge, int]] = {}
    changed = True
    while changed:
        changed = False
        for edge, price in cost.items():
            steps = [(edge[0], edge[1], price, 1)]
            if flow.get(edge, 0) > 0:
                steps.append((edge[1], edge[0], -price, -1))
            for start, end, far, step in steps:
                if start in distance and distance[start] + far < distance.get(end, distance[start] + far + 1):
                    distance[end] = distance[start] + far
                    came[end] = (start, edge, step)
                    changed = True
    ends = [(far, kind) for kind, far in distance.items() if spare.get(kind, 0) < 0]
    if not ends:
        return None
    end = min(ends)[1]
    path: list[tuple[Edge, int]] = []
    while end in came:
        end, edge, step = came[end]
        path.append((edge, step))
    return path[::-1]


def _euler(first: int, edges: Iterable[Edge]) -> list[int]:
    """The walk from ``first`` that takes every edge once (Hierholzer), lower kinds first."""
    onward: dict[int, list[int]] = {}
    for before, after in sorted(edges, reverse=True):
        onward.setdefault(before, []).append(after)
    stack, walk = [first], []
    while stack:
        if onward.get(stack[-1]):
            stack.append(onward[stack[-1]].pop())
        else:
            walk.append(stack.pop())
    return walk[::-1]


def _lengthened(
    walk: Sequence[int], cost: Mapping[Edge, int], fits: Callable[[int], bool], most: int
) -> list[int] | None:
    """``walk`` with the fewest, cheapest layers added that make it fit, None where that exceeds ``most``."""
    detours = _closed_walks(cost)
    # For each number of layers more: its cost and the length of the last detour.
    best: list[tuple[int, int] | None] = [(0, 0)]
    for more in range(most - len(walk) + 1):
        if more:
            ways = [
                (known[0] + price, length)
                for length, (price, _) in sorted(detours.items())
                if length <= more and (known := best[more - length]) is not None
            ]
            best.append(min(ways, default=None))
        if best[more] is not None and fits(len(walk) + more):
            return _with_detours(walk, detours, best, more)
    return None


def _with_detours(
    walk: Sequence[int],
    detours: Mapping[int, tuple[int, list[int]]],
    best: Sequence[tuple[int, int] | None],
    more: int,
) -> list[int]:
    taken: Counter[int] = Counter()
    while more:
        step = best[more]
        assert step is not None
        taken[step[1]] += 1
        more -= step[1]
    found = list(walk)
    for length, times in sorted(taken.items()):
        detour = detours[length][1]
        place = found.index(detour[0])
        found[place:place] = chain.from_iterable([detour] * times)
    return found


def _closed_walks(cost: Mapping[Edge, int]) -> dict[int, tuple[int, list[int]]]:
    """By length, the cheapest walk from a kind back to it: its cost, and its kinds but for the return.

    Any longer one is made of these.
    """
    kinds = sorted({kind for edge in cost for kind in edge})
    found: dict[int, tuple[int, list[int]]] = {}
    for start in kinds:
        reached: dict[int, tuple[int, list[int]]] = {start: (0, [])}
        for length in range(1, len(kinds) + 1):
            further: dict[int, tuple[int, list[int]]] = {}
            for kind, (far, path) in sorted(reached.items()):
                for edge, price in cost.items():
                    if edge[0] == kind:
                        way = (far + price, [*path, kind])
                        further[edge[1]] = min(further.get(edge[1], way), way)
            reached = further
            if start in reached:
                found[length] = min(found.get(length, reached[start]), reached[start])
    return found
