"""Shards: every name in one of them, the same on every machine, and about equally long."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.case import Case, CaseReport, Outcome
from harness.errors import ReportError, UsageError
from harness.layout import Layout
from harness.report import to_json, write_report
from harness.shards import Shard, cases_of_shard, divide, duration_name, recorded_seconds, shard_named

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parent.parent
NAMES = st.lists(st.text(min_size=1, max_size=8), max_size=40, unique=True)
COUNTS = st.integers(1, 9)


def test_a_shard_by_its_text() -> None:
    assert Shard.parse("2/5") == Shard(2, 5)
    assert str(Shard.parse(" 1/1 ")) == "1/1"


@pytest.mark.parametrize("text", ["", "2", "0/5", "6/5", "-1/5", "2/0", "a/b", "2/5/7", "1.5/2"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(UsageError) as raised:
        Shard.parse(text)
    assert str(raised.value) == f"shard {text!r} is not a number and of how many, from 1/5 to 5/5"


@given(NAMES, COUNTS, st.data())
def test_every_name_is_in_one_shard_whatever_the_order(
    names: list[str], count: int, data: st.DataObject
) -> None:
    timed = data.draw(st.dictionaries(st.sampled_from(names or [""]), st.floats(0, 1e4)))
    shards = [Shard(number, count, timed).of(names) for number in range(1, count + 1)]
    assert Counter(name for shard in shards for name in shard) == Counter(names)
    assert divide(data.draw(st.permutations(names)), count, timed) == divide(names, count, timed)


@given(NAMES, COUNTS)
def test_without_durations_they_are_balanced_by_count(names: list[str], count: int) -> None:
    sizes = Counter(dict.fromkeys(range(1, count + 1), 0))
    sizes.update(divide(names, count, {}).values())
    assert max(sizes.values()) - min(sizes.values()) <= 1


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.floats(0.1, 100), min_size=1, max_size=40), COUNTS)
def test_with_durations_no_shard_is_much_longer(timed: dict[str, float], count: int) -> None:
    loads = [0.0] * count
    for name, number in divide(timed, count, timed).items():
        loads[number - 1] += timed[name]
    # Graham's bound: the longest shard had least to do when its last name came.
    assert max(loads) <= sum(loads) / count + max(timed.values()) + 1e-6
    assert max(loads) - min(loads) <= max(timed.values()) + 1e-6


def test_a_name_without_a_duration_counts_as_the_median() -> None:
    timed = {"long": 10.0, "usual": 2.0, "short": 2.0}
    shards = divide([*timed, *(f"new {number}" for number in range(6))], 2, timed)
    # 10 and 2 and 2 against six times 2, or 10 against them all where new ones counted for nothing.
    assert Counter(shards.values())[shards["long"]] == 3


def test_neighbours_are_spread() -> None:
    names = [
        f"preset{preset}-{recipe}"
        for preset in range(40)
        for recipe in ("fp8", "nvfp4", "int4_awq", "parity")
    ]
    shards = divide(names, 4, {})
    slow = Counter(shards[name] for name in names if name.endswith("int4_awq"))
    assert max(slow.values()) < 20


def test_another_process_divides_alike() -> None:
    names = [f"tests/test_{index}.py::test" for index in range(30)]
    shuffled = random.Random(5).sample(names, len(names))
    code = f"from harness.shards import divide; print(sorted(divide({shuffled!r}, 3, {{}}).items()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(sorted(divide(names, 3, {}).items()))


def case(preset: str, recipe: str = "fp8", device: str = "cpu", layout: str = "tp1") -> Case:
    return Case(preset, f"presets/{preset}.sh", recipe, Layout.parse(layout), device)


def test_durations_are_those_of_a_report() -> None:
    reports = [
        CaseReport(case("Qwen/A"), Outcome.PASSED, 3.0),
        CaseReport(case("Qwen/B"), Outcome.FAILED, 4.0),
        CaseReport(case("Qwen/C"), Outcome.ERROR, 300.0),
        CaseReport(case("Qwen/D"), Outcome.SKIPPED, 0.0),
    ]
    assert recorded_seconds(reports) == {"Qwen/A-fp8-tp1": 3.0, "Qwen/B-fp8-tp1": 4.0}
    # A record made without a GPU serves a machine that has one.
    assert duration_name(case("Qwen/A", device="cuda:0")) == "Qwen/A-fp8-tp1"


def test_the_cases_of_a_shard_keep_their_order() -> None:
    cases = [case(f"Qwen/{letter}", recipe) for letter in "ABCDE" for recipe in ("fp8", "nvfp4")]
    parts = [cases_of_shard(cases, Shard(number, 3)) for number in (1, 2, 3)]
    assert sorted(len(part) for part in parts) == [3, 3, 4]
    assert all(list(part) == [entry for entry in cases if entry in part] for part in parts)
    assert {entry for part in parts for entry in part} == set(cases)


def test_more_shards_than_cases() -> None:
    cases = [case("Qwen/A"), case("Qwen/B")]
    empty = next(
        shard
        for shard in (Shard(number, 3) for number in (1, 2, 3))
        if not shard.of(map(duration_name, cases))
    )
    with pytest.raises(UsageError, match=r"shard ./3 is empty: there are fewer cases than shards \(2\)"):
        cases_of_shard(cases, empty)


def test_a_shard_as_it_is_asked_for(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    write_report(report, to_json([CaseReport(case("Qwen/A"), Outcome.PASSED, 3.0)], env={}))
    assert shard_named(None, None) is None
    assert shard_named("2/5", None) == Shard(2, 5)
    assert shard_named("2/5", str(report)) == Shard(2, 5, {"Qwen/A-fp8-tp1": 3.0})
    with pytest.raises(UsageError, match="--shard-durations balances shards: say which one with --shard"):
        shard_named(None, str(report))
    with pytest.raises(ReportError, match="cannot be read"):
        shard_named("2/5", str(tmp_path / "none.json"))


# ---- pytest ----

TESTS = """
import pytest

@pytest.mark.parametrize("number", range(10))
def test_one(number):
    pass

def test_other():
    pass
"""


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """Eleven tests, and two presets with two cases each."""
    pytester.makepyfile(test_many=TESTS)
    for name in ("A", "B"):
        path = pytester.path / "presets" / "Qwen" / f"{name}.sh"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("MODEL_ARGS=' --num-layers 2'\n")
    return pytester


def collected(suite: pytest.Pytester, *arguments: str) -> tuple[list[str], pytest.RunResult]:
    plugins = (
        "-p",
        "harness.pytest_plugin",
        "-p",
        "no:cacheprovider",
        "--device",
        "cpu",
        "--recipe",
        "fp8,nvfp4",
    )
    result = suite.runpytest_subprocess(*plugins, "--collect-only", "-q", *arguments)
    return [line for line in result.outlines if "::" in line and " " not in line], result


def test_pytest_collects_every_item_in_one_shard(suite: pytest.Pytester) -> None:
    everything, _ = collected(suite, ".", "presets")
    assert len(everything) == 11 + 4
    parts = []
    for number in (1, 2, 3):
        part, result = collected(suite, ".", "presets", "--shard", f"{number}/3")
        assert len(part) == 5
        result.stdout.fnmatch_lines(["*5/15 tests collected (10 deselected)*"])
        parts += part
    assert sorted(parts) == sorted(everything)


def test_a_shard_is_of_what_the_other_options_leave(suite: pytest.Pytester) -> None:
    parts = [collected(suite, "-k", "test_one", "--shard", f"{number}/2")[0] for number in (1, 2)]
    assert [len(part) for part in parts] == [5, 5]


def test_recorded_durations_balance_the_cases(suite: pytest.Pytester) -> None:
    seconds = {
        ("Qwen/A", "fp8"): 9.0,
        ("Qwen/A", "nvfp4"): 1.0,
        ("Qwen/B", "fp8"): 1.0,
        ("Qwen/B", "nvfp4"): 1.0,
    }
    reports = [CaseReport(case(*name), Outcome.PASSED, value) for name, value in seconds.items()]
    write_report(suite.path / "report.json", to_json(reports, env={}))
    arguments = ("presets", "--shard-durations", "report.json", "--shard")
    parts = [collected(suite, *arguments, f"{number}/2")[0] for number in (1, 2)]
    assert ["presets/Qwen/A.sh::fp8"] in parts


def test_workers_of_xdist_agree(suite: pytest.Pytester) -> None:
    plugins = ("-p", "harness.pytest_plugin", "-p", "no:cacheprovider", "--device", "cpu")
    passed = 0
    for number in (1, 2):
        result = suite.runpytest_subprocess(*plugins, "-n", "2", "test_many.py", "--shard", f"{number}/2")
        passed += result.parseoutcomes()["passed"]
    assert passed == 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "3/2"], "*shard '3/2' is not a number and of how many, from 1/5 to 5/5*"),
        (["--shard", "1/2", "--shard-durations", "none.json"], "*report none.json cannot be read*"),
    ],
)
def test_what_pytest_refuses(suite: pytest.Pytester, arguments: list[str], message: str) -> None:
    _, result = collected(suite, *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])
