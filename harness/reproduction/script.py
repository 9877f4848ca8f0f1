"""Script: the subject of a failure -> a Python file that shows it with megatron-core, ModelOpt and
torch alone.

Everything that the preset says stands in it as literals. Where this machine lacks something, the stand-ins
that the case needed stand at its end, as source; on a machine that has all of it there are none.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from harness.build import ends, spec_arguments
from harness.case import EXPORT, PARITY, CaseReport
from harness.devices import torch_device
from harness.errors import UsageError
from harness.layout import Layout
from harness.proofs import packing
from harness.quantize import without_folders
from harness.recipes import find_recipe
from harness.reproduction.inlined import inlined
from harness.reproduction.literals import ConfigText, config_text, imports, literal, pretty
from harness.reproduction.script_parity import (
    compared,
    constants,
    exported,
    imported,
    made,
    modules_of,
    saving,
)
from harness.reproduction.script_quantized import proofs, quantizing
from harness.reproduction.snippets import snippets
from harness.reproduction.subject import Subject, subject_of
from harness.standins import StandIn, rows_of
from harness.trace import BATCH_SIZE, sequence_length

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
    return "\n".join(_program(subject))


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
    device_rows = rows_of(device, subject.model) if subject.model is not None else ()
    recipe = find_recipe(case.recipe) if "quantize" in subject.steps and case.recipe != PARITY else None
    config = without_folders(recipe.to_config()) if recipe else None
    rows = tuple(row for row in device_rows if _needed(row, config))
    body = "\n".join((*_constants(subject, text, config), *_main(subject, text)))
    helpers, lines = snippets(body)
    yield from _imports(subject, text, (*lines, *(f"import {module}" for module in imports(body))))
    yield body
    yield helpers
    yield "\n# ---- what the machine lacks on which this was written, in plain torch ----\n\n"
    modules = modules_of() if subject.published is not None else ()
    yield inlined(rows, (*modules, *((packing,) if "weights" in subject.steps else ())))
    yield '\nif __name__ == "__main__":\n    main()\n'


def _constants(subject: Subject, text: ConfigText, config: Any) -> Iterator[str]:
    yield "# What the preset says, as Megatron's own reading of its flags leaves it."
    yield _table("CONFIG", text.given)
    yield "# Set once the config is made."
    yield _table("AFTERWARDS", text.afterwards)
    if subject.model is not None:
        yield _table("MODEL", {name: literal(value) for name, value in ends(subject.model).items()})
    if subject.published is not None:
        yield from constants(subject.published, imports=PARITY in subject.steps)
    if config is not None:
        yield f"# {subject.case.recipe}\nRECIPE = {pretty(config)}\n"


def _parser(subject: Subject) -> Iterator[str]:
    yield "import sys\n\nfrom megatron.training.arguments import parse_args\n"
    yield "# The preset's words. Flags that Megatron-LM's ModelOpt examples add are let through.\n"
    yield f"WORDS = {pretty(list(subject.words))}\n"
    yield 'if __name__ == "__main__":'
    yield '    sys.argv = ["pretrain", *(word for word in WORDS if not word.startswith("--export-"))]'
    yield "    parse_args()"
    yield from (f"    {line}" for line in subject.end)
    yield ""


def _imports(subject: Subject, text: ConfigText, lines: Sequence[str]) -> Iterator[str]:
    hybrid = subject.model is not None and subject.model.hybrid
    standard = [line for line in lines if line.split()[1].partition(".")[0] in sys.stdlib_module_names]
    yield "import contextlib\nimport types\nfrom collections.abc import Iterator"
    yield "\n".join(("from contextlib import contextmanager\nfrom typing import Any", *standard, ""))
    yield "import torch"
    yield "from megatron.core import parallel_state"
    if subject.model is not None and hybrid:
        yield "from megatron.core.models.hybrid.hybrid_model import HybridModel"
        yield f"from {_SPECS}.hybrid.model_specs import get_hybrid_stack_modelopt_spec"
    else:
        yield "from megatron.core.models.gpt import GPTModel"
        yield f"from {_SPECS}.gpt.model_specs import get_gpt_modelopt_spec"
    yield f"from megatron.core.transformer import {text.kind}"
    yield "\n".join((*(line for line in lines if line not in standard), ""))


def _main(subject: Subject, text: ConfigText) -> Iterator[str]:
    device = "meta" if subject.meta else subject.case.device
    if "build" in subject.steps:
        yield from _built(subject, device)
    if subject.published is not None:
        yield from saving(subject.published.twin)
    yield "\ndef main() -> None:\n    with contextlib.ExitStack() as stack:"
    lines = [
        "stand_ins(stack)",
        "torch.manual_seed(1234)",
        f"config = {text.kind}(**CONFIG)",
        "for name, value in AFTERWARDS.items():",
        "    setattr(config, name, value)",
    ]
    if "build" in subject.steps:
        lines += [*_world(subject.layout, subject.case.device)]
        lines += ['stack.enter_context(torch.device("meta"))'] if subject.meta else []
        lines += ["model = built(config)"] if subject.meta else ["model = built(config)", "fill(model)"]
    else:
        settings = {dest: subject.arguments[dest] for dest in _settings(subject)}
        lines.append(f"settings = {_with_config(settings)}")
    if subject.published is not None:
        lines += made(subject.published)
    if "forward" in subject.steps:
        if subject.layout.world_size > 1:
            lines.append("stack.enter_context(zeros_for_empty())")
        lines += _forward(subject, device)
    if "quantize" in subject.steps:
        lines += [*quantizing(subject, device), *proofs(subject)]
    if subject.published is not None and PARITY in subject.steps:
        lines += [*imported(subject.published), *compared(subject.published, device)]
    if EXPORT in subject.steps:
        lines += exported()
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


def _built(subject: Subject, device: str) -> Iterator[str]:
    yield "\ndef built(config: Any) -> Any:"
    yield from (f"    {line}" for line in _model(subject, device))
    yield ""


def _model(subject: Subject, device: str) -> Iterator[str]:
    model = subject.model
    assert model is not None
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
    yield f'return model.to("{device}", {subject.dtype}).eval()'


def _forward(subject: Subject, device: str) -> Iterator[str]:
    model = subject.model
    assert model is not None
    length = sequence_length(model, subject.layout)
    shape = f"({BATCH_SIZE}, {length})"
    yield f'tokens = torch.randint({model.padded_vocab_size}, {shape}).to("{device}")'
    if any("seen" in line for line in subject.end):
        yield "seen = watched(model)"
    yield "logits = forward(model, tokens)"


def _needed(row: StandIn, config: Any) -> bool:
    word = _OF_QUANTIZERS.get(row.install.__module__.rpartition(".")[2])
    return word is None or (config is not None and word in repr(config))


def _table(name: str, entries: Mapping[str, str]) -> str:
    lines = "".join(f"    {key!r}: {value},\n" for key, value in entries.items())
    return f"{name}: dict[str, Any] = {{\n{lines}}}\n"
