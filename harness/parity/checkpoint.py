"""Checkpoint: a twin -> a Hugging Face model with weights that all matter, and its checkpoint on disk.

The modeling code is transformers' own, in float32 with eager attention. A checkpoint has the names and the
layout of the published one: what transformers fuses in memory is written apart again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.parity import hf_mxfp4
from harness.parity.hf_effect import check_in_effect
from harness.parity.hf_fill import fill
from harness.parity.twin import NoTwin, Twin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEED = 20240607
_WEIGHTS = "model.safetensors"
# The class that is the language model alone, where the published one has more, and its prefix there.
LANGUAGE_MODELS = {"Llama4ForConditionalGeneration": ("Llama4ForCausalLM", "language_model.")}
# Names that transformers reads but does not write as the publisher does.
RENAMED = {"backbone.embedding.weight": "backbone.embeddings.weight"}
IN_MXFP4 = frozenset({"GptOssForCausalLM"})
PACKED = re.compile(r"\.experts\.(gate_up|down)_proj$")


def build(twin: Twin) -> PreTrainedModel:
    """The model of ``twin`` on the CPU: float32, evaluating, filled.

    What transformers computes otherwise than the publisher still wants ``corrections.correct``, which depends
    on the length of the tokens. Raises NoTwin where a published setting would have no effect.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers.initialization import no_init_weights

    try:
        outer = transformers.AutoConfig.for_model(**_arguments(twin.config))
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise NoTwin(f"transformers' own configuration refuses what is published: {reason}") from error
    config: Any = outer.get_text_config()
    text = twin.text_config
    check_in_effect(text, config)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    if hasattr(config, "use_mamba_kernels"):
        config.use_mamba_kernels = False  # theirs are not exact, and loading them may ask the network
    name, _ = LANGUAGE_MODELS.get(twin.architecture, (twin.architecture, ""))
    with no_init_weights():
        model: Any = getattr(transformers, name)(config)
    model.tie_weights()
    if text.get("tie_word_embeddings") and model.lm_head.weight is not model.get_input_embeddings().weight:
        raise NoTwin(
            f"tie_word_embeddings is on, transformers' code of {config.model_type} does not tie them"
        )
    model.float().eval().requires_grad_(False)
    fill(model, SEED)
    _silence(model, twin)
    found: PreTrainedModel = model
    return found


def _silence(model: nn.Module, twin: Twin) -> None:
    """Make the modules that the checkpoint is without do nothing: what they add to their input is zero."""
    if not twin.without:
        return
    for name, parameter in model.named_parameters():
        if name.startswith(twin.without) and "down_proj" in name:
            parameter.zero_()


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
    return model.get_submodule("model")


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
    _, prefix = LANGUAGE_MODELS.get(twin.architecture, ("", ""))
    tensors: dict[str, Tensor] = {}
    for name, tensor in revert_weight_conversion(model, state).items():
        name = prefix + RENAMED.get(name, name)
        if name.startswith(twin.without or "\0"):
            continue
        if twin.architecture in IN_MXFP4 and PACKED.search(name):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = hf_mxfp4.encode(tensor.mT.cpu())
        else:
            tensors[name] = tensor
    return tensors
