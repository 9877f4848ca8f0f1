"""Quantized: findings of a quantized model -> the steps that a program takes, and what it asserts at its end.

A program has the same model and recipe, its own random numbers, and one process. What only the harness's
own arithmetic sees, and what several ranks say together, no program shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.errors import UsageError
from harness.finding import Finding
from harness.recipes import Format, Recipe, find_recipe
from harness.roles import role_of

# Findings that a program asserts: the first of them say what is wrong.
MOST = 8


@dataclass(frozen=True, slots=True)
class Shown:
    """What a program does for the findings of one check: more ``steps``, and ``lines`` for one finding."""

    lines: Callable[[Finding, Recipe], Iterator[str]]
    steps: tuple[str, ...] = ()
    numbers: bool = False  # which ranks that are simulated do not have


def shape(value: Any) -> tuple[int, ...] | None:
    """A shape that has been JSON in between is a list."""
    return None if value is None else tuple(value)


def shown(errors: Sequence[Finding], recipe: str, ranks: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Steps beyond quantizing, and the lines of the end, of a recipe on so many ranks.

    Raises UsageError, with the reason, where nothing of what was found can be shown.
    """
    steps: dict[str, None] = {}
    lines: list[str] = []
    reasons: list[str] = []
    for finding in errors:
        row = _SHOWN.get(finding.check or "")
        made: list[str] = []
        if row is None or (row.numbers and ranks > 1 and not _SHAPE.search(finding.message)):
            reasons.append(_NOT_SHOWN.get(finding.check or "", _ARITHMETIC) if row is None else _ONE_PROCESS)
        elif not (made := [*row.lines(finding, find_recipe(recipe))]):
            reasons.append(_ARITHMETIC)
        if made and row is not None and len(lines) < MOST * 4:
            steps |= dict.fromkeys(row.steps)
            lines += made
    if errors and not lines:
        raise UsageError(f"{errors[0].message}: no program shows this: {reasons[0]}")
    return tuple(steps), tuple(lines)


# Of an output's shape, which is right on ranks that are simulated, too.
_SHAPE = re.compile(r"(?:output is|logits are) \d+ x ")


def steps_of(check: str) -> tuple[str, ...]:
    """What a program does beyond quantizing for a check, so that what is raised on the way is raised."""
    return _SHOWN[check].steps if check in _SHOWN else ()


_ARITHMETIC = "it is the harness's own arithmetic that sees it"
_ONE_PROCESS = "it is in numbers of several ranks, and a program is one, whose collectives do nothing"
_NOT_SHOWN: Mapping[str, str] = {
    "blocks": "ModelOpt pads without a word, and it is the harness's own arithmetic of blocks and padding "
    "(the audit) that sees it",
}


# ---- coverage and calibration ----

_QUANTIZER = re.compile(r"  (\w+_quantizer) is .+, .+ means it (.+)$")
_FORMAT = re.compile(r"  (\w+_quantizer) (?:is .+|does not round), .+ makes it .+$")
_AMAX = re.compile(r"  (\w+_quantizer)(?: has no amax| has \d+ amax| amax is )")


def _coverage(finding: Finding, recipe: Recipe) -> Iterator[str]:
    meant, form = _QUANTIZER.search(finding.message), _FORMAT.search(finding.message)
    if meant:
        name = f"{finding.module}.{meant[1]}"
        yield f"on = [one.is_enabled for path, one in quantizers(model) if path.startswith({name!r})]"
        # Of several stages, one after the other, each is on or off.
        stages = [stage == "on" for stage in meant[2].split(", then ")]
        right = "not any(on)" if stages == [False] else f"on == {stages}"
        yield f'assert {right}, f"{name} is enabled: {{on}}"'
    elif form and finding.module:
        yield from _format(finding.module, form[1], recipe)
    elif isinstance(finding.actual, str):
        pattern = finding.actual
        yield f"fits = [path for path, one in quantizers(model) if fnmatchcase(path, {pattern!r})]"
        yield f"assert fits, {f'{pattern} matches no quantizer'!r}"


def _format(module: str, attribute: str, recipe: Recipe) -> Iterator[str]:
    name, role = f"{module}.{attribute}", role_of(module)
    forms = recipe.formats(module, attribute, role.parent_class if role else None)
    wanted = [_told(form) for form in forms]
    part = ""
    if any(form.blocks and not form.partial_blocks for form in forms):
        # Blocks as long as a dimension ModelOpt turns into an axis.
        wanted, part = [each[:2] for each in wanted], "[:2]"
    yield "found = ["
    yield f"    format_of(one){part}"
    yield "    for path, one in quantizers(model)"
    yield f"    if path.startswith({name!r}) and one.is_enabled and one._if_quant"
    yield "]"
    yield f'assert found == {wanted!r}, f"{name} has bits and blocks {{found}}"'


def _told(form: Format) -> tuple[Any, ...]:
    """A format as ``format_of`` in a program gives that of a quantizer."""
    blocks = dict(form.partial_blocks)
    axis = None if form.blocks else form.axis
    return form.num_bits, blocks, form.scale_bits, form.dynamic, axis, form.unsigned, form.narrow_range


def _calibration(finding: Finding, recipe: Recipe) -> Iterator[str]:
    module, amax = finding.module, _AMAX.search(finding.message)
    if amax:
        name = f"{module}.{amax[1]}"
        yield "for path, one in quantizers(model):"
        yield f"    if path.startswith({name!r}) and one.is_enabled:"
        yield '        assert one.amax is not None, f"{path} has no amax"'
        if isinstance(finding.expected, int):
            words = f'f"{{path}} has {{one.amax.numel()}} amax, expected {finding.expected}"'
            yield f"        assert one.amax.numel() == {finding.expected}, {words}"
        else:
            yield "        sound = torch.isfinite(one.amax) & (one.amax > 0)"
            yield '        assert bool(sound.all()), f"{path} has amax {one.amax[~sound]}"'
    elif "pre_quant_scale" in finding.message:
        yield f"module = model.get_submodule({module!r})"
        yield "scale = module.input_quantizer.pre_quant_scale"
        yield f'assert scale is not None, "{module} has no pre_quant_scale"'
        yield "columns = module.weight.shape[-1]"
        words = f"{module} has {{scale.numel()}} pre_quant_scale, expected {{columns}}"
        yield f'assert scale.numel() == columns, f"{words}"'
        yield "sound = torch.isfinite(scale) & (scale > 0)"
        yield f'assert bool(sound.all()), f"{module} has pre_quant_scale {{scale[~sound]}}"'
    elif "calibration tokens" in finding.message:
        words = f'"{module} saw none of the calibration tokens"'
        yield f"assert counts[{module!r}], {words}"


# ---- effect ----


def _effect(finding: Finding, recipe: Recipe) -> Iterator[str]:
    off = finding.message.startswith("with every quantizer off")
    logits = "off" if off else "after"
    what = "with every quantizer off the logits" if off else f"{recipe.name}: the quantized logits"
    lines = [*_of_numbers(finding, recipe, logits, what)]
    if not lines and not _SHAPE.search(finding.message):
        return
    if off:
        yield "for path, one in quantizers(model):"
        yield "    one.disable()"
        yield "off, _ = routed(model, tokens, routes)"
    yield f'assert {logits}.shape == before.shape, f"{what} are {{tuple({logits}.shape)}}"'
    yield from lines


def _of_numbers(finding: Finding, recipe: Recipe, logits: str, what: str) -> Iterator[str]:
    message, bound = finding.message, _bound(finding)
    if message.endswith("are not finite"):
        yield f"wrong = int((~torch.isfinite({logits})).sum())"
        yield f'assert not wrong, f"{{wrong}} of {{{logits}.numel()}} quantized logits are not finite"'
    elif message.endswith("changed no logit at all"):
        yield f'assert not torch.equal(before, after), "{recipe.name} changed no logit at all"'
    elif message.endswith("logits are not what they were"):
        yield "changed = int((before != off).sum())"
        yield f'assert not changed, f"{what} differ in {{changed}} places"'
    elif bound is not None:
        yield f"error = relative_error(before, {logits})"
        words = f"{what} move by {{error:.2g}} of their size, expected at most {bound}"
        yield f'assert error <= {bound}, f"{words}"'


def _bound(finding: Finding) -> str | None:
    """The bound as the finding has it, ``<= 0.12``, as source."""
    text = finding.expected
    return text.removeprefix("<= ") if isinstance(text, str) and text.startswith("<= ") else None


# ---- the proofs that are asked for ----


def _state(finding: Finding, recipe: Recipe) -> Iterator[str]:
    """What cannot be restored raises by itself; so does what has another size."""
    if "logits of the restored model" in finding.message:
        yield "changed = int((routed(restored, tokens, routes)[0] != after).sum())"
        yield 'assert not changed, f"{changed} logits of the restored model are not what they were"'
    elif finding.module and "the sharded state dict" in finding.message:
        yield from _sharding(finding, recipe)
    else:
        yield 'wrong = [f"{path}  {what}" for path, what, *_ in unlike(model, restored)]'
        yield f"wrong = [words for words in wrong if words.startswith({finding.module or ''!r})]"
        yield "assert not wrong, wrong[0]"


_SHARDED = re.compile(r"  (\w+_quantizer\.\S+) is ")


def _sharding(finding: Finding, recipe: Recipe) -> Iterator[str]:
    what = _SHARDED.search(finding.message)
    if not what:
        return
    name = f"{finding.module}.{what[1]}"
    yield "entries = model.sharded_state_dict()"
    yield f'assert {name!r} in entries, "{name} is not in the sharded state dict"'
    if finding.message.endswith("holds for it"):
        module, _, buffer = name.rpartition(".")
        yield f"stored = torch.cat([shard.data.flatten() for shard in shards_in(entries[{name!r}])])"
        yield f"own = model.get_submodule({module!r}).get_buffer({buffer!r}).flatten()"
        yield f'assert torch.equal(stored, own), "{name} is not what the sharded state dict holds for it"'
    elif finding.expected is not None and not isinstance(finding.expected, str):
        yield f"part, whole = sizes_of(entries[{name!r}])"
        wanted = shape(finding.expected)
        yield f'assert whole == {wanted!r}, f"{name} is {{part}} of {{whole}}, expected of {wanted!r}"'


_THERE = re.compile(r"  weight_quantizer\.(\S+) is there, ")


def _weights(finding: Finding, recipe: Recipe) -> Iterator[str]:
    path, message = finding.module, finding.message
    if path is None:
        bound = _bound(finding)
        yield "error = relative_error(after, routed(model, tokens, routes)[0])"
        words = f"packed weights move the logits by {{error:.2g}} of their size, expected at most {bound}"
        yield f'assert error <= {bound}, f"{words}"'
        return
    yield f"module = model.get_submodule({path!r})"
    if "  weight is packed" in message:
        yield f'assert not isinstance(module.weight, QTensorWrapper), "{path}.weight is packed"'
        return
    yield f'assert isinstance(module.weight, QTensorWrapper), "{path}.weight is not packed"'
    yield f"form = packing.weight_format(RECIPE, {path!r})"
    if "unpacks to" in message:
        yield "with torch.no_grad():"
        yield "    real = module.weight_quantizer(module.weight).float()"
        yield f"wanted = rounded[{path!r}].float()"
        yield "beyond = ((real - wanted).abs() > packing.step(form, wanted)) | ~torch.isfinite(real)"
        yield f'assert not beyond.any(), f"{path} unpacks to other numbers in {{int(beyond.sum())}} places"'
        return
    yield f"wanted = packing.packed(form, tuple(rounded[{path!r}].shape), torch.bfloat16)"
    yield 'found = {"weight": module.weight.data, **dict(module.weight_quantizer.named_buffers())}'
    there = _THERE.search(message)
    if there:
        yield f'assert {there[1]!r} not in found, "{path} has {there[1]}, which its format has not"'
        return
    yield "for name, one in wanted.items():"
    yield f'    assert name in found, f"{path} has no {{name}}, {{one}} expected"'
    yield '    same = (tuple(found[name].shape) == one.shape) if name == "weight" else True'
    yield "    same = same and found[name].numel() == torch.Size(one.shape).numel()"
    words = f"{path}: {{name}} is {{described(found[name])}}, {{one}} expected"
    yield f'    assert same and found[name].dtype == one.dtype, f"{words}"'


def _backward(finding: Finding, recipe: Recipe) -> Iterator[str]:
    """What a gradient step raises it raises again."""
    path = finding.module
    if path is None:
        if "frozen" in finding.message:
            yield 'assert any(one.requires_grad for one in model.parameters()), "every weight is frozen"'
        return
    yield f"gradient = model.get_parameter('{path}.weight').grad"
    yield f'assert gradient is not None, "{path}.weight gets no gradient"'
    yield f'assert bool(torch.isfinite(gradient).all()), "{path}.weight has a gradient that is not finite"'
    yield f'assert bool(gradient.any()), "the gradient of {path}.weight is zero in every place"'


_SHOWN: Mapping[str, Shown] = {
    "coverage": Shown(_coverage),
    "calibration": Shown(_calibration, ("experts",)),
    "effect": Shown(_effect, ("routes",), numbers=True),
    "sharding": Shown(_sharding),
    "backward": Shown(_backward, ("backward",), numbers=True),
    "state": Shown(_state, ("routes", "state"), numbers=True),
    "sharded state": Shown(_state, ("routes", "sharded state"), numbers=True),
    "weights": Shown(_weights, ("routes", "weights"), numbers=True),
}
