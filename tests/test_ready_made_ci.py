"""The workflow, and the pre-commit hooks for other repositories: what they are made of, and that they run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOW = ROOT / ".github" / "workflows" / "presets.yml"
HOOKS = ROOT / ".pre-commit-hooks.yaml"
BIN = Path(sys.executable).parent


# ---- the workflow ----

# https://docs.github.com/actions/reference/workflows-and-actions/workflow-syntax: what may stand where, as
# far as it is used, and what must.
TOP = {"name", "on", "permissions", "concurrency", "env", "defaults", "jobs"}
JOB = {"name", "if", "needs", "runs-on", "timeout-minutes", "strategy", "steps", "env", "permissions"}
STEP = {"name", "id", "if", "run", "uses", "with", "env", "shell", "working-directory", "timeout-minutes"}
EVENTS = {"push", "pull_request", "workflow_dispatch", "schedule"}
CONTEXTS = {"github", "matrix", "strategy", "vars", "runner", "env"}


def problems(document: Any) -> list[str]:
    """What GitHub would refuse of a workflow."""
    # YAML 1.1, which PyYAML reads, takes the key for a truth value.
    document = {"on" if key is True else key: value for key, value in document.items()}
    found = [f"unknown key {key}" for key in document.keys() - TOP]
    found += [f"missing {key}" for key in ("on", "jobs") if not document.get(key)]
    found += [f"unknown event {event}" for event in set(document.get("on") or ()) - EVENTS]
    for name, job in (document.get("jobs") or {}).items():
        found += [f"{name}: unknown key {key}" for key in job.keys() - JOB]
        found += [f"{name}: missing {key}" for key in ("runs-on", "steps") if not job.get(key)]
        matrix = job.get("strategy", {}).get("matrix", {})
        for step in job.get("steps") or ():
            found += [f"{name}: unknown key {key} of a step" for key in step.keys() - STEP]
            if ("run" in step) == ("uses" in step):
                found.append(f"{name}: a step runs a command or uses an action")
            if "uses" in step and not re.fullmatch(r"[\w.-]+/[\w./-]+@[\w.-]+", step["uses"]):
                found.append(f"{name}: {step['uses']} is no action at a version")
        for expression in re.findall(r"\$\{\{(.*?)\}\}", str(job)):
            found += [
                f"{name}: unknown context {context}"
                for context in re.findall(r"([a-z]+)(?=\.)", re.sub(r"\.[\w.-]+", ".", expression))
                if context not in CONTEXTS
            ]
            found += [
                f"{name}: matrix has no {key}"
                for key in re.findall(r"matrix\.([\w-]+)", expression)
                if key not in matrix
            ]
    return found


@pytest.fixture
def workflow() -> dict[str, Any]:
    document = yaml.safe_load(WORKFLOW.read_text())
    assert isinstance(document, dict)
    return document


def test_the_workflow_is_one(workflow: dict[str, Any]) -> None:
    assert problems(workflow) == []
    assert list(workflow["jobs"]) == ["cpu", "gpu"]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("\non:\n", "\nwhen:\n", "missing on"),
        ("pull_request:\n", "pull_requests:\n", "unknown event pull_requests"),
        ("    runs-on: ubuntu-latest\n", "", "cpu: missing runs-on"),
        ("    timeout-minutes: 60\n", "    timeout: 60\n", "cpu: unknown key timeout"),
        ("      - run: uv sync --locked\n", "      - name: nothing\n", "cpu: a step runs a command"),
        ("actions/checkout@v5", "actions/checkout", "cpu: actions/checkout is no action at a version"),
        ("        shard: [1, 2, 3, 4]\n", "        part: [1, 2]\n", "cpu: matrix has no shard"),
        ("strategy.job-total", "stategy.job-total", "cpu: unknown context stategy"),
    ],
)
def test_what_is_no_workflow(old: str, new: str, problem: str) -> None:
    text = WORKFLOW.read_text()
    assert old in text
    assert any(found.startswith(problem) for found in problems(yaml.safe_load(text.replace(old, new, 1))))


def commands(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_its_commands_are_the_readmes(workflow: dict[str, Any], name: str) -> None:
    first = re.search(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert first is not None
    job = workflow["jobs"][name]
    set_up, *rest = commands(job)
    assert set_up == "uv sync --locked"
    for command, told in zip(rest, first[1].splitlines(), strict=True):
        assert command.startswith(f"{told} ")
    shards = job["strategy"]["matrix"]["shard"]
    assert shards == list(range(1, len(shards) + 1))
    assert all("--shard ${{ matrix.shard }}/${{ strategy.job-total }}" in command for command in rest)
    # What is uploaded is what the commands write, also when they fail.
    *_, upload = job["steps"]
    written = [command.split()[-1] for command in rest]
    assert upload["with"]["path"].split() == written == ["report.json", "junit.xml"]
    assert upload["if"] == "${{ !cancelled() }}"


@pytest.mark.parametrize(
    ("number", "command"), [(1, ["harness", "check"]), (2, ["pytest"])], ids=["harness check", "pytest"]
)
def test_the_options_of_its_commands_exist(workflow: dict[str, Any], number: int, command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    )
    for job in workflow["jobs"].values():
        line = commands(job)[number].replace("${{ matrix.shard }}/${{ strategy.job-total }}", "1/2")
        options = {word for word in shlex.split(line) if word.startswith("--")}
        assert "--shard" in options
        for option in options:
            assert re.search(rf"{option}[ =]", done.stdout), option


def test_a_fork_never_runs_on_our_own_machine(workflow: dict[str, Any]) -> None:
    assert "self-hosted" in workflow["jobs"]["gpu"]["runs-on"]
    assert "head.repo.full_name == github.repository" in workflow["jobs"]["gpu"]["if"]
    assert workflow["permissions"] == {"contents": "read"}


# ---- the hooks ----


def git(*arguments: str, cwd: Path) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()


def repository(folder: Path) -> str:
    """Make a repository of what is in the folder; its commit."""
    git("init", "-q", "-b", "main", cwd=folder)
    git("add", "-A", cwd=folder)
    git("commit", "-q", "-m", "all", cwd=folder)
    return git("rev-parse", "HEAD", cwd=folder)


def test_the_hooks_are_what_pre_commit_takes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pre_commit", "validate-manifest", str(HOOKS)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for hook in yaml.safe_load(HOOKS.read_text()):
        assert hook["entry"].split()[0] in scripts


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Another repository, with a preset, a script, and the hook of a copy of ours."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    shutil.copy(HOOKS, ours)
    revision = repository(ours)
    (theirs / "presets" / "Qwen").mkdir(parents=True)
    for name in ("Qwen3-8B.sh", "Qwen3-8B.toml"):
        shutil.copy(ROOT / "presets" / "Qwen" / name, theirs / "presets" / "Qwen")
    (theirs / "build.sh").write_text("make all\n")
    hooks = {"repo": str(ours), "rev": revision, "hooks": [{"id": "harness-lint-system"}]}
    (theirs / ".pre-commit-config.yaml").write_text(yaml.safe_dump({"repos": [hooks]}))
    repository(theirs)
    return theirs


def pre_commit(theirs: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PRE_COMMIT_HOME": str(theirs.parent / "cache"),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    return subprocess.run(
        [sys.executable, "-m", "pre_commit", "run", "--all-files"],
        cwd=theirs,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_pre_commit_runs_the_hook(theirs: Path) -> None:
    done = pre_commit(theirs)
    assert (done.returncode, "Passed" in done.stdout) == (0, True), done.stdout + done.stderr
    preset = theirs / "presets" / "Qwen" / "Qwen3-8B.sh"
    preset.write_text(preset.read_text().replace("--num-query-groups 8", "--num-query-groups 4"))
    done = pre_commit(theirs)
    assert done.returncode == 1
    assert re.search(r"presets/Qwen/Qwen3-8B\.sh:\d+.*error", done.stdout), done.stdout
