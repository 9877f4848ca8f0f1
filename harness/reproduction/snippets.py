"""Snippets: functions that a written program may call -> the source of those that it does.

A row is the text of one function, or that of a function of this package which stands on its own; whatever a
program names is written into it, and so is what that names in turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from harness import routing, world
from harness.filling import KNOWN
from harness.parity import corrections, importing, lifting, recording, rules
from harness.proofs import effect, quantizers, sharding, state
from harness.reproduction.inlined import standing_alone

_FILL = f'''
# Centre and spread by the last part of a name.
SPREADS = {KNOWN!r}


def fill(model: Any) -> None:
    """Matrices keep the size of what goes through them, norm factors are about one, biases about zero."""
    centred = model.config.layernorm_zero_centered_gamma
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            last, width = name.rpartition(".")[2], parameter.shape[-1]
            if last in SPREADS:
                parameter.normal_(*SPREADS[last])
            elif parameter.dim() == 1:
                less = centred and not name.endswith(".mixer.norm.weight")
                parameter.normal_(float(name.endswith("norm.weight") and not less), 0.1)
            else:
                parameter.normal_(0.0, 1.0 if name.startswith("embedding.") else width**-0.5)
'''
_FORWARD = '''
def forward(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of token ids [batch, sequence]: positions from zero, and a causal mask."""
    with torch.no_grad():
        return with_graph(model, tokens)
'''
_WITH_GRAPH = """
def with_graph(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    batch, length = tokens.shape
    positions = torch.arange(length, device=tokens.device).expand(batch, -1)
    mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
    return model(tokens, positions, mask.expand(batch, 1, -1, -1), runtime_gather_output=True)
"""
_WATCHED = '''
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
_ROUTED = '''
def routed(model: Any, tokens: torch.Tensor, routes: Any = None) -> tuple[torch.Tensor, list[Any]]:
    """Logits, and which experts every router chose; those of ``routes``, where they are given: a token whose
    scores nearly tie goes elsewhere after any rounding."""
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    own = [router.router_replay for router in routers]
    for index, router in enumerate(routers):
        router.router_replay = RouterReplay()
        if routes is None:
            router.router_replay.set_router_replay_action(RouterReplayAction.RECORD)
        else:
            router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
            router.router_replay.set_target_indices(routes[index])
    logits = forward(model, tokens)
    chosen = [router.router_replay.get_recorded_indices() for router in routers] if routes is None else routes
    for router, before in zip(routers, own):
        router.router_replay = before
    return logits, chosen
'''
_DESCRIBED = '''
def described(tensor: Any) -> str:
    """``512 x 896 of bfloat16``."""
    shape = " x ".join(map(str, tensor.shape)) if tensor.numel() > 1 else "one number"
    return f"{shape} of {str(tensor.dtype).removeprefix('torch.')}"
'''

_FORMAT_OF = '''
def format_of(quantizer: Any) -> tuple[Any, ...]:
    """Bits; blocks of a fixed size by dimension, the bits of their scales, and whether those come from the
    data; the dimension that has a scale per index, where there are no blocks; signs and range."""
    sizes = quantizer.block_sizes or {}
    blocks = {axis: size for axis, size in sizes.items() if isinstance(axis, int) and size}
    scales = (sizes.get("scale_bits"), sizes.get("type") == "dynamic", None if sizes else quantizer.axis)
    return quantizer.num_bits, blocks, *scales, quantizer.unsigned, quantizer.narrow_range
'''
_FIRST_OF = '''
def first_of(quantizer: Any) -> Any:
    """Of formats in a row the first: it is the one that numbers are stored in."""
    return quantizer if isinstance(quantizer, TensorQuantizer) else quantizer[0]
'''

# Text by the name of its function.
_TEXTS: Mapping[str, str] = {
    "fill": _FILL,
    "forward": _FORWARD,
    "with_graph": _WITH_GRAPH,
    "routed": _ROUTED,
    "watched": _WATCHED,
    "described": _DESCRIBED,
    "format_of": _FORMAT_OF,
    "first_of": _FIRST_OF,
}
_STANDING_ALONE: Mapping[str, Any] = {
    function.__name__: function
    for function in (
        *(row.correct for row in corrections.CORRECTIONS),
        importing.empty,
        importing.unfilled,
        importing.constants,
        importing.differ,
        importing.reading,
        importing.stored_names,
        rules.grouped,
        recording.megatron_frequencies,
        recording.published_frequencies,
        lifting.published_rotation,
        lifting.no_norm_without_rotation,
        sharding.shards_of,
        sharding.loaded_from,
        sharding.shards_in,
        sharding.sizes_of,
        state.unlike,
        quantizers.quantizers,
        effect.relative_error,
        routing.counting,
        world.zeros_for_empty,
    )
}
# All that a program may call, by name.
FUNCTIONS = (*_TEXTS, *_STANDING_ALONE)
# What a text may name that a program must import, by the name: the lines, in their order.
_IMPORTS: Mapping[str, str] = {
    "copy": "import copy",
    "io": "import io",
    "json": "import json",
    "re": "import re",
    "tempfile": "import tempfile",
    "fnmatchcase": "from fnmatch import fnmatchcase",
    "Path": "from pathlib import Path",
    "transformers": "import transformers",
    "revert_weight_conversion": "from transformers.core_model_loading import revert_weight_conversion",
    "load_file": "from safetensors.torch import load_file",
    "save_file": "from safetensors.torch import save_file",
    "TopKRouter": "from megatron.core.transformer.moe.router import TopKRouter",
    "RouterReplay": (
        "from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction"
    ),
    "mto": "import modelopt.torch.opt as mto",
    "remove_per_module_state": (
        "from modelopt.torch.opt.plugins.mcore_dist_checkpointing import remove_per_module_state"
    ),
    "mtq": "import modelopt.torch.quantization as mtq",
    "export_mcore_gpt_to_hf": "from modelopt.torch.export import export_mcore_gpt_to_hf",
    "import_mcore_gpt_from_hf": "from modelopt.torch.export import import_mcore_gpt_from_hf",
    "megatron_importer": "from modelopt.torch.export.plugins import megatron_importer",
    "CustomModuleMapping": "from modelopt.torch.export.plugins.mcore_custom import CustomModuleMapping",
    "TensorQuantizer": "from modelopt.torch.quantization.nn import TensorQuantizer",
    "QTensorWrapper": "from modelopt.torch.quantization.qtensor import QTensorWrapper",
    "safe_load": "from modelopt.torch.utils import safe_load",
}


def snippets(text: str) -> tuple[str, tuple[str, ...]]:
    """The functions that ``text`` names, and those that they name, as source; and what all of it imports."""
    written: dict[str, str] = {}
    foreign: dict[str, None] = {}
    left = [text]
    while left:
        looked_at = left.pop()
        for name in FUNCTIONS:
            if name in written or not re.search(rf"\b{name}\(", looked_at):
                continue
            if name in _TEXTS:
                written[name] = _TEXTS[name].strip() + "\n"
            else:
                source, imports = standing_alone(_STANDING_ALONE[name])
                written |= source
                foreign |= dict.fromkeys(imports)
            left.append(written[name])
    whole = "\n\n".join([text, *written.values()])
    named = [line for name, line in _IMPORTS.items() if re.search(rf"(?<!\.)\b{name}\b", whole)]
    others = [line for line in foreign if line.split()[-1] not in _IMPORTS]
    return "\n\n".join(written.values()), tuple(dict.fromkeys((*named, *others)))
