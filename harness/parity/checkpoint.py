"""Checkpoint: a twin -> a Hugging Face model with weights that all matter, and its checkpoint on disk.

The modeling code is transformers' own, in float32 with eager attention. A checkpoint has the names and the
layout of the published one: what transformers fuses in memory is written apart again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.parity.hf_effect import check_in_effect
from harness.parity.hf_fill import fill
from harness.parity.twin import Twin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SEED = 20240607
_WEIGHTS = "model.safetensors"


def build(twin: Twin) -> PreTrainedModel:
    """The model of ``twin`` on the CPU: float32, evaluating, filled. Raises NoTwin where a setting has no effect."""
    import transformers

    outer = transformers.AutoConfig.for_model(**_arguments(twin.config))
    config = outer.get_text_config()
    check_in_effect(twin, config)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    name = _LANGUAGE_MODELS.get(twin.architecture, twin.architecture)
    model: PreTrainedModel = getattr(transformers, name)(config).float().eval()
    model.requires_grad_(False)
    fill(model, _SEED)
    return model


# The class that is the language model alone, where the published one has more.
_LANGUAGE_MODELS = {"Llama4ForConditionalGeneration": "Llama4ForCausalLM"}


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as keyword arguments; nested tables are copied, as transformers changes them."""
    copied: dict[str, Any] = json.loads(json.dumps(dict(config)))
    copied.pop("architectures", None)
    copied["dtype"] = copied.pop("torch_dtype")
    return copied


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """The float32 logits (batch, sequence, vocabulary) of ``tokens`` (batch, sequence)."""
    with torch.no_grad():
        output: Tensor = model(input_ids=tokens, use_cache=False).logits
    return output.float()


def language_model(model: nn.Module) -> nn.Module:
    """The part that has the embeddings, the decoder layers and the last norm."""
    return model.get_submodule(model.base_model_prefix)  # type: ignore[arg-type]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, in order."""
    layers = language_model(model).get_submodule("layers")
    return [layer for _, layer in layers.named_children()]


def save(model: PreTrainedModel, twin: Twin, folder: Path) -> None:
    """Write config.json and one file of weights to ``folder``, which is made if there is none."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(twin.config), indent=2))
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint_tensors(model, twin).items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})


def checkpoint_tensors(model: PreTrainedModel, twin: Twin) -> dict[str, Tensor]:
    """The tensors of the checkpoint by their published names; one for each, tied ones once."""
    from transformers.core_model_loading import revert_weight_conversion

    state = dict(model.state_dict())
    for tied in model.all_tied_weights_keys:
        state.pop(tied, None)
    found: dict[str, Tensor] = revert_weight_conversion(model, state)
    return {name: tensor for name, tensor in found.items() if not name.startswith(twin.without or ("\0",))}
