"""Coverage: a quantized model -> what the recipe meant to quantize and what ModelOpt did, role by role.

What there is to quantize comes from the inventory, by arithmetic, and what should become of it from the
recipe's own entries: the model is only asked which of its quantizers are on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from torch import nn

from harness.build import short
from harness.case import COVERAGE
from harness.finding import Finding, Severity, has_errors
from harness.inventory import Shape, parameters
from harness.layout_rules import Owner
from harness.proofs.patterns import idle, kinds, misspelt, strange, unreached, words
from harness.proofs.proof import Proof, finding, judged, unsupported
from harness.proofs.quantizers import place
from harness.rank import Rank
from harness.recipes import Entry, Recipe
from harness.roles import Role, role_of
from harness.sharding import rank_parameters
from harness.standins.output import import_foreign

import_foreign()

from modelopt.torch.quantization.nn import TensorQuantizer  # noqa: E402

if TYPE_CHECKING:
    from harness.architecture import Architecture
    from harness.layout import Layout

# The quantizers of a matrix, and of the core of attention; in the words of the detail line.
_OF_MATRIX = {"weight": "weights", "input": "inputs", "output": "outputs"}
_OF_CORE = {"q_bmm": "queries", "k_bmm": "keys", "v_bmm": "values"}
_WORDS = _OF_MATRIX | _OF_CORE

# Which stages of a quantizer are on, one after the other; a single one where it is no container.
Stages = tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A module that could be quantized: its path, its role, and how many numbers its matrix holds."""

    path: str
    role: Role
    numbers: int

    @property
    def sides(self) -> tuple[str, ...]:
        """Its quantizers, ``weight`` and so on; none where ModelOpt has no form of its class."""
        if not self.role.convertible:
            return ()
        return tuple(_OF_CORE if self.role is Role.KV else _OF_MATRIX)

    @property
    def quantizers(self) -> tuple[str, ...]:
        return tuple(f"{self.path}.{side}_quantizer" for side in self.sides)

    def meant(self, recipe: Recipe, side: str) -> Stages:
        """Which stages of a quantizer the recipe leaves on."""
        made = recipe.quantizer(self.path, side, self.role.parent_class)
        return tuple(enabled for _, enabled in made.stages)


def prove_coverage(
    model: nn.Module, recipe: Recipe, architecture: Architecture, layout: Layout, rank: Rank | None = None
) -> Proof:
    """Prove that exactly what ``recipe`` means of this rank is quantized, and say what that is.

    ``architecture`` is the model's own, ``rank`` the one of ``layout`` that ``model`` is of, by default the
    first. Errors: a quantizer that is off and should be on, or the other way round, at its module; an entry
    of the recipe that turns on nothing, though one edit away it would, or though the model has what it speaks
    of under another name. Where that entry is ModelOpt's own, no one else can mend it: unsupported. Warnings:
    an entry with words that no one else knows; matrices that the recipe means and ModelOpt has no quantized
    form of; matrices that no entry names, which ModelOpt leaves on, in int8. Raises UnevenSplit or
    UnevenStages for a rank that cannot be.
    """
    rank = rank or Rank(0)
    shapes = rank_parameters(architecture, layout, rank)
    own = parts(architecture, layout, shapes, last=rank.pp == layout.pp - 1)
    every = parts(architecture, layout, parameters(architecture), last=True)
    actual = enabled(model)
    names = kinds(recipe, dict.fromkeys([name for part in every for name in part.quantizers] + list(actual)))
    limit, idle_entries = _idle(recipe, names)
    findings = (
        *idle_entries,
        *_deviations(recipe, own, actual),
        *_without_a_form(recipe, own),
        *_by_default(recipe, own),
    )
    detail = _detail(recipe, own, every, actual, names, shapes, architecture, layout)
    if limit and not has_errors(findings):
        return replace(unsupported(COVERAGE, Owner.MODELOPT, limit, detail), findings=findings)
    return judged(COVERAGE, findings, detail)


def parts(
    architecture: Architecture, layout: Layout, shapes: Mapping[str, Shape], last: bool
) -> tuple[Part, ...]:
    """Every module of a rank, or of the whole model, with a matrix or a cache, by the inventory's names.

    ``last``: it has the output layer, be its matrix the embedding's.
    """
    found: dict[str, Part] = {}
    for name, shape in shapes.items():
        path, _, what = name.rpartition(".")
        role = role_of(path)
        if what != "weight" or len(shape) < 2 or role is None:
            continue
        found[path] = Part(path, role, prod(shape))
        # Delta nets and Mamba mixers have no output projection of that name: only attention has a core.
        if role is Role.PROJ and _has_cache_quantizers(architecture, layout):
            core = path.removesuffix("linear_proj") + "core_attention"
            found[core] = Part(core, Role.KV, 0)
    output = found.pop("output_layer", Part("output_layer", Role.OUTPUT, 0))
    if last:
        found[output.path] = output
    return tuple(found.values())


def _has_cache_quantizers(architecture: Architecture, layout: Layout) -> bool:
    """Whether attention's core is of Transformer Engine's class, of which alone ModelOpt has a form.

    A hybrid model's always is; context parallelism needs it, too.
    """
    local = bool(architecture.arguments["export_force_local_attention"])
    return architecture.hybrid or layout.cp > 1 or not local


def enabled(model: nn.Module) -> dict[str, Stages]:
    """Every quantizer of ``model`` by path, containers as one, and which of its stages are on."""
    found: dict[str, list[bool]] = {}
    for path, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            owner, attribute = place(path)
            found.setdefault(f"{owner}.{attribute}", []).append(bool(module.is_enabled))
    return {path: tuple(stages) for path, stages in found.items()}


# ---- what is wrong ----


def _idle(recipe: Recipe, names: Collection[str]) -> tuple[str, list[Finding]]:
    """What entries that fit nothing come to: a limit of ModelOpt's, empty for none, and findings."""
    limits: list[str] = []
    findings: list[Finding] = []
    said: set[str] = set()
    for wrong in misspelt(recipe, names):
        what = f"matches nothing, though the model has such modules; {wrong.meant!r} would match"
        findings.append(_of_entry(recipe, wrong.entry, what, wrong.quantizer, wrong.meant))
        said.add(wrong.entry.pattern)
    for missed in unreached(recipe, names):
        module, _ = place(missed.quantizer)
        what = f"matches nothing, though the model has {missed.role}, by Megatron's name {short(module)}"
        if missed.entry.shipped:
            limits.append(f"{_spelt(recipe, missed.entry)} {what}")
        elif missed.entry.pattern not in said:
            findings.append(_of_entry(recipe, missed.entry, what, missed.quantizer, None))
        said.add(missed.entry.pattern)
    for entry in strange(recipe, names):
        if entry.pattern not in said:
            what = f"{_spelt(recipe, entry)} matches nothing, and no recipe of ModelOpt's has such a word"
            findings.append(finding(None, what, severity=Severity.WARNING))
    more = f" (and {len(limits) - 1} more such)" if len(limits) > 1 else ""
    return "".join([*limits[:1], more]), findings


def _of_entry(recipe: Recipe, entry: Entry, what: str, quantizer: str, meant: str | None) -> Finding:
    return finding(place(quantizer)[0], f"{_spelt(recipe, entry)} {what}", meant, entry.pattern)


def _spelt(recipe: Recipe, entry: Entry) -> str:
    where = f"{entry.place}: " if entry.place else ""
    return f"{where}pattern {entry.pattern!r} of {recipe.name}"


def _deviations(recipe: Recipe, own: Sequence[Part], actual: Mapping[str, Stages]) -> Iterator[Finding]:
    known = set()
    for part in own:
        for side in part.sides:
            name = f"{part.path}.{side}_quantizer"
            known.add(name)
            yield from _deviation(recipe, name, part.meant(recipe, side), actual.get(name))
    for name, stages in actual.items():
        if name not in known and any(stages):
            module, attribute = place(name)
            made = recipe.quantizer(module, attribute)
            yield from _deviation(recipe, name, tuple(on for _, on in made.stages), stages)


def _deviation(recipe: Recipe, name: str, meant: Stages, actual: Stages | None) -> Iterator[Finding]:
    module, attribute = place(name)
    expected, there = _said(meant), "missing" if actual is None else _said(actual)
    if expected == there or (actual is None and not any(meant)):
        return
    yield finding(module, f"{attribute} is {there}, {recipe.name} means it {expected}", expected, there)


def _said(stages: Stages) -> str:
    """``on``, ``off``, or stage by stage where they differ or are several."""
    if not any(stages):
        return "off"
    if stages == (True,):
        return "on"
    return ", then ".join("on" if stage else "off" for stage in stages)


def _without_a_form(recipe: Recipe, own: Sequence[Part]) -> Iterator[Finding]:
    """One warning for all matrices in the layers that are meant and stay as they are."""
    meant = [
        part
        for part in own
        if not part.role.convertible and part.role is not Role.EMBEDDING and any(part.meant(recipe, "weight"))
    ]
    if meant:
        roles = ", ".join(dict.fromkeys(part.role for part in meant))
        what = f"stays in bf16, one of {len(meant)} such matrices ({roles}): ModelOpt has no quantized form "
        what += f"of the class that Megatron makes them of, though {recipe.name} means them"
        yield finding(meant[0].path, what, "on", "off", severity=Severity.WARNING)


def _by_default(recipe: Recipe, own: Sequence[Part]) -> Iterator[Finding]:
    """One warning for all matrices that are quantized because no entry says that they are not."""
    left = [
        part
        for part in own
        if "weight" in part.sides
        and not any(
            entry.fits(f"{part.path}.weight_quantizer", part.role.parent_class) for entry in recipe.entries
        )
    ]
    if left:
        what = f"weights are in int8, one of {len(left)} such matrices: {recipe.name} says nothing of them, "
        what += "and ModelOpt leaves on what no entry turns off"
        yield finding(left[0].path, what, None, "int8", severity=Severity.WARNING)


# ---- what is there ----


def _detail(
    recipe: Recipe,
    own: Sequence[Part],
    every: Sequence[Part],
    actual: Mapping[str, Stages],
    names: Collection[str],
    shapes: Mapping[str, Shape],
    architecture: Architecture,
    layout: Layout,
) -> str:
    """``weights and inputs of qkv, proj 2 of 2; router, output off; 97.1 % of parameters``."""
    on = [
        (part, tuple(side for side in part.sides if any(actual.get(f"{part.path}.{side}_quantizer", ()))))
        for part in own
    ]
    said = [*_by_role(on)]
    quantized = sum(part.numbers for part, sides in on if "weight" in sides)
    share = _percent(quantized, sum(map(prod, shapes.values())))
    if layout.world_size > 1:
        meant = sum(
            part.numbers for part in every if "weight" in part.sides and any(part.meant(recipe, "weight"))
        )
        whole = _percent(meant, sum(map(prod, parameters(architecture).values())))
        said.append(f"{share} of the rank's parameters, {whole} of the model's")
    else:
        said.append(f"{share} of parameters")
    nothing = dict.fromkeys(_spoken(entry.pattern) for entry in idle(recipe, names))
    if nothing:
        said.append(f"nothing here is called {', '.join(nothing)}")
    return "; ".join(said)


def _by_role(on: Sequence[tuple[Part, tuple[str, ...]]]) -> Iterator[str]:
    """What is on, then what is off, then what ModelOpt has no form of; each in the order of the roles."""
    off: list[Role] = []
    formless: list[Role] = []
    # What is on -> how many of how many -> of which roles.
    counts: dict[str, dict[str, list[Role]]] = {}
    for role in Role:
        mine = [sides for part, sides in on if part.role is role]
        if mine and not role.convertible:
            formless.append(role)
        elif mine and not any(mine):
            off.append(role)
        for sides in dict.fromkeys(filter(None, mine)):
            what = " and ".join(_WORDS[side] for side in sides)
            count = f"{mine.count(sides)} of {len(mine)}"
            counts.setdefault(what, {}).setdefault(count, []).append(role)
    for what, roles in counts.items():
        yield f"{what} of {', '.join(f'{", ".join(alike)} {count}' for count, alike in roles.items())}"
    if off:
        yield f"{', '.join(off)} off"
    if formless:
        yield f"{', '.join(formless)} without a quantized form"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole if whole else 0:.1f} %"


def _spoken(pattern: str) -> str:
    """The words of a pattern that say where, not which quantizer; the pattern where it has no other."""
    place = [word for word in words(pattern) if not word.endswith("_quantizer")]
    return ".".join(place) or pattern
