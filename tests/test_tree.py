"""What stands in a folder: presets, overlays, scripts, links and what cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.finding import has_errors
from harness.preset import load_preset
from harness.tree import Kind, Tree, survey, what_it_is

PRESET = "MODEL_ARGS=' --num-layers 2 --hidden-size 64'\n"
TEXTS = {
    "string": (PRESET, Kind.PRESET),
    "array": ("MODEL_ARGS=(--num-layers 2)\n", Kind.PRESET),
    "element": ("MODEL_ARGS[0]=--bf16\n", Kind.PRESET),
    "appended": ("if true; then\n  MODEL_ARGS+=' --bf16'\nfi\n", Kind.PRESET),
    "exported": ("export MODEL_ARGS\n", Kind.PRESET),
    "broken": ("MODEL_ARGS=' --num-layers 2\n", Kind.PRESET),
    "runs-something": (f"set -e\nls\n{PRESET}", Kind.PRESET),
    "misspelt": ("MODEL_ARG=' --num-layers 2'\n", Kind.PRESET),
    "misspelt-and-runs": ("MODEL_ARG=' --num-layers 2'\nls\n", Kind.PRESET),
    "other-variables": ("NAME=x\n", Kind.PRESET),
    "empty": ("", Kind.PRESET),
    "comment": ("# MODEL_ARGS=x\n", Kind.PRESET),
    "overlay": ("HF_MODEL_CKPT=/x/Org/One\nTP=8\n", Kind.OVERLAY),
    "overlay-of-flags": ("MLM_EXTRA_ARGS=' --num-layers 2'\n", Kind.OVERLAY),
    "script": ("set -e\nsource conf/$1.sh\n", Kind.SCRIPT),
    "script-that-uses": ("python quantize.py ${MODEL_ARGS} --tp 2\n", Kind.SCRIPT),
}


def write(root: Path, **texts: str) -> Path:
    for name, text in texts.items():
        path = root / f"{name.replace('__', '/')}.sh"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def names(tree: Tree) -> list[str]:
    return [file.name for file in tree.presets]


@pytest.mark.parametrize(("text", "kind"), TEXTS.values(), ids=TEXTS.keys())
def test_what_a_file_is(text: str, kind: Kind, tmp_path: Path) -> None:
    path = write(tmp_path, x=text) / "x.sh"
    found, reason = what_it_is(path)
    assert found is kind
    assert bool(reason) is (kind is not Kind.PRESET)


def test_a_file_larger_than_any_preset_is_checked_and_fails(tmp_path: Path) -> None:
    path = tmp_path / "x.sh"
    path.write_bytes(b"ls\n" * 400_000)
    assert what_it_is(path)[0] is Kind.PRESET


def test_every_shell_file_is_a_preset_or_listed_with_its_reason(tmp_path: Path) -> None:
    """A tree shaped like Megatron-LM's conf/."""
    write(
        tmp_path,
        arguments="#!/bin/bash\nset -e\nsource ${SANDBOX_ENV_SETUP}\n",
        Org__One=PRESET,
        Org__one_export="HF_MODEL_CKPT=/x/Org/One\nPP=16\n",
        org__two=PRESET,
    )
    (tmp_path / "Org" / "One-Base.sh").symlink_to("One.sh")
    (tmp_path / "Org" / "One.toml").write_text("")
    tree = survey(tmp_path)
    assert names(tree) == ["Org/One", "Org/One-Base", "org/two"]
    assert [file.name for file in tree.overlays] == ["Org/one_export"]
    reasons = {other.path.name: other.reason for other in tree.not_checked}
    assert reasons == {
        "arguments.sh": (
            "a script: it sets no MODEL_ARGS, and in line 3 the command `source` is refused: a preset may "
            "only assign variables"
        ),
        "one_export.sh": (
            "an overlay: it sets HF_MODEL_CKPT, PP and no MODEL_ARGS; name it to check what it gives"
        ),
    }


def test_a_link_to_a_preset_is_a_preset_under_its_own_name(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", x=PRESET) / "x.sh"
    root = write(tmp_path / "root", Org__One=PRESET)
    (root / "Org" / "Two.sh").symlink_to(outside)
    assert names(survey(root)) == ["Org/One", "Org/Two"]


@pytest.mark.parametrize("target", ["nowhere.sh", "Broken.sh"], ids=["dangling", "to-itself"])
def test_a_link_to_nothing_is_checked_and_fails(target: str, tmp_path: Path) -> None:
    root = write(tmp_path, Org__One=PRESET)
    (root / "Org" / "Broken.sh").symlink_to(target)
    broken, _ = survey(root).presets
    assert broken.name == "Org/Broken"
    preset = load_preset(broken)
    assert has_errors(preset.findings)
    assert f"is a link to {target}, which leads to no file" in preset.findings[0].message


def test_links_to_folders(tmp_path: Path) -> None:
    """Back into the tree: listed. Out of it: followed, once."""
    outside = write(tmp_path / "outside", Other__Three=PRESET)
    (outside / "back").symlink_to(tmp_path / "root")
    root = write(tmp_path / "root", Org__One=PRESET)
    (root / "org").symlink_to("Org")
    (root / "Org" / "up").symlink_to("..")
    (root / "away").symlink_to(outside)
    (root / "far").symlink_to(outside / "Other")
    tree = survey(root)
    assert names(tree) == ["Org/One", "Other/Three"]
    listed = {str(other.path.relative_to(root)): other.reason for other in tree.not_checked}
    assert set(listed) == {"org", "Org/up", "far", "away/back"}
    assert listed["org"] == "a link to the folder Org, whose files are read there"


def test_a_folder_that_cannot_be_read_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path, Org__One=PRESET, Closed__Two=PRESET)
    listdir = os.listdir

    def refuse(path: Path) -> list[str]:
        if Path(path).name == "Closed":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)  # the mode would not stop root
    tree = survey(root)
    assert names(tree) == ["Org/One"]
    assert [(other.path.name, other.reason) for other in tree.not_checked] == [
        ("Closed", "cannot be read: Permission denied")
    ]


def test_a_fifo_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.sh")
    (file,) = survey(tmp_path).presets
    assert "is not a regular file" in load_preset(file).findings[0].message


def test_folders_that_look_like_presets_are_entered(tmp_path: Path) -> None:
    write(tmp_path / "Org.sh", One=PRESET)
    assert names(survey(tmp_path)) == ["Org.sh/One"]
