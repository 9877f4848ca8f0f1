"""Build: an architecture -> a small Megatron model, and its parameters compared with the inventory.

The same path as Megatron-LM's ``examples/post_training/modelopt/quantize.py``: the arguments become a
TransformerConfig through Megatron's own function, and the model is made from ModelOpt's layer specs as
``megatron/post_training/model_builder.py`` (core_v0.19.0) makes it. Whatever differs stands in
``OVERRIDES``, with a reason. What Megatron raises comes through untouched.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from harness.architecture import layer_symbols
from harness.arguments.values import GPT_OSS_YARN
from harness.errors import UnsupportedModel
from harness.filling import fill
from harness.finding import Finding, Severity
from harness.layout import Layout
from harness.rank import rank_of
from harness.sharding import buffer_shares, shares
from harness.standins import has_query_projection, no_mamba_ssm, no_transformer_engine
from harness.standins.output import import_foreign

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    from harness.architecture import Architecture

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Override:
    """An argument that a case sets itself, whatever the preset says, and why that is right."""

    dest: str
    value: Callable[[Layout, torch.dtype], Any]
    reason: str
    applies: Callable[[torch.device], bool] = lambda device: True


def _always(value: Any) -> Callable[[Layout, torch.dtype], Any]:
    return lambda layout, dtype: value


_ONE_RANK = "the layout is an axis of the case"
_DTYPE = "a case runs in bf16, as the ModelOpt examples do; in more where ranks are compared"
_NEEDS_TE = "the fused kernel is Transformer Engine's; the plain one computes the same"

OVERRIDES: tuple[Override, ...] = (
    Override("tensor_model_parallel_size", lambda layout, dtype: layout.tp, _ONE_RANK),
    Override("pipeline_model_parallel_size", lambda layout, dtype: layout.pp, _ONE_RANK),
    Override("decoder_first_pipeline_num_layers", lambda layout, dtype: layout.first, _ONE_RANK),
    Override("decoder_last_pipeline_num_layers", lambda layout, dtype: layout.last, _ONE_RANK),
    Override("context_parallel_size", lambda layout, dtype: layout.cp, _ONE_RANK),
    Override("expert_model_parallel_size", lambda layout, dtype: layout.ep, _ONE_RANK),
    Override("expert_tensor_parallel_size", lambda layout, dtype: layout.etp, _ONE_RANK),
    Override(
        "sequence_parallel",
        lambda layout, dtype: layout.tp > 1,
        "quantize.sh asks for it, and Megatron drops it where tensor parallelism is one",
    ),
    Override("bf16", lambda layout, dtype: dtype is torch.bfloat16, _DTYPE),
    Override("fp16", _always(False), _DTYPE),
    Override("params_dtype", lambda layout, dtype: dtype, _DTYPE),
    Override("moe_grouped_gemm", _always(False), "quantize.py turns it off before it builds"),
    Override(
        "perform_initialization",
        _always(False),
        "every parameter is filled by build_model, the same on every device",
    ),
    Override(
        "gradient_accumulation_fusion",
        _always(False),
        "only the backward pass uses it, it needs Apex, and ModelOpt turns it off",
    ),
    Override("apply_rope_fusion", _always(False), _NEEDS_TE, no_transformer_engine),
    Override("moe_permute_fusion", _always(False), _NEEDS_TE, no_transformer_engine),
    Override("moe_router_fusion", _always(False), _NEEDS_TE, no_transformer_engine),
    Override(
        "masked_softmax_fusion",
        _always(False),
        "the fused kernel is Apex's, for CUDA; the plain softmax computes the same",
        no_transformer_engine,
    ),
    Override(
        "use_mamba_mem_eff_path",
        _always(False),
        "the path of one kernel is mamba-ssm's; the other, in steps, computes the same",
        no_mamba_ssm,
    ),
)

# Models that Megatron-LM's builder can make, or refuses, and this one does not make: by argument, the
# value that it can build, and why no other.
_NOT_BUILT: Mapping[str, tuple[Any, str]] = {
    "mtp_num_layers": (None, "prediction heads are of Transformer Engine's layer specs, not of ModelOpt's"),
    "heterogeneous_layers_config_path": (None, "its layers stand in another file, which is not read"),
    "export_offline_model": (False, "it builds the model without its layers"),
    "export_default_te_spec": (False, "it is pruning's; quantize.py builds from ModelOpt's layer specs"),
    "spec": (None, "Megatron-LM's ModelOpt builder refuses layer specs of one's own"),
}


def transformer_config(
    arguments: Mapping[str, Any],
    layout: Layout,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> TransformerConfig:
    """Megatron's config of a model of any size; allocates nothing and needs no open world.

    ``arguments`` are Megatron's effective ones by argparse name. Megatron's own validation runs, and
    what it raises comes through. Raises UnsupportedModel for a kind of model that cannot be built here.
    """
    for dest, (supported, why) in _NOT_BUILT.items():
        if arguments.get(dest, supported) != supported:
            message = f"{dest} {arguments[dest]!r} makes a model that the harness cannot build: {why}"
            raise UnsupportedModel(message, dest)
    import_foreign()
    from megatron.training.argument_utils import core_transformer_config_from_args

    namespace = _namespace(arguments, layout, device, dtype)
    config: TransformerConfig = core_transformer_config_from_args(namespace)
    if namespace.enable_gpt_oss:
        config.position_embedding_type = "yarn"
        # Set after the config is made, whatever the flags say, under names that all start alike.
        for dest, value in GPT_OSS_YARN.items():
            setattr(config, f"yarn_{dest.removeprefix('yarn_')}", value)
    # The spec and the experts read these off the config; Megatron has no flags for them but ModelOpt's.
    config.qk_l2_norm = namespace.export_qk_l2_norm
    config.moe_apply_probs_on_input = namespace.export_moe_apply_probs_on_input
    return config


def _namespace(
    arguments: Mapping[str, Any], layout: Layout, device: torch.device, dtype: torch.dtype
) -> argparse.Namespace:
    """The arguments as Megatron's own parser would leave them, overrides applied."""
    values, fields = dict(arguments), _fields_of_config()
    for name, value in arguments.items():
        kind = fields.get(name)
        if kind is not None and isinstance(value, str):
            values[name] = kind[value]
        elif isinstance(value, tuple) and name in fields and name != "window_size":
            values[name] = list(value)  # Megatron tests for list; the window alone is a pair
    for override in OVERRIDES:
        if override.applies(device):
            values[override.dest] = override.value(layout, dtype)
    for dest, derive in _VALIDATED.items():
        values[dest] = derive(values)
    namespace = argparse.Namespace()
    vars(namespace).update(values)
    return namespace


@cache
def _fields_of_config() -> Mapping[str, type[Enum] | None]:
    """The fields of Megatron's config, and the enumeration of those that have one."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields = dataclasses.fields(TransformerConfig)
    return {each.name: type(each.default) if isinstance(each.default, Enum) else None for each in fields}


def _unlisted(value: Any) -> Any:
    """The only item of a list of one."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


# What Megatron's validate_args derives for TransformerConfig and ``arguments.resolve`` leaves alone: it
# depends on the layout, or changes no shape and no number. Order matters.
_VALIDATED: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "bias_gelu_fusion": lambda values: values["bias_gelu_fusion"] and values["add_bias_linear"],
    "apply_rope_fusion": lambda values: (
        values["apply_rope_fusion"] and values["position_embedding_type"] == "rope"
    ),
    "moe_router_load_balancing_type": lambda values: _unlisted(values["moe_router_load_balancing_type"]),
    "moe_aux_loss_coeff": lambda values: _unlisted(values["moe_aux_loss_coeff"]),
    "tensor_parallel_num_weight_shards": lambda values: (
        values["tensor_parallel_num_weight_shards"] or values["tensor_model_parallel_size"]
    ),
    "expert_tensor_parallel_num_weight_shards": lambda values: (
        values["expert_tensor_parallel_num_weight_shards"] or values["expert_tensor_parallel_size"]
    ),
    "gtp_weight_remat_size": lambda values: (
        values["tensor_parallel_num_weight_shards"] // values["tensor_model_parallel_size"]
    ),
    "expert_gtp_weight_remat_size": lambda values: (
        values["expert_tensor_parallel_num_weight_shards"] // values["expert_tensor_parallel_size"]
    ),
    # Routing in less would blur what the rest computes.
    "moe_router_dtype": lambda values: (
        "fp64" if values["params_dtype"] is torch.float64 else values["moe_router_dtype"]
    ),
    # ModelOpt supports no virtual pipeline, without which Megatron overlaps nothing.
    "virtual_pipeline_model_parallel_size": lambda values: None,
    "overlap_p2p_comm": lambda values: False,
    "variable_seq_lengths": lambda values: False,
}


def build_model(
    architecture: Architecture,
    layout: Layout,
    device: torch.device,
    seed: int = 1234,
    dtype: torch.dtype = torch.bfloat16,
) -> GPTModel | HybridModel:
    """The model in ``dtype`` and eval mode on ``device``, weights set by ``seed`` alone.

    Call it inside ``standins.installed`` and ``open_world``; the model is that of the rank whose world is
    open, and must not outlive them.
    """
    config = transformer_config(architecture.arguments.values, layout, device, dtype)
    build = _hybrid_model if architecture.hybrid else _gpt_model
    model = build(architecture, config, layout)
    # Megatron's get_model moves the model to the device and wraps it in Float16Module, which does this.
    model = model.to(device, dtype).eval()
    if device.type == "meta":  # shapes, and no values
        return model
    rank = rank_of(layout, distributed.get_rank())
    held = shares(architecture, layout, rank) | buffer_shares(architecture, layout, rank)
    fill(model, seed, held)
    return model


def _gpt_model(architecture: Architecture, config: TransformerConfig, layout: Layout) -> GPTModel:
    from megatron.core.models.gpt import GPTModel

    return GPTModel(
        config=config,
        transformer_layer_spec=_gpt_spec(architecture, config, layout),
        rope_scaling=architecture.arguments["use_rope_scaling"],
        **ends(architecture),
        **_stage(),
    )


def _gpt_spec(
    architecture: Architecture, config: TransformerConfig, layout: Layout
) -> TransformerBlockSubmodules:
    from megatron.core.post_training.modelopt.gpt.model_specs import get_gpt_modelopt_spec

    return get_gpt_modelopt_spec(config=config, **spec_arguments(architecture, layout))


def spec_arguments(architecture: Architecture, layout: Layout) -> dict[str, Any]:
    """What ModelOpt's function for the layer spec of a GPT model is told beside the config."""
    arguments = architecture.arguments.values
    return {
        # Context parallelism needs Transformer Engine's attention, whatever the arguments say.
        "local_core_attention": layout.cp == 1 and arguments["export_force_local_attention"],
        "remap_te_layernorm": True,  # quantize.sh passes --export-te-mcore-model
        "real_quant_cfg": arguments["export_real_quant_cfg"],
        "use_arbitrary_attention_mask": False,
    }


def _hybrid_model(architecture: Architecture, config: TransformerConfig, layout: Layout) -> HybridModel:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.post_training.modelopt.hybrid.model_specs import get_hybrid_stack_modelopt_spec

    pattern = architecture.arguments["hybrid_layer_pattern"]
    return HybridModel(
        config=config,
        # As there: --export-force-local-attention and llama3's rope scaling are passed to no hybrid.
        hybrid_stack_spec=get_hybrid_stack_modelopt_spec(remap_te_layernorm=True),
        # The pattern's own pipeline stages make way for the layout's.
        hybrid_layer_pattern=layer_symbols(pattern) if layout.pp == 1 else pattern,
        **ends(architecture),
        **_stage(),
    )


def ends(architecture: Architecture) -> dict[str, Any]:
    """What both kinds of model are told about their embeddings and output."""
    arguments = architecture.arguments.values
    return {
        "vocab_size": architecture.padded_vocab_size,
        "max_sequence_length": architecture.max_position_embeddings,
        "fp16_lm_cross_entropy": arguments["fp16_lm_cross_entropy"],
        "parallel_output": True,
        "share_embeddings_and_output_weights": not arguments["untie_embeddings_and_output_weights"],
        "position_embedding_type": arguments["position_embedding_type"],
        "rotary_percent": arguments["rotary_percent"],
        "rotary_base": arguments["rotary_base"],
    }


def _stage() -> dict[str, bool]:
    """Which ends of the model the pipeline stage of this rank holds."""
    from megatron.core import parallel_state

    return {
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
    }


def refused(architecture: Architecture, layout: Layout, device: torch.device) -> tuple[Finding, ...]:
    """A warning where Megatron refuses the model and a stand-in lets it be built all the same.

    Call it where ``build_model`` may be called.
    """
    if not has_query_projection(architecture):
        return ()
    from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver

    config = transformer_config(architecture.arguments.values, layout, device)
    (layer, *_) = _gpt_spec(architecture, config, layout).layer_specs
    try:
        QKNormConfigResolver(config, layer.submodules.self_attention.submodules).resolve()
    except ValueError as error:
        message = (
            "Megatron refuses latent attention without --q-lora-rank from ModelOpt's layer specs, and "
            f"examples/post_training/modelopt stops there: {str(error).splitlines()[0]}. "
            "The harness builds it without that norm, as published"
        )
        finding = architecture.arguments.finding
        return (finding("q_lora_rank", message, stage="build", severity=Severity.WARNING),)
    return ()


def parameter_shapes(model: nn.Module) -> dict[str, Shape]:
    """Name and shape of every parameter; a tied one counts once, under the embedding's name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def compare_parameters(expected: Mapping[str, Shape], actual: Mapping[str, Shape]) -> tuple[Finding, ...]:
    """One finding for every parameter that is missing, not expected, or of another shape.

    In the order of ``expected`` (the inventory), then what the model has besides, in its own order.
    """
    return tuple(_differences(expected, actual))


def _differences(expected: Mapping[str, Shape], actual: Mapping[str, Shape]) -> Iterable[Finding]:
    for name, shape in expected.items():
        if name not in actual:
            yield _finding(name, f"is missing, expected {by(shape)}", shape, None)
        elif actual[name] != shape:
            yield _finding(name, f"is {by(actual[name])}, expected {by(shape)}", shape, actual[name])
    for name, shape in actual.items():
        if name not in expected:
            yield _finding(name, f"is {by(shape)}, and no such parameter is expected", None, shape)


def _finding(name: str, what: str, expected: Shape | None, actual: Shape | None) -> Finding:
    module, _, parameter = name.rpartition(".")
    return Finding(
        stage="build",
        severity=Severity.ERROR,
        message=f"{short(module)}  {parameter} {what}",
        module=module,
        expected=expected,
        actual=actual,
    )


def by(shape: Shape) -> str:
    """A shape as people write it: ``1024 x 128``."""
    return " x ".join(map(str, shape)) or "one number"


def short(module: str) -> str:
    """A module path without the part that every layer shares."""
    return module.removeprefix("decoder.")
