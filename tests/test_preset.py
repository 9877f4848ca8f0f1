"""Presets that are wrong as files, as text or as values, presets by name, and presets that want to run."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from time import perf_counter

import pytest
from broken import MOE, PRESETS, TEXTS, edit, errors, line_of, lint_copy, within, write_copy
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.case import Case, Outcome
from harness.errors import UnknownPreset, UsageError
from harness.families import Expectation, expectations
from harness.finding import Finding, Severity
from harness.layout import Layout
from harness.pipeline import blueprint, check, lint
from harness.preset import Preset, PresetFile, discover, find, find_presets, load_preset, preset_at
from harness.reference import facts_beside

DENSE = TEXTS["Qwen3-8B"]
SECONDS = 2.0  # a preset takes milliseconds; the rest is a busy machine


def lint_text(folder: Path, text: str | bytes, name: str = "Qwen3-8B") -> tuple[Finding, ...]:
    """The findings of a text that must fail."""
    with within(SECONDS):
        report = lint_copy(folder, name, text)
    assert report.outcome is Outcome.FAILED
    return report.findings


# Words


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        pytest.param(
            "--num-layer", "36", "no flag --num-layer .*did you mean --num-layers?", id="unknown-flag"
        ),
        pytest.param("--num_query_groups", "8", "did you mean --num-query-groups", id="underscores"),
        pytest.param("-num-layers", "36", "did you mean --num-layers", id="one-dash"),
        pytest.param("--frobnicate-the-lot", "", "Megatron 0.19 refuses it", id="unlike-any-flag"),
        pytest.param("--num-layers", "", "takes one value, given none", id="missing-value"),
        pytest.param("--num-layers", "many", "expected a whole number", id="text-for-a-number"),
        pytest.param("--num-layers", "36.0", "expected a whole number; write 36", id="fraction-for-a-number"),
        pytest.param("--rotary-base", "1e6", "expected a whole number; write 1000000", id="exponent"),
        pytest.param("--norm-epsilon", "nan", "expected a finite number", id="not-a-number"),
        pytest.param("--normalization", "rmsnorm", "expected one of .*; write RMSNorm", id="not-a-choice"),
        pytest.param(
            "--swiglu", "true", "true belongs to no flag: --swiglu before it takes no value", id="switch"
        ),
        pytest.param("--fp16", "", "Megatron refuses both precisions at once", id="bf16-and-fp16"),
        pytest.param("--squared-relu", "", "Megatron refuses both activations at once", id="two-activations"),
        pytest.param("--seq-length", "65536", "larger than --max-position-embeddings", id="too-long"),
        pytest.param("--num-query-groups", "7", "32 heads / 7 groups is not whole", id="groups"),
        pytest.param("--moe-router-topk", "8", "has no effect without --num-experts", id="top-k-of-nothing"),
        pytest.param("--moe-layer-freq", "[1]*", "expected a whole number, or a list", id="half-a-list"),
        pytest.param("--moe-layer-freq", "[0]*999999999", "a list of at most 1000", id="endless-list"),
    ],
)
def test_a_wrong_word_is_a_finding_with_its_line(flag: str, value: str, message: str, tmp_path: Path) -> None:
    text = edit(DENSE, flag, value)
    found = [
        finding
        for finding in errors(lint_text(tmp_path, text), "parse")
        if re.search(message, finding.message)
    ]
    assert [(finding.flag, finding.line) for finding in found] == [(flag, line_of(text, flag))]


def test_a_flag_given_twice_names_both_lines(tmp_path: Path) -> None:
    text = DENSE.replace(
        "    --hidden-size 4096 \\\n", "    --hidden-size 4096 \\\n    --hidden-size 2048 \\\n"
    )
    line = line_of(text, "--hidden-size")
    assert line is not None
    (finding,) = errors(lint_text(tmp_path, text), "parse")
    assert finding.message.startswith(f"--hidden-size 2048 contradicts --hidden-size 4096 on line {line}")
    assert (finding.flag, finding.line) == ("--hidden-size", line + 1)


def test_query_groups_without_grouped_attention(tmp_path: Path) -> None:
    text = edit(DENSE, "--group-query-attention", None)
    (finding,) = errors(lint_text(tmp_path, text), "parse")
    assert "has no effect without --group-query-attention" in finding.message
    assert (finding.flag, finding.line) == ("--num-query-groups", line_of(text, "--num-query-groups"))


# Text

OPENS = next(row for row, words in enumerate(DENSE.splitlines(), 1) if words.startswith("MODEL_ARGS="))
AFTER = DENSE.count("\n") + 1


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        pytest.param("", "does not set MODEL_ARGS", 1, id="empty-file"),
        pytest.param("\n\n", "does not set MODEL_ARGS", 1, id="blank-lines"),
        pytest.param("#!/bin/bash\n# MODEL_ARGS=x\n", "does not set MODEL_ARGS", 1, id="comments"),
        pytest.param("ARGS='--num-layers 1'\n", "does not set MODEL_ARGS", 1, id="another-variable"),
        pytest.param("model_args='--num-layers 1'\n", "does not set MODEL_ARGS", 1, id="lower-case"),
        pytest.param("\nMODEL_ARGS=\n", "MODEL_ARGS is empty", 2, id="empty-arguments"),
        pytest.param("\nMODEL_ARGS=' \t '\n", "MODEL_ARGS is empty", 2, id="blank-arguments"),
        pytest.param("\nMODEL_ARGS=()\n", "MODEL_ARGS is empty", 2, id="empty-array"),
        pytest.param(DENSE[: DENSE.rindex('"')], "never closed", OPENS, id="open-quote"),
        pytest.param(DENSE.replace("\n", "\r\n"), "carriage return", 1, id="crlf"),
        pytest.param("\ufeff" + DENSE, "byte order mark", 1, id="byte-order-mark"),
        pytest.param(b"\x7fELF\x02\x01\x01\x00" * 99, "not a text file", 1, id="binary"),
        pytest.param(DENSE.encode() + b"# \xff\xfe\n", "not a text file", AFTER, id="not-utf-8"),
        pytest.param(DENSE.encode() + b"\0", "not a text file", AFTER, id="nul"),
    ],
)
def test_a_text_that_is_no_preset(text: str | bytes, message: str, line: int, tmp_path: Path) -> None:
    findings = errors(lint_text(tmp_path, text))
    assert [(finding.stage, finding.line) for finding in findings if message in finding.message] == [
        ("parse", line)
    ]


# Files


def directory(path: Path) -> None:
    path.mkdir()


def sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(50 << 20)


def loop(path: Path) -> None:
    path.symlink_to(path)


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def fifo(path: Path) -> None:
    os.mkfifo(path)


def missing(path: Path) -> None:
    assert not path.exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (directory, "is a directory"),
        (sparse, "larger than|more than"),
        (loop, "is a link to .*X.sh, which leads to no file"),
        (dangling, "is a link to .*nowhere, which leads to no file"),
        (fifo, "not a regular file"),
        (missing, "not a regular file|cannot be read"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_file_that_cannot_be_a_preset(make, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "X.sh"
    make(path)
    with within(SECONDS):
        report = lint(preset_at(path))
    assert report.outcome is Outcome.FAILED
    (finding,) = report.findings
    assert re.search(message, finding.message)
    assert [stage.outcome for stage in report.stages] == [Outcome.FAILED, Outcome.SKIPPED, Outcome.SKIPPED]


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_copy(tmp_path, "Qwen3-8B", DENSE)

    def refuse(self: Path, *args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # the mode would not stop root
    (finding,) = load_preset(preset_at(path)).findings
    assert finding.is_error
    assert finding.message == f"{path} cannot be read: Permission denied"


def test_a_name_too_long_for_the_file_system(tmp_path: Path) -> None:
    report = lint(PresetFile("Org/Long", tmp_path / ("x" * 5000 + ".sh")))
    assert report.outcome is Outcome.FAILED


# Values


SIZES = (
    "--num-layers",
    "--hidden-size",
    "--ffn-hidden-size",
    "--num-attention-heads",
    "--num-query-groups",
    "--kv-channels",
    "--padded-vocab-size",
    "--rotary-base",
    "--max-position-embeddings",
    "--num-experts",
    "--moe-router-topk",
    "--moe-ffn-hidden-size",
    "--moe-layer-freq",
)
ABSURD = {
    "zero": "0",
    "minus-one": "-1",
    "million": str(10**6),
    "billion": str(10**9),
    "10-to-the-30": str(10**30),
    "10-to-the-400": str(10**400),
    "10-to-the-5000": "1" + "0" * 5000,
}
ABSURD_VALUES = [
    *(
        pytest.param("Qwen3-30B-A3B", {flag: value}, id=f"{flag[2:]}-{title}")
        for flag in SIZES
        for title, value in ABSURD.items()
        if (flag, title) != ("--rotary-base", "million")
    ),
    *(
        pytest.param(
            "Qwen3-8B",
            {flag: value, "--ffn-hidden-size": None, "--kv-channels": None},
            id=f"{flag[2:]}-{title}",
        )
        for flag in SIZES[:4:2]
        for title, value in ABSURD.items()
    ),
    pytest.param("Qwen3-30B-A3B", {"--moe-router-topk": "129"}, id="more-chosen-than-experts"),
    pytest.param("Qwen3-30B-A3B", {"--moe-layer-freq": "([0]*1+[1]*46)"}, id="pattern-too-short"),
    pytest.param("Qwen3-30B-A3B", {"--moe-layer-freq": "([0]*1+[1]*48)"}, id="pattern-too-long"),
    pytest.param("Qwen3-30B-A3B", {"--moe-layer-freq": "[]"}, id="pattern-empty"),
    pytest.param("Qwen3-30B-A3B", {"--moe-layer-freq": "([2]*48)"}, id="pattern-of-twos"),
    pytest.param(
        "Qwen3-8B", {"--padded-vocab-size": None, "--make-vocab-size-divisible-by": "0"}, id="padded-to-0"
    ),
    pytest.param(
        "Qwen3-8B",
        {"--padded-vocab-size": None, "--make-vocab-size-divisible-by": str(10**30)},
        id="padded-to-10-to-the-30",
    ),
    pytest.param("Qwen3-8B", {"--norm-epsilon": "-1"}, id="norm-epsilon-negative"),
    pytest.param("Qwen3-8B", {"--norm-epsilon": "1e-400"}, id="norm-epsilon-zero"),
    pytest.param("Qwen3-8B", {"--rotary-percent": "0"}, id="rotary-percent-zero"),
    pytest.param("Qwen3-8B", {"--rotary-percent": "1e300"}, id="rotary-percent-huge"),
    *(
        pytest.param(
            "Qwen3-8B",
            {"--num-attention-heads": str(size), "--num-query-groups": str(size)},
            id=f"{size}-heads",
        )
        for size in (10**6, 10**9)
    ),
]


@pytest.mark.parametrize("read", [lint, lambda file: blueprint(file, Layout())[0]], ids=["lint", "blueprint"])
@pytest.mark.parametrize(("name", "changes"), ABSURD_VALUES)
def test_absurd_values_are_findings_at_once(
    name: str, changes: dict[str, str | None], read, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    text = TEXTS[name]
    for flag, value in changes.items():
        text = edit(text, flag, value)
    file = preset_at(write_copy(tmp_path, name, text))
    with within(SECONDS):
        report = read(file)
    assert set(changes) & {finding.flag for finding in report.findings}
    if report.shrink is not None:
        assert int(str(report.shrink.after["parameters"])) < 10**9, "too much to build"
    # A longer limit of positions, and the width of dense layers in a model that has none, change no logit.
    harmless = ({"--max-position-embeddings": str(10**6)}, {"--ffn-hidden-size": str(10**6)})
    assert report.outcome is (Outcome.PASSED if changes in harmless else Outcome.FAILED)


# Names


def tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / f"{name}.sh"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(DENSE)
    return root


def found(names: list[str], root: Path) -> list[str]:
    return [file.name for file in find_presets(names, root)]


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen3-8B", "qwen/qwen3-8b", "Qwen3-8B", "QWEN3-8b", "Qwen3-8B.sh", "Qwen/Qwen3-8B.sh"]
)
def test_a_name_in_any_spelling(name: str, tmp_path: Path) -> None:
    assert found([name], tree(tmp_path, "Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B")) == ["Qwen/Qwen3-8B"]


def test_no_name_is_every_preset_in_order(tmp_path: Path) -> None:
    assert found([], tree(tmp_path, "B/b", "A/z", "a/C")) == ["a/C", "A/z", "B/b"]


def test_a_preset_named_twice_is_found_once(tmp_path: Path) -> None:
    assert found(["Qwen3-8B", "qwen/qwen3-8b"], tree(tmp_path, "Qwen/Qwen3-8B")) == ["Qwen/Qwen3-8B"]


def test_a_name_of_two_presets_lists_both(tmp_path: Path) -> None:
    root = tree(tmp_path, "One/Model", "Two/Model")
    with pytest.raises(
        UnknownPreset, match=r"'model' is the name of 2 presets: .*One/Model\.sh, .*Two/Model\.sh"
    ):
        find_presets(["model"], root)
    assert found(["two/model"], root) == ["Two/Model"]


def test_names_that_differ_in_case_only_are_told_apart(tmp_path: Path) -> None:
    root = tree(tmp_path, "Org/Model", "Org/model")
    assert found(["Org/model"], root) == ["Org/model"]
    with pytest.raises(UnknownPreset, match="2 presets"):
        find_presets(["ORG/MODEL"], root)


def test_an_unknown_name_lists_the_near_ones(tmp_path: Path) -> None:
    root = tree(tmp_path, "Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B", "Meta/Llama")
    with pytest.raises(UnknownPreset, match=r"no preset is called 'Qwen3-9B'; did you mean Qwen/Qwen3-8B"):
        find_presets(["Qwen3-9B"], root)
    with pytest.raises(UnknownPreset, match="3 presets are below"):
        find_presets(["zzzzzzzz"], root)


@pytest.mark.parametrize("name", ["", "/", "Qwen/", "*", "Qwen3-8B\n", "\0", "~", "x" * 5000])
def test_a_strange_name_is_unknown(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path / "presets", "Qwen/Qwen3-8B")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UsageError):
        find_presets([name] if name != "/" else ["/nowhere/"], root)


def test_paths_of_files_and_folders(tmp_path: Path) -> None:
    root = tree(tmp_path / "presets", "Qwen/Qwen3-8B")
    other = tree(tmp_path / "other", "Org/One", "Org/Two")
    assert found([str(other / "Org/One.sh")], root) == ["Org/One"]
    assert found([str(other), "Qwen3-8B"], root) == ["Org/One", "Org/Two", "Qwen/Qwen3-8B"]


def test_symbolic_links_are_followed(tmp_path: Path) -> None:
    root = tree(tmp_path / "presets", "Qwen/Qwen3-8B")
    (root / "Alias").mkdir()
    (root / "Alias" / "Other.sh").symlink_to(root / "Qwen" / "Qwen3-8B.sh")
    assert found(["other"], root) == ["Alias/Other"]
    assert load_preset(find_presets(["other"], root)[0]).findings == ()


@pytest.mark.parametrize("make", [Path.mkdir, missing, Path.touch], ids=["empty", "missing", "a-file"])
def test_a_tree_without_presets_is_an_error(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "presets")
    with pytest.raises(UsageError, match=r"no preset \(\*\.sh\) below|is not a directory of presets"):
        discover(tmp_path / "presets")
    with pytest.raises(UsageError):
        find_presets(["Qwen3-8B"], tmp_path / "presets")


# Presets that want to run

PLANTS = {
    "command": "touch MARK",
    "substitution": 'X="$(touch MARK)"',
    "backticks": "X=`touch MARK`",
    "in-the-arguments": 'MODEL_ARGS="$MODEL_ARGS $(touch MARK)"',
    "unquoted-substitution": "MODEL_ARGS+=$(touch MARK)",
    "eval": 'eval "touch MARK"',
    "redirection": ": > MARK",
    "bare-redirection": "> MARK",
    "append": "echo x >> MARK",
    "process-substitution": "cat <(touch MARK)",
    "pipe": "echo touch MARK | bash",
    "here-document": "bash << END\ntouch MARK\nEND",
    "here-string": "bash <<< 'touch MARK'",
    "background": "touch MARK & wait",
    "subshell": "(touch MARK)",
    "group": "{ touch MARK; }",
    "function": "f() { touch MARK; }; f",
    "trap": "trap 'touch MARK' EXIT",
    "environment-prefix": 'MODEL_ARGS="$MODEL_ARGS" touch MARK',
    "and": "true && touch MARK",
    "or": "false || touch MARK",
    "condition": "if touch MARK; then X=1; fi",
    "test-of-substitution": 'if [ -n "$(touch MARK)" ]; then X=1; fi',
    "loop": "for i in 1; do touch MARK; done",
    "while": "while ! touch MARK; do X=1; done",
    "case": "case x in x) touch MARK;; esac",
    "default-value": 'X="${UNSET_NAME:-$(touch MARK)}"',
    "assigned-default": 'X="${UNSET_NAME:=$(touch MARK)}"',
    "arithmetic": "X=$((a[$(touch MARK)0]))",
    "arithmetic-command": "(( a[$(touch MARK)0] ))",
    "array-element": "X=($(touch MARK))",
    "array-index": "X[$(touch MARK)0]=1",
    "declare": 'declare X="$(touch MARK)"',
    "export": 'export X="$(touch MARK)"',
    "source": "echo 'touch MARK' > MARK.sh; source MARK.sh",
    "exec": "exec touch MARK",
    "let": "let 'a[$(touch MARK)0]=1'",
    "prompt-expansion": "X='$(touch MARK)'; Y=\"${X@P}\"",
    "command-builtin": "command touch MARK",
    "negated": "! touch MARK",
    "coprocess": "coproc touch MARK; wait",
    "split-by-line-continuation": "tou\\\nch MARK",
    "quoted-name": "'touch' MARK",
    "variable-as-command": "T=touch; $T MARK",
    "select-arithmetic-for": "for ((i=$(touch MARK)0;i<1;i++)); do X=1; done",
}


@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)
def test_a_planted_command_is_never_run(plant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    monkeypatch.chdir(tmp_path)
    path = write_copy(tmp_path, "Qwen3-8B", DENSE + plant.replace("MARK", str(mark)) + "\n")
    subprocess.run(["bash", str(path)], check=False, capture_output=True)
    assert mark.exists(), "bash would not run it, so this proves nothing"
    mark.unlink()
    case = Case("Qwen/Qwen3-8B", str(path), "fp8", Layout(), "cpu")
    for report in (lint(preset_at(path)), check(case)):
        assert not mark.exists()
        assert report.outcome is Outcome.FAILED
        lines = range(DENSE.count("\n") + 1, DENSE.count("\n") + 2 + plant.count("\n"))
        assert any(finding.line in lines and finding.column for finding in errors(report.findings, "parse"))
    assert [stage.name for stage in report.stages] == list(case.stages)


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('pathlib').Path('mark').touch()",
        "[__import__('os').system('touch'+chr(32)+'mark')]",
        "([1]*(__import__('os').mkdir('mark')or(48)))",
    ],
    ids=["call", "in-a-list", "in-a-product"],
)
def test_a_planted_expression_is_never_evaluated(
    expression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    eval(expression)
    assert (tmp_path / "mark").exists()
    (tmp_path / "mark").rename(tmp_path / "made")
    text = edit(TEXTS["Qwen3-30B-A3B"], "--moe-layer-freq", expression)
    findings = lint_text(tmp_path, text, "Qwen3-30B-A3B")
    assert not (tmp_path / "mark").exists()
    assert line_of(text, "--moe-layer-freq") in {finding.line for finding in errors(findings, "parse")}


# Any text

PIECES = (
    *(
        "",
        " ",
        "\n",
        "\\\n",
        '"',
        "'",
        "\\",
        "$",
        "`",
        "#",
        ";",
        "|",
        "&",
        "(",
        ")",
        "{",
        "}",
        "<",
        ">",
        "*",
        "[0]",
    ),
    *(
        "\t",
        "\r",
        "\0",
        "=",
        "-",
        "--",
        "0",
        "-1",
        "1e9",
        "999999999",
        "1.5",
        "nan",
        "é",
        "\ud7ff",
        "${X}",
        "$(x)",
    ),
    *sorted({word for text in TEXTS.values() for word in text.split() if word.startswith("--")}),
    *("--squared-relu", "--fp16", "--window-size", "--num-experts", "--vocab-size", "--use-rope-scaling"),
    *("128", "64", "1", "2", "4096", "rope", "LayerNorm", "MODEL_ARGS=", "eval", "fi", "then"),
)
UNITS = {"character": r"(?s).", "token": r"\S+|\s+", "line": r"[^\n]*\n"}
EDITS = st.tuples(
    st.sampled_from(sorted(UNITS)),
    st.sampled_from(["delete", "duplicate", "replace", "swap", "insert"]),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(PIECES),
)


def mutate(text: str, unit: str, kind: str, where: float, piece: str) -> str:
    units = re.findall(UNITS[unit], text)
    if not units:
        return text + piece
    at = int(where * len(units))
    old, other = units[at], units[(at * 7 + 3) % len(units)]
    new = {"delete": "", "duplicate": old * 2, "replace": piece, "swap": other, "insert": old + piece}[kind]
    return "".join((*units[:at], new, *units[at + 1 :]))


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("copies")


@settings(max_examples=600, deadline=None)
@given(name=st.sampled_from(sorted(PRESETS)), edits=st.lists(EDITS, min_size=1, max_size=4))
def test_no_mutation_raises_hangs_or_passes_silently(
    copies: Path, name: str, edits: list[tuple[str, str, float, str]]
) -> None:
    text = TEXTS[name]
    for one in edits:
        text = mutate(text, *one)
    file = preset_at(write_copy(copies, name, text.encode("utf-8", "surrogatepass")))
    with within(SECONDS):
        report = lint(file)
    arguments = load_preset(file).arguments
    original = load_preset(PRESETS[name]).arguments
    facts, _ = facts_beside(file.path)
    assert original is not None and facts is not None and facts.family is not None
    if arguments is None:
        assert report.outcome is Outcome.FAILED
        return
    for item in expectations(facts.family, facts.config):
        assert isinstance(item, Expectation)
        if arguments[item.dest] != original[item.dest]:
            assert report.findings, item.dest
            if item.severity is Severity.ERROR and arguments["padded_vocab_size"] is not None:
                assert report.outcome is Outcome.FAILED, item.dest


def test_reading_takes_milliseconds() -> None:
    start = perf_counter()
    for name in (*PRESETS, *MOE):
        lint(PRESETS[name])
    assert perf_counter() - start < SECONDS


@pytest.mark.parametrize("name", ["LAUNCH_SCRIPT", "SCRIPT_DIR"])
def test_a_variable_that_the_scripts_execute_is_refused(tmp_path: Path, name: str) -> None:
    path = write_copy(tmp_path, "Qwen3-8B", TEXTS["Qwen3-8B"] + f'\n{name}="touch /nowhere/x;"\n')
    line = len(TEXTS["Qwen3-8B"].splitlines()) + 2
    (finding,) = errors(lint(preset_at(path)).findings)
    assert (finding.flag, finding.line) == (name, line)
    assert finding.message == f"{name} is refused: Megatron-LM's scripts execute what it holds"


def test_the_sizes_that_the_scripts_set_before_are_known(tmp_path: Path) -> None:
    text = TEXTS["Qwen3-30B-A3B"] + '\nMLM_EXTRA_ARGS="--expert-model-parallel-size $((EP * 1))"\n'
    assert lint(preset_at(write_copy(tmp_path, "Qwen3-30B-A3B", text))).findings == ()


# Overlays


OVERLAY = """#!/bin/bash
HF_MODEL_CKPT=/workspace/scratch/Qwen/Qwen3-8B
TP=8
ETP=1
EP=64
"""


def overlaid(tmp_path: Path, overlay: str, name: str = "qwen3_8b") -> Preset:
    root = tree(tmp_path, "Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B")
    path = root / "Qwen" / f"{name}.sh"
    path.write_text(overlay)
    return load_preset(preset_at(path))


def test_an_overlay_is_read_on_top_of_its_preset(tmp_path: Path) -> None:
    preset = overlaid(tmp_path, OVERLAY)
    assert preset.name == "Qwen/qwen3_8b"
    assert preset.path.name == "Qwen3-8B.sh"
    assert preset.arguments is not None
    assert preset.arguments["num_layers"] == 36
    # What the preset's own ``if [ -z ${HF_MODEL_CKPT} ]`` makes of it.
    assert preset.variables["TOKENIZER_MODEL"].text == "/workspace/scratch/Qwen/Qwen3-8B"
    assert preset.variables["HF_MODEL_CKPT"].line == 2
    layout, told = preset.findings
    assert (layout.severity, layout.flag, layout.line) == (Severity.WARNING, "TP", 3)
    assert "the overlay asks for tp8,ep64,etp1" in layout.message
    assert re.search(r"read with .*/Qwen/Qwen3-8B\.sh, where the flags stand", told.message)
    # Its flags have no line in the overlay.
    assert preset.arguments.origin("num_layers").line is None


def test_extra_flags_of_an_overlay_are_added_with_their_lines(tmp_path: Path) -> None:
    extra = 'MLM_EXTRA_ARGS=" \\\n    --num-layers 24 \\\n    --decoder-first-pipeline-num-layers 3 \\\n"\n'
    preset = overlaid(tmp_path, OVERLAY + extra)
    assert preset.arguments is not None
    assert preset.arguments["num_layers"] == 24
    assert preset.arguments.origin("num_layers").line == 7
    (warning,) = [finding for finding in preset.findings if finding.flag == "--num-layers"]
    assert (warning.severity, warning.line) == (Severity.WARNING, 7)
    assert "--num-layers overrides the preset's --num-layers 36" in warning.message
    # Flags of a run are what an overlay is for.
    assert not [
        finding for finding in preset.findings if finding.flag == "--decoder-first-pipeline-num-layers"
    ]


def test_a_wrong_flag_of_an_overlay_is_an_error_on_its_line(tmp_path: Path) -> None:
    preset = overlaid(tmp_path, OVERLAY + 'MLM_EXTRA_ARGS="--num-layer 24"\n')
    (error,) = errors(preset.findings)
    assert (error.flag, error.line) == ("--num-layer", 6)


def test_an_error_in_the_preset_of_an_overlay_has_no_line_of_it(tmp_path: Path) -> None:
    root = tree(tmp_path, "Qwen/Qwen3-8B")
    (root / "Qwen" / "Qwen3-8B.sh").write_text(edit(DENSE, "--num-query-groups", "7"))
    path = root / "Qwen" / "over.sh"
    path.write_text(OVERLAY)
    (error,) = errors(load_preset(preset_at(path)).findings)
    assert (error.flag, error.line) == ("--num-query-groups", None)


@pytest.mark.parametrize(
    ("overlay", "message", "line"),
    [
        ("TP=8\n", "HF_MODEL_CKPT, which would name the preset that it goes with, is not set", 1),
        ("TP=8\nHF_MODEL_CKPT=Qwen3-8B\n", "'Qwen3-8B' names no Org/Model", 2),
        ("HF_MODEL_CKPT=/x/Qwen/Qwen4\n", r"no preset Qwen/Qwen4 \(HF_MODEL_CKPT\) is in the tree", 1),
        (OVERLAY.replace("TP=8", "TP=0"), "layout size tp0 is not at least 1", 3),
        (OVERLAY.replace("TP=8", "TP=many"), "'tpmany' is not a size", 3),
        (OVERLAY + "LAUNCH_SCRIPT='rm -rf /'\n", "LAUNCH_SCRIPT is refused", 6),
    ],
    ids=["no-checkpoint", "no-organisation", "no-preset", "no-size", "no-number", "runs"],
)
def test_an_overlay_that_goes_with_nothing(overlay: str, message: str, line: int, tmp_path: Path) -> None:
    (error,) = errors(overlaid(tmp_path, overlay).findings)
    assert re.search(message, error.message)
    assert error.line == line


def test_overlays_are_found_by_name_and_not_otherwise(tmp_path: Path) -> None:
    root = tree(tmp_path, "Qwen/Qwen3-8B")
    (root / "Qwen" / "qwen3_8b.sh").write_text(OVERLAY)
    assert found([], root) == ["Qwen/Qwen3-8B"]
    assert found(["qwen3_8b"], root) == ["Qwen/qwen3_8b"]
    (other,) = find([], root).not_checked
    assert other.path.name == "qwen3_8b.sh"
    assert other.reason.startswith("an overlay: it sets EP, ETP, HF_MODEL_CKPT, TP and no MODEL_ARGS")
    named = find([str(root), "qwen3_8b"], root)
    assert [file.name for file in named.files] == ["Qwen/Qwen3-8B", "Qwen/qwen3_8b"]
    assert named.not_checked == ()


def test_a_file_that_changes_is_read_again_and_one_that_does_not_is_not(tmp_path: Path) -> None:
    file = PresetFile("Org/a", tmp_path / "a.sh")
    file.path.write_text('MODEL_ARGS=" --num-layers 2 --hidden-size 64 --num-attention-heads 4"\n')
    first = load_preset(file)
    assert load_preset(file) is first
    file.path.write_text('MODEL_ARGS=" --num-layers 3 --hidden-size 64 --num-attention-heads 4"\n')
    again = load_preset(file)
    assert first.arguments is not None and again.arguments is not None
    assert (first.arguments["num_layers"], again.arguments["num_layers"]) == (2, 3)
