"""Selection: names of presets, recipes and layouts, as users write them -> the cases to check."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.case import FIRST_RANKS, PARITY, PROOFS, REAL, Case
from harness.devices import rank_count
from harness.errors import UnknownLayout, UsageError
from harness.layout import Layout
from harness.messages import shown_path
from harness.rank import ranks_named
from harness.recipes import DEFAULT_RECIPES, Recipe, find_recipe, recipes
from harness.tree import NotChecked, PresetFile

# Seconds that one case may take, the start of its worker not counted.
DEFAULT_TIMEOUT = 300.0


def default_tree() -> Path:
    """``presets`` in the working directory, else the one that comes with this source tree."""
    here, ours = Path("presets"), Path(__file__).parent.parent / "presets"
    return ours if not here.is_dir() and ours.is_dir() else here


def recipes_named(texts: Iterable[str]) -> tuple[Recipe, ...]:
    """Recipes of these names, each text one, or several with commas; none means ``default``.

    ``default`` and ``all`` are sets of them. Raises UnknownRecipe.
    """
    found: list[Recipe] = []
    for name in _words(texts) or ["default"]:
        if name.lower() == "all":
            found.extend(recipes())
        elif name.lower() == "default":
            found.extend(map(find_recipe, DEFAULT_RECIPES))
        else:
            found.append(find_recipe(name))
    return tuple(dict.fromkeys(found))


def checks_named(texts: Iterable[str]) -> tuple[str, ...]:
    """Names of recipes as ``recipes_named`` reads them, and ``parity`` where it is among them or none is.

    Raises UnknownRecipe.
    """
    names = _words(texts) or ["default", PARITY]
    plain = [name for name in names if name.lower() != PARITY]
    found = [recipe.name for recipe in recipes_named(plain)] if plain else []
    return (*found, *([PARITY] if len(plain) < len(names) else []))


def proofs_named(texts: Iterable[str]) -> tuple[str, ...]:
    """Proofs of these names, each text one, several with commas, or ``all``; in the order they are made.

    Raises UsageError.
    """
    names = [name.lower() for name in _words(texts)]
    for name in names:
        if name not in (*PROOFS, "all"):
            raise UsageError(f"no proof is called {name!r}; known: {', '.join(PROOFS)}, all")
    return PROOFS if "all" in names else tuple(name for name in PROOFS if name in names)


def _words(texts: Iterable[str]) -> list[str]:
    return [word.strip() for text in texts for word in text.split(",") if word.strip()]


def layouts_named(texts: Iterable[str]) -> tuple[Layout, ...]:
    """Layouts of these texts, ``tp1`` where there is none."""
    return tuple(dict.fromkeys(map(Layout.parse, texts))) or (Layout(),)


def runnable(layouts: Sequence[Layout], ranks: str, device: str) -> Sequence[Layout]:
    """``layouts``, where every one can be run. Raises UsageError before anything heavy is imported.

    ``ranks`` are as in ``Case``, and ``device`` is resolved.
    """
    for layout in layouts:
        if layout.cp > 1:
            raise UnknownLayout(
                f"layout {layout} has cp{layout.cp}: context parallelism needs Transformer Engine's "
                "attention and a GPU for each rank, and a case runs one rank at a time "
                "(`show` and `audit` take any layout)"
            )
        if ranks != REAL:
            ranks_named(ranks, layout)
        elif layout.world_size > (most := rank_count(device)):
            kind = device.partition(":")[0]
            raise UsageError(
                f"layout {layout} has {layout.world_size} ranks, and --ranks real runs at most {most} on "
                f"{kind} here: leave it out to have ranks simulated"
            )
    return layouts


def processes_per_case(layouts: Sequence[Layout], ranks: str) -> int:
    """The most processes that a case of these layouts starts."""
    return max(layout.world_size for layout in layouts) if ranks == REAL else 1


def cases_of(
    files: Iterable[PresetFile],
    checks: Sequence[str],
    layouts: Sequence[Layout],
    device: str,
    tree: Path | None,
    ranks: str = FIRST_RANKS,
    prove: tuple[str, ...] = (),
) -> tuple[Case, ...]:
    """Every case of these presets. ``tree`` is where a user finds them by name, None for the default.

    ``checks`` are names of recipes, each of which is a case at every layout, and ``PARITY``, one at tp1.
    """
    names = [name for name in checks if name != PARITY]
    cases: list[Case] = []
    for file in files:
        path, root = str(file.path), _tree_of(file, tree)
        cases.extend(
            Case(file.name, path, name, layout, device, root, ranks, prove)
            for layout in layouts
            for name in names
        )
        if PARITY in checks:
            cases.append(Case(file.name, path, PARITY, Layout(), device, root))
    return tuple(cases)


def _tree_of(file: PresetFile, tree: Path | None) -> str | None:
    root = (tree or default_tree()).absolute()
    if file.path.absolute().is_relative_to(root):
        return str(tree) if tree else None
    return str(file.path.parent)


def not_checked_text(others: Iterable[NotChecked]) -> str:
    """The other files of a tree, each with the reason why it is not checked; empty where there is none."""
    lines = [f"  {shown_path(other.path)}: {other.reason}" for other in others]
    return "\n".join(["not checked", *lines]) if lines else ""


def not_checked_json(others: Iterable[NotChecked]) -> list[dict[str, str]]:
    """The same for a JSON document."""
    return [{"path": str(other.path), "reason": other.reason} for other in others]
