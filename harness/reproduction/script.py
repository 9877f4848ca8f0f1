"""Script: the subject of a failure -> a Python file that shows it with megatron-core, ModelOpt and
torch alone.

Everything that the preset says stands in it as literals. Where this machine lacks something, the stand-ins
that the case needed stand at its end, as source; on a machine that has all of it there are none.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness.build import ends, spec_arguments
from harness.calibration import Calibration
from harness.case import PARITY, CaseReport
from harness.devices import torch_device
from harness.errors import UsageError
from harness.layout import Layout
from harness.quantize import without_folders
from harness.recipes import find_recipe
from harness.reproduction.inlined import inlined
from harness.reproduction.literals import ConfigText, config_text, imports, literal
from harness.reproduction.subject import Subject, subject_of
from harness.standins import StandIn, rows_of
from harness.trace import BATCH_SIZE, sequence_length

if TYPE_CHECKING:
    from harness.parity.twin import Twin

# Stand-ins that only a quantized model needs, by the module that has them, and the word in the recipe's
# config without which it does not.
_OF_QUANTIZERS = {
    "kv_cache": "bmm",
    "mx": "block_sizes",
    "nvfp4": "block_sizes",
    "nvfp4_static": "block_sizes",
    "hadamard": "rotate",
    "functionals": "rotate",
}


_DTYPES = {str(dtype): dtype for dtype in (torch.bfloat16, torch.float32)}
_SPECS = "megatron.core.post_training.modelopt"


def write_script(report: CaseReport, path: Path) -> str:
    """Write the program; a line for the user. Raises UsageError where no program can show this failure."""
    subject = subject_of(report)
    path.write_text(script_text(subject), encoding="utf-8")
    return f"script: {path} shows it without the harness: python {shlex.quote(str(path))}"


def script_text(subject: Subject) -> str:
    """The program as source text."""
    body = "\n".join(_program(subject))
    found = "".join(f"import {module}\n" for module in imports(body))
    return body.replace("# imports of literals\n", found)


def _program(subject: Subject) -> Iterator[str]:
    case = subject.case
    versions = [f"{name} {metadata.version(name)}" for name in ("megatron-core", "nvidia-modelopt", "torch")]
    what = subject.what.replace("\\", "\\\\").replace('"""', "'''")
    yield f'"""{case.preset}, {case.recipe}, {subject.layout}, {case.device}: {what}\n'
    yield f'Seen with {", ".join(versions)}.\n"""\n'
    yield "from __future__ import annotations\n"
    if "parser" in subject.steps:
        yield from _parser(subject)
        return
    device = torch_device(case.device)
    try:
        text = config_text(subject.arguments, subject.layout, device, _DTYPES[subject.dtype])
    except Exception as error:  # Megatron's, of any kind
        said = f"{type(error).__name__}: {error}"
        raise UsageError(f"{case.name}: Megatron's reading of the flags made no config: {said}") from error
    yield from _imports(subject, text)
    yield "# What the preset says, as Megatron's own reading of its flags leaves it."
    yield _table("CONFIG", text.given)
    yield "# Set once the config is made."
    yield _table("AFTERWARDS", text.afterwards)
    if subject.model is not None:
        yield _table("MODEL", {name: literal(value) for name, value in ends(subject.model).items()})
    recipe = find_recipe(case.recipe) if "quantize" in subject.steps and case.recipe != PARITY else None
    config = without_folders(recipe.to_config()) if recipe else None
    if subject.twin is not None:
        yield from _twin(subject.twin)
    if config is not None:
        yield f"# {case.recipe}\nRECIPE = {_pretty(config)}\n"
    yield "\n".join(_main(subject, text))
    yield from _helpers(subject)
    rows = rows_of(device, subject.model) if subject.model is not None else ()
    rows = tuple(row for row in rows if _needed(row, config))
    yield "\n# ---- what the machine lacks on which this was written, in plain torch ----\n\n"
    yield inlined(rows)
    yield '\nif __name__ == "__main__":\n    main()\n'


def _parser(subject: Subject) -> Iterator[str]:
    yield "import sys\n\nfrom megatron.training.arguments import parse_args\n"
    yield "# The preset's words. Flags that Megatron-LM's ModelOpt examples add are let through.\n"
    yield f"WORDS = {_pretty(list(subject.words))}\n"
    yield 'if __name__ == "__main__":'
    yield '    sys.argv = ["pretrain", *(word for word in WORDS if not word.startswith("--export-"))]'
    yield "    parse_args()"
    yield from (f"    {line}" for line in subject.end)
    yield ""


def _imports(subject: Subject, text: ConfigText) -> Iterator[str]:
    hybrid = subject.model is not None and subject.model.hybrid
    yield "import contextlib\nimport fnmatch\nimport types\nfrom collections.abc import Iterator"
    yield "from contextlib import contextmanager\nfrom typing import Any\n"
    yield "import torch\n# imports of literals\n"
    yield "from megatron.core import parallel_state"
    if subject.model is not None and hybrid:
        yield "from megatron.core.models.hybrid.hybrid_model import HybridModel"
        yield f"from {_SPECS}.hybrid.model_specs import get_hybrid_stack_modelopt_spec"
    else:
        yield "from megatron.core.models.gpt import GPTModel"
        yield f"from {_SPECS}.gpt.model_specs import get_gpt_modelopt_spec"
    yield f"from megatron.core.transformer import {text.kind}"
    if subject.twin is not None:
        yield "import tempfile\n\nimport transformers"
        yield "from modelopt.torch.export import import_mcore_gpt_from_hf"
    if "quantize" in subject.steps:
        yield "import modelopt.torch.quantization as mtq"
        yield "from modelopt.torch.quantization.nn import TensorQuantizer"
    yield ""


def _main(subject: Subject, text: ConfigText) -> Iterator[str]:
    device = "meta" if subject.meta else subject.case.device
    yield "\ndef main() -> None:\n    with contextlib.ExitStack() as stack:"
    lines = [
        "stand_ins(stack)",
        "torch.manual_seed(1234)",
        f"config = {text.kind}(**CONFIG)",
        "for name, value in AFTERWARDS.items():",
        "    setattr(config, name, value)",
    ]
    if "build" in subject.steps:
        lines += [*_world(subject.layout, subject.case.device), *_build(subject, device)]
    else:
        settings = {dest: subject.arguments[dest] for dest in _settings(subject)}
        lines.append(f"settings = {_with_config(settings)}")
    if "forward" in subject.steps:
        lines += _forward(subject, device)
    if "quantize" in subject.steps:
        lines += _quantize(subject, device)
    if subject.twin is not None:
        lines += _parity(subject, subject.twin)
    lines += subject.end
    yield from (f"        {line}" for line in lines)
    yield ""


def _settings(subject: Subject) -> Sequence[str]:
    """The arguments that the assertions at the end name."""
    return [dest for dest in subject.arguments.values if any(f"[{dest!r}]" in line for line in subject.end)]


def _with_config(settings: Mapping[str, Any]) -> str:
    """Each as the config has it, where it has it under the same name, else as the preset has it."""
    given = ", ".join(f"{dest!r}: getattr(config, {dest!r}, {value!r})" for dest, value in settings.items())
    return "{" + given + "}"


def _world(layout: Layout, device: str) -> Iterator[str]:
    if layout.world_size == 1:
        backend = "nccl" if device.startswith("cuda") else "gloo"
        store, kind = "torch.distributed.HashStore()", f'"{backend}"'
    else:
        yield "from torch.testing._internal.distributed.fake_pg import FakeStore"
        yield "# Every collective does nothing: one process stands for the first rank."
        store, kind = "FakeStore()", '"fake"'
    group = f"{kind}, store={store}, rank=0, world_size={layout.world_size}"
    yield f"torch.distributed.init_process_group({group})"
    yield "parallel_state.initialize_model_parallel("
    for name, size in (
        ("tensor_model_parallel_size", layout.tp),
        ("pipeline_model_parallel_size", layout.pp),
        ("context_parallel_size", layout.cp),
        ("expert_model_parallel_size", layout.ep),
        ("expert_tensor_parallel_size", layout.etp),
    ):
        yield f"    {name}={size},"
    yield "    create_gloo_process_groups=False,"
    yield ")"
    if device.startswith("cuda"):
        yield "from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed"
        yield f'torch.cuda.set_device("{device}")'
        yield "model_parallel_cuda_manual_seed(1234)"


def _build(subject: Subject, device: str) -> Iterator[str]:
    model = subject.model
    if model is None:
        return
    if subject.meta:
        yield 'stack.enter_context(torch.device("meta"))'
    if model.hybrid:
        yield "model = HybridModel("
        yield "    config=config,"
        yield "    hybrid_stack_spec=get_hybrid_stack_modelopt_spec(remap_te_layernorm=True),"
        yield f"    hybrid_layer_pattern={model.arguments['hybrid_layer_pattern']!r},"
    else:
        yield "spec = get_gpt_modelopt_spec("
        yield "    config=config,"
        yield from (f"    {k}={literal(v)}," for k, v in spec_arguments(model, subject.layout).items())
        yield ")"
        yield "model = GPTModel("
        yield "    config=config,"
        yield "    transformer_layer_spec=spec,"
        yield f"    rope_scaling={model.arguments['use_rope_scaling']!r},"
    yield "    **MODEL,"
    yield "    pre_process=parallel_state.is_pipeline_first_stage(),"
    yield "    post_process=parallel_state.is_pipeline_last_stage(),"
    yield ")"
    yield f'model = model.to("{device}", {subject.dtype}).eval()'
    if not subject.meta:
        yield "fill(model)"


def _forward(subject: Subject, device: str) -> Iterator[str]:
    model = subject.model
    assert model is not None
    length = sequence_length(model, subject.layout)
    shape = f"({BATCH_SIZE}, {length})"
    yield f'tokens = torch.randint({model.padded_vocab_size}, {shape}).to("{device}")'
    yield "seen = watched(model)"
    yield "logits = forward(model, tokens)"


def _quantize(subject: Subject, device: str) -> Iterator[str]:
    model = subject.model
    assert model is not None
    length = sequence_length(model, subject.layout)
    tokens = Calibration(model, torch_device("cpu"), length=length).tokens
    yield f'calibration = torch.randint({model.padded_vocab_size}, {tuple(tokens.shape)}).to("{device}")'
    yield "mtq.quantize(model, RECIPE, lambda model: forward(model, calibration))"
    yield "logits = forward(model, tokens)"


def _twin(twin: Twin) -> Iterator[str]:
    """The tiny Hugging Face model. Raises UsageError where ModelOpt's importer has no rules for it."""
    from modelopt.torch.export.plugins.mcore_common import all_mcore_hf_import_mapping

    if twin.architecture not in all_mcore_hf_import_mapping:
        raise UsageError(
            f"ModelOpt's importer has no rules for {twin.architecture}: there is nothing to show"
        )
    config = {key: value for key, value in twin.config.items() if key not in ("architectures", "torch_dtype")}
    yield f"# The published model in small.\nPUBLISHED = {_pretty(config)}\n"


def _parity(subject: Subject, twin: Twin) -> Iterator[str]:
    """Every number of the model is none before, so that what is none afterwards was not filled."""
    model, device = subject.model, subject.case.device
    assert model is not None
    yield "published_config = transformers.AutoConfig.for_model(**PUBLISHED)"
    yield 'published_config._attn_implementation = "eager"'
    yield f"published = transformers.{twin.architecture}(published_config).float().eval()"
    yield "fill(published)"
    yield "with torch.no_grad():"
    yield "    for parameter in model.parameters():"
    yield '        parameter.fill_(float("nan"))'
    yield "with tempfile.TemporaryDirectory() as folder:"
    yield "    published.save_pretrained(folder)"
    yield "    import_mcore_gpt_from_hf(model, folder, dtype=torch.float32)"
    yield "empty = [name for name, one in model.named_parameters() if bool(torch.isnan(one).any())]"
    yield 'assert not empty, f"the importer fills nothing into {empty[0]}"'
    tokens = f"(2, {sequence_length(model)})"
    yield f'tokens = torch.randint({model.padded_vocab_size}, {tokens}).to("{device}")'
    yield "with torch.no_grad():"
    yield f'    wanted = published.to("{device}")(input_ids=tokens, use_cache=False).logits'
    yield "logits = forward(model, tokens)"
    yield "relative = float((logits - wanted).abs().max() / wanted.abs().max())"
    yield 'assert relative <= 1e-4, f"the logits differ by {relative:.2g}"'


_FILL = '''
def fill(model: torch.nn.Module) -> None:
    """Matrices keep the size of what goes through them, vectors are about one."""
    with torch.no_grad():
        for parameter in model.parameters():
            wide = parameter.dim() > 1
            parameter.normal_(0.0 if wide else 1.0, parameter.shape[-1] ** -0.5 if wide else 0.1)

'''
_FORWARD = '''
def forward(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of token ids [batch, sequence]: positions from zero, and a causal mask."""
    batch, length = tokens.shape
    positions = torch.arange(length, device=tokens.device).expand(batch, -1)
    mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
    with torch.no_grad():
        return model(tokens, positions, mask.expand(batch, 1, -1, -1), runtime_gather_output=True)


def watched(model: Any) -> dict[tuple[str, str], list[tuple[int, ...]]]:
    """The shapes that go into and come out of every module in the first pass."""
    seen: dict[tuple[str, str], list[tuple[int, ...]]] = {}

    def shapes(value: Any) -> Iterator[tuple[int, ...]]:
        if isinstance(value, torch.Tensor):
            yield tuple(value.shape)
        elif isinstance(value, dict):
            yield from shapes(list(value.values()))
        elif isinstance(value, (list, tuple)):
            for one in value:
                yield from shapes(one)

    def note(name: str, side: str, *values: Any) -> None:
        seen.setdefault((name, side), list(shapes(values)))

    for name, module in model.named_modules():
        module.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: note(name, "input", args, kwargs), with_kwargs=True
        )
        module.register_forward_hook(lambda module, args, out, name=name: note(name, "output", out))
    return seen

'''
_QUANTIZERS = """
def quantizers(model: Any) -> Iterator[tuple[str, Any]]:
    return ((path, one) for path, one in model.named_modules() if isinstance(one, TensorQuantizer))

"""


def _helpers(subject: Subject) -> Iterator[str]:
    if "build" in subject.steps and not subject.meta:
        yield _FILL
    if "forward" in subject.steps or subject.twin is not None:
        yield _FORWARD
    if "quantize" in subject.steps:
        yield _QUANTIZERS


def _needed(row: StandIn, config: Any) -> bool:
    word = _OF_QUANTIZERS.get(row.install.__module__.rpartition(".")[2])
    return word is None or (config is not None and word in repr(config))


def _table(name: str, entries: Mapping[str, str]) -> str:
    lines = "".join(f"    {key!r}: {value},\n" for key, value in entries.items())
    return f"{name}: dict[str, Any] = {{\n{lines}}}\n"


def _pretty(value: Any, indent: str = "") -> str:
    """A literal over as many lines as it has entries."""
    inner = indent + "    "
    if isinstance(value, Mapping) and value:
        rows = (f"{inner}{literal(key)}: {_pretty(entry, inner)},\n" for key, entry in value.items())
        return "{\n" + "".join(rows) + indent + "}"
    if isinstance(value, list) and value:
        return "[\n" + "".join(f"{inner}{_pretty(entry, inner)},\n" for entry in value) + indent + "]"
    return literal(value)
