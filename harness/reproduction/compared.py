"""Compared: findings of the parity stage -> what a program asserts of imports, logits or exports."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from harness.case import EXPORT
from harness.errors import UsageError
from harness.finding import Finding
from harness.inventory import Shape
from harness.parity.compare import TOLERANCES
from harness.parity.stored import E2M1_MAX, E4M3_MAX
from harness.recipes import Format, Recipe
from harness.reproduction.quantized import MOST, shape

# Parts that a program compares by themselves, by their modules in Hugging Face and in Megatron.
_ALONE = re.compile(r"norm alone \((\S+) in Hugging Face, (\S+) in Megatron\)")
_ROTARY = re.compile(r"rotary frequencies \((\S+) in Hugging Face, (\S+) in Megatron\)")
_LOGITS = re.compile(r"the logits differ by (\S+?)(?:\.? |\.?$)")


def comparison(errors: Sequence[Finding], device: str) -> tuple[str, ...]:
    """What is asserted of a norm or of rotary frequencies, where those differ first, and of the logits.

    Raises UsageError where nothing of the logits shows it.
    """
    tolerance = TOLERANCES[device.partition(":")[0]]
    message = errors[0].message if errors else ""
    end = (
        "relative = float((logits - wanted).abs().max() / wanted.abs().max())",
        f'assert relative <= {tolerance}, f"the logits differ by {{relative:.2g}}"',
    )
    alone, logits = _ALONE.search(message), _LOGITS.search(message)
    rotary = _ROTARY.search(message)
    if rotary:
        return (*_frequencies(rotary[1], rotary[2], tolerance), *end)
    if alone:
        return (*_norms(alone[1], alone[2], tolerance), *end)
    if logits and float(logits[1]) <= tolerance:
        raise UsageError(
            f"{message}: no program shows this: the logits agree, and only the harness's comparison part by "
            "part sees it"
        )
    return end


def _frequencies(hf: str, megatron: str, tolerance: float) -> Iterator[str]:
    """Of positions far away what a few tokens hardly show."""
    yield "angles: dict[str, torch.Tensor] = {}"
    yield f"published.get_submodule({hf!r}).register_forward_hook("
    yield "    lambda module, inputs, out: angles.update(there=published_frequencies(out))"
    yield ")"
    yield f"model.get_submodule({megatron!r}).register_forward_hook("
    yield "    lambda module, inputs, out: angles.update(here=megatron_frequencies(module, out))"
    yield ")"
    yield "with torch.no_grad():"
    yield "    published(input_ids=tokens, use_cache=False)"
    yield "forward(model, tokens)"
    yield 'there, here = angles["there"], angles["here"]'
    yield "apart = float(((there - here).abs() / there.abs()).nan_to_num().max())"
    words = f"the angles of {megatron} and of {hf} differ by {{apart:.2g}}"
    yield f'assert apart <= {tolerance}, f"{words}"'


def _norms(hf: str, megatron: str, tolerance: float) -> Iterator[str]:
    yield f"there, here = published.get_submodule({hf!r}), model.get_submodule({megatron!r})"
    yield "weight = next(here.parameters())"
    yield "plain = torch.randn(4, len(weight)).to(weight.device)"
    yield "for size in (1.0, 1e-1, 1e-2, 1e-3, 1e-4):"
    yield "    with torch.no_grad():"
    yield "        one, other = there(plain * size), here(plain * size)"
    yield "    apart = float((one - other).abs().max() / one.abs().max())"
    words = f"{megatron} differs from {hf} by {{apart:.2g}} on inputs of {{size:g}}"
    yield f'    assert apart <= {tolerance}, f"{words}"'


# ---- exports ----


def export(
    errors: Sequence[Finding], recipe: Recipe, model: dict[str, Shape]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The steps beyond building, and what is asserted. ``model`` has Megatron's shapes.

    Raises UsageError where nothing of what was found can be shown.
    """
    lines: list[str] = []
    exporting = False
    for finding in errors[:MOST]:
        row = next((make for pattern, make in _EXPORTED if re.search(pattern, finding.message)), None)
        lines += row(finding, recipe, model) if row else ()
        exporting = exporting or row not in (_lacking, _unpublished)
    if not lines:
        raise UsageError(
            f"{errors[0].message}: no program shows this: what packed numbers and their scales stand for "
            "is the harness's own arithmetic"
        )
    # What one side lacks shows in the model already, and may stop the exporter.
    return ("quantize", EXPORT) if exporting else (), tuple(lines)


def _tensor(finding: Finding) -> str:
    return finding.message.partition("  ")[0]


def _lacking(finding: Finding, recipe: Recipe, model: dict[str, Shape]) -> Iterator[str]:
    yield "names = dict(model.state_dict())"
    words = f"{_tensor(finding)} is published, and Megatron's model has no {finding.expected}"
    yield f"assert {finding.expected!r} in names, {words!r}"


def _unpublished(finding: Finding, recipe: Recipe, model: dict[str, Shape]) -> Iterator[str]:
    name = finding.message.partition(" ")[0]
    yield f"assert {name!r} not in dict(model.state_dict()), {finding.message!r}"


def _sized(finding: Finding, recipe: Recipe, model: dict[str, Shape]) -> Iterator[str]:
    name, wanted = _tensor(finding), shape(finding.expected)
    yield f"found = tuple(tensors[{name!r}].shape)"
    yield f'assert found == {wanted!r}, f"{name} is {{found}}, {wanted!r} as published"'


def _missing(finding: Finding, recipe: Recipe, model: dict[str, Shape]) -> Iterator[str]:
    name = _tensor(finding)
    yield f'assert {name!r} in tensors, "{name} is missing, expected {finding.expected}"'


def _unexpected(finding: Finding, recipe: Recipe, model: dict[str, Shape]) -> Iterator[str]:
    name = _tensor(finding)
    yield f'assert {name!r} not in tensors, "{name} is exported, and no such tensor is expected"'


def _stored(finding: Finding, recipe: Recipe, model: dict[str, Shape]) -> Iterator[str]:
    name = _tensor(finding)
    yield f"found = described(tensors[{name!r}])"
    yield f'assert found == {finding.expected!r}, f"{name} is {{found}}, expected {finding.expected}"'


def _indexed(finding: Finding, recipe: Recipe, model: dict[str, Shape]) -> Iterator[str]:
    name = _tensor(finding)
    yield 'index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]'
    words = f"{name} stands in {{files.get({name!r})}}, and the index has {{index.get({name!r})}}"
    yield f'assert index.get({name!r}) == files.get({name!r}), f"{words}"'


def _numbers(finding: Finding, recipe: Recipe, model: dict[str, Shape]) -> Iterator[str]:
    """Of a vector that is one of Megatron's; rows of merged matrices are the harness's to find."""
    name, own = _tensor(finding), f"{finding.module}.{_tensor(finding).rpartition('.')[2]}"
    if own in model and len(model[own]) == 1 and "qkv" not in own and "fc1" not in own:
        yield f"wrong = int((tensors[{name!r}] != model.get_parameter({own!r}).cpu()).sum())"
        yield f'assert not wrong, f"{name} differs from Megatron\'s {own} in {{wrong}} places"'


def _scale(finding: Finding, recipe: Recipe, model: dict[str, Shape]) -> Iterator[str]:
    """One number: the largest that calibration saw, over the largest of the format."""
    name, module = _tensor(finding), finding.module or ""
    part = name.rpartition(".")[2]
    side = "input_quantizer" if part == "input_scale" else "weight_quantizer"
    forms: Sequence[Format] = recipe.formats(module, side)
    if len(forms) != 1 or part not in ("input_scale", "weight_scale", "weight_scale_2"):
        return
    largest = (
        E2M1_MAX * E4M3_MAX if forms[0].is_nvfp4 else {(4, 3): E4M3_MAX, 8: 127.0}.get(forms[0].num_bits)
    )
    if largest is None:
        return
    yield f"wanted = float(model.get_submodule({module!r}).{side}.amax.float().max()) / {largest}"
    yield f"found = float(tensors[{name!r}])"
    words = f"{name} is {{found:.6g}}, and calibration comes to {{wanted:.6g}}"
    yield f'assert abs(found - wanted) <= 1e-6 * wanted, f"{words}"'


def _no_file(finding: Finding, recipe: Recipe, model: dict[str, Shape]) -> Iterator[str]:
    yield 'assert said is not None, "hf_quant_config.json is missing"'


def _quantized_layer(finding: Finding, recipe: Recipe, model: dict[str, Shape]) -> Iterator[str]:
    found = re.search(r" for (\S+), expected", finding.message)
    module = found[1] if found else ""
    yield f'algorithm = (said or {{}}).get("quantized_layers", {{}}).get({module!r}, {{}}).get("quant_algo")'
    yield f'assert algorithm == {finding.expected!r}, f"quantized_layers has {{algorithm}} for {module}"'


def _excluded(finding: Finding, recipe: Recipe, model: dict[str, Shape]) -> Iterator[str]:
    yield 'excluded = (said or {}).get("exclude_modules", [])'
    if finding.expected is None:
        words = finding.message.partition("  ")[2]
        yield f"assert {finding.actual!r} not in excluded, {words!r}"
        return
    parts = str(finding.expected).split(".")
    names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    yield f"fits = [one for one in excluded if any(fnmatchcase(name, one) for name in {names!r})]"
    yield f'assert fits, "exclude_modules has nothing of {finding.expected}, which is not quantized"'


def _said(finding: Finding, recipe: Recipe, model: dict[str, Shape]) -> Iterator[str]:
    key = re.search(r"json  (\S+) is ", finding.message)
    name = key[1] if key else ""
    yield f"found = (said or {{}}).get({name!r})"
    yield f'assert found == {finding.expected!r}, f"hf_quant_config.json has {name} {{found!r}}"'


def _copied(finding: Finding, recipe: Recipe, model: dict[str, Shape]) -> Iterator[str]:
    yield 'copy = described_by.get("quantization_config")'
    yield 'assert copy is not None, "config.json has no quantization_config"'
    key = re.search(r"quantization_config has (\S+) ", finding.message)
    if key and key[1] in ("num_bits", "group_size"):
        yield 'copy = copy.get("config_groups", {}).get("group_0", {}).get("weights", {})'
    if key:
        words = f"quantization_config has {key[1]} {{copy.get({key[1]!r})!r}}"
        yield f'assert copy.get({key[1]!r}) == {finding.expected!r}, f"{words}"'


def _config(finding: Finding, recipe: Recipe, model: dict[str, Shape]) -> Iterator[str]:
    key = re.search(r"json  (\S+) is ", finding.message)
    names = key[1].split(".") if key else []
    yield "found = transformers.AutoConfig.from_pretrained(target).to_dict()"
    yield f"for name in {names!r}:"
    yield "    found = (found or {}).get(name)"
    yield f'assert found == {finding.expected!r}, f"config.json has {".".join(names)} {{found!r}}"'


# By the words of a finding, the most special first.
_EXPORTED: tuple[tuple[str, Callable[[Finding, Recipe, dict[str, Shape]], Iterator[str]]], ...] = (
    (r"  is published, and Megatron's model has no ", _lacking),
    (r"is Megatron's, and the published checkpoint has no tensor", _unpublished),
    (r" as published, and .* in Megatron's ", _sized),
    (r"^hf_quant_config\.json  is missing", _no_file),
    (r"^hf_quant_config\.json  quantized_layers", _quantized_layer),
    (r"^hf_quant_config\.json  exclude_modules", _excluded),
    (r"^hf_quant_config\.json  ", _said),
    (r"^config\.json  (has no )?quantization_config", _copied),
    (r"^config\.json  ", _config),
    (r"  is missing, expected ", _missing),
    (r" and no such tensor is expected", _unexpected),
    (r"  stands in ", _indexed),
    (r"  differs from Megatron's weight", _numbers),
    (r"  is \S+, and calibration comes to ", _scale),
    (r"  is .+ of \w+, expected ", _stored),
)
