"""Script parity: a twin -> the lines of a program that makes it, saves it, and has ModelOpt import it or
export what was quantized in its place.

What the harness puts right, in transformers, in ModelOpt's importer or in Megatron, a program puts right as
well, each with the reason beside it: so that nothing is left but the failure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from harness.errors import UsageError
from harness.facts import facts_beside
from harness.parity import hf_fill, hf_mxfp4
from harness.parity.blame import Excuse, lifts
from harness.parity.checkpoint import IN_MXFP4, LANGUAGE_MODELS, PACKED, RENAMED, SEED
from harness.parity.corrections import corrections
from harness.parity.rules import FUSED, added
from harness.parity.settings import completed
from harness.parity.stage import BATCH_SIZE, tokens_of_a_sequence, vocabulary_of_both
from harness.parity.twin import NoTwin, Twin, twin
from harness.reproduction.literals import literal, pretty

if TYPE_CHECKING:
    from harness.case import Case
    from harness.shrink import ShrinkPlan


@dataclass(frozen=True, slots=True)
class Published:
    """A twin, what of Megatron is put right for the comparison, and for how many tokens."""

    twin: Twin
    lifts: tuple[Excuse, ...]
    sequence: int
    vocabulary: int


def published_of(case: Case, plan: ShrinkPlan, what: str) -> Published:
    """The twin of a case's plan. Raises UsageError, which begins with ``what``, where there is none."""
    facts, _ = facts_beside(Path(case.path))
    if facts is None:
        raise UsageError(f"{what}: no program shows this: nothing published is there to compare with")
    facts, _ = completed(facts, plan.before.arguments)
    try:
        small = twin(facts, plan)
    except NoTwin as error:
        raise UsageError(f"{what}: no program shows this: no small Hugging Face model: {error}") from error
    lifted = tuple(lifts(plan.after, plan.before.arguments, facts))
    length, vocabulary = tokens_of_a_sequence(plan.after, small), vocabulary_of_both(plan.after, small)
    return Published(small, lifted, length, vocabulary)


def modules_of() -> tuple[ModuleType, ...]:
    """The modules of this package that stand in the program as source: how every part is made to matter."""
    return (hf_mxfp4, hf_fill)


def constants(published: Published, imports: bool) -> Iterator[str]:
    """The config of the tiny model, and the rules that ModelOpt's importer lacks."""
    config = pretty(dict(published.twin.config))
    yield f"# The published model in small: its config.json.\nPUBLISHED = {config}\n"
    if imports:
        yield from _rules(published.twin.architecture)


def _rules(architecture: str) -> Iterator[str]:
    """Raises UsageError where the importer has no rules for the architecture, and there are none of ours."""
    from modelopt.torch.export.plugins.mcore_common import all_mcore_hf_import_mapping

    known: Mapping[str, Any] = all_mcore_hf_import_mapping
    ours = {
        rule.name: f"CustomModuleMapping({rule.do!r}, {rule.prefix!r}, {literal(dict(rule.options))})"
        for rule in added(architecture, known.get(architecture, {}))
    }
    if architecture in FUSED:
        ours["linear_qkv"] = f"CustomModuleMapping('name_remapping', {FUSED[architecture]!r}, {{}})"
    if ours:
        rows = "".join(f"    {name!r}: {text},\n" for name, text in ours.items())
        yield f"# What ModelOpt's importer has no rule for, in its own words.\nRULES = {{\n{rows}}}\n"
    elif architecture not in known:
        raise UsageError(f"ModelOpt's importer has no rules for {architecture}: there is nothing to show")


# ---- the published model ----


def made(published: Published) -> Iterator[str]:
    """Its class, its numbers, and what of transformers is put right."""
    small = published.twin
    name, _ = LANGUAGE_MODELS.get(small.architecture, (small.architecture, ""))
    yield "given = json.loads(json.dumps(PUBLISHED))"
    yield 'del given["architectures"], given["torch_dtype"]'
    yield "given = transformers.AutoConfig.for_model(**given).get_text_config()"
    yield 'given._attn_implementation = given._experts_implementation = "eager"'
    yield "given.use_mamba_kernels = False"
    yield f"published = transformers.{name}(given).float().eval().requires_grad_(False)"
    yield f"hf_fill.fill(published, {SEED})"
    if small.without:
        yield "# What the plan has no counterpart of adds nothing."
        yield "for name, parameter in published.named_parameters():"
        yield f'    if name.startswith({small.without!r}) and "down_proj" in name:'
        yield "        parameter.zero_()"
    for row in corrections(small.text_config):
        yield f"# {row.words}."
        yield f"{row.correct.__name__}(published, {published.sequence})"


def saving(small: Twin) -> Iterator[str]:
    """A function that saves it, under the names and in the layout of the published checkpoint."""
    _, prefix = LANGUAGE_MODELS.get(small.architecture, ("", ""))
    yield "def save(published: Any, folder: Path) -> None:"
    yield '    """A checkpoint with the names and the layout of the published one."""'
    yield "    state = dict(published.state_dict())"
    yield "    for tied in published.all_tied_weights_keys:"
    yield "        state.pop(tied, None)"
    yield "    tensors = {}"
    yield "    for name, tensor in revert_weight_conversion(published, state).items():"
    if small.architecture.startswith("NemotronH"):
        yield f"        name = {RENAMED!r}.get(name, name)"
    if prefix:
        yield f"        name = {prefix!r} + name"
    if small.without:
        yield f"        if name.startswith({small.without!r}):"
        yield "            continue"
    if small.architecture in IN_MXFP4:
        yield f"        if re.search({PACKED.pattern!r}, name):"
        yield "            blocks, scales = hf_mxfp4.encode(tensor.mT)"
        yield '            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}'
        yield "            continue"
    yield "        tensors[name] = tensor.contiguous()"
    yield '    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})'
    yield '    (folder / "config.json").write_text(json.dumps(PUBLISHED))'
    yield ""
    yield ""


# ---- imported, and compared ----


def imported(published: Published) -> Iterator[str]:
    """Every number of the model is none before, so that what is none afterwards was not filled."""
    name = published.twin.architecture
    if [*_rules(name)]:
        yield "book = megatron_importer.all_mcore_hf_import_mapping"
        yield f"book[{name!r}] = {{**book.get({name!r}, {{}}), **RULES}}"
    yield "empty(model)"
    yield "before = {name: tensor.clone() for name, tensor in constants(model)}"
    yield "read: dict[str, None] = {}"
    yield "with tempfile.TemporaryDirectory() as folder, reading(read):"
    yield "    save(published, Path(folder))"
    yield "    import_mcore_gpt_from_hf(model, folder, dtype=torch.float32)"
    yield "    unread = sorted(stored_names(Path(folder)) - read.keys())"
    if name in FUSED:
        yield "# All queries come first, then all keys, then all values: Megatron has them group by group."
        yield "for path, module in model.named_modules():"
        yield '    if path.endswith(".linear_qkv"):'
        yield "        heads, groups = config.num_attention_heads, config.num_query_groups"
        yield "        module.weight.data.copy_(grouped(module.weight.data, heads, groups))"
    yield "left = [*unfilled(model)]"
    yield 'assert not left, f"the checkpoint has nothing for {left[0]}"'
    yield 'assert not unread, f"the importer reads nothing of {unread[0]}"'
    yield "for name, tensor in constants(model):"
    yield "    if name in before:"
    yield '        assert not differ(tensor, before[name]), f"the importer writes to {name}, a constant"'


def compared(published: Published, device: str) -> Iterator[str]:
    """The logits of both on the same tokens."""
    if device.startswith("cuda"):
        yield "torch.backends.cudnn.allow_tf32 = False"
    yield f'published = published.to("{device}")'
    sizes = f"({BATCH_SIZE}, {published.sequence})"
    yield f'tokens = torch.randint({published.vocabulary}, {sizes}).to("{device}")'
    for excuse in published.lifts:
        assert excuse.lift is not None
        yield f"# {excuse.words}. The rest is compared as if it could."
        yield f"stack.enter_context({excuse.lift.__name__}(published, model))"
    yield "with torch.no_grad():"
    yield "    wanted = published(input_ids=tokens, use_cache=False).logits"
    yield "logits = forward(model, tokens)"


# ---- exported ----


def exported() -> Iterator[str]:
    """As Megatron-LM's examples export; what is written is read back."""
    yield "source, target = (Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2))"
    yield "save(published, source)"
    yield "router = model.config.moe_router_dtype"
    yield "export_mcore_gpt_to_hf("
    yield "    model, str(source), dtype=torch.bfloat16, export_dir=str(target), moe_router_dtype=router"
    yield ")"
    yield "tensors, files = {}, {}"
    yield 'for file in sorted(target.glob("*.safetensors")):'
    yield "    found = load_file(file)"
    yield "    tensors |= found"
    yield "    files |= dict.fromkeys(found, file.name)"
    yield 'described_by = json.loads((target / "config.json").read_text())'
    yield 'beside = target / "hf_quant_config.json"'
    yield 'said = json.loads(beside.read_text())["quantization"] if beside.is_file() else None'
