"""Control: what ModelOpt raised on a model -> whether it is ModelOpt's limit, or the sizes are at fault.

The same recipe is asked of a model of the same kinds of layers, on one rank, whose sizes are plain, so that
no block, head or scale fails for being cut. What is raised there too, in the same words, no preset of such
layers can help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.architecture import architecture
from harness.build import build_model
from harness.errors import is_no_verdict
from harness.layout import Layout
from harness.quantize import quantize
from harness.stages import Raised
from harness.world import open_world

if TYPE_CHECKING:
    import torch

    from harness.architecture import Architecture
    from harness.recipes import Recipe

# The smallest width that every block of ModelOpt's formats divides.
WIDTH = 128

_WIDTHS = """
    hidden_size ffn_hidden_size kv_channels moe_ffn_hidden_size moe_shared_expert_intermediate_size
    moe_latent_size q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
    mamba_head_dim mamba_state_dim linear_key_head_dim linear_value_head_dim
""".split()
# Counts need only be powers of two: what divides another then still does.
_COUNTS = """
    padded_vocab_size num_attention_heads num_query_groups moe_router_num_groups
    mamba_num_heads mamba_num_groups linear_num_key_heads linear_num_value_heads
""".split()


@dataclass(frozen=True, slots=True)
class Answer:
    """Whether the control raised the same, and a line on what it did."""

    same: bool
    text: str


def plain(small: Architecture) -> Architecture:
    """The same kinds of layers, every width WIDTH, and what is counted powers of two."""
    values = small.arguments.values
    changes = {dest: WIDTH for dest in _WIDTHS if values.get(dest)}
    changes |= {dest: _power_of_two(values[dest]) for dest in _COUNTS if values.get(dest)}
    if small.moe is not None:
        changes["num_experts"] = _experts(small.moe.moe_router_topk, values, changes)
    return architecture(small.arguments.replaced(changes))


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _experts(topk: int, values: Mapping[str, Any], changes: Mapping[str, Any]) -> int:
    """As few as can be: most of what takes time is done for each."""
    groups, chosen = changes.get("moe_router_num_groups") or 1, values.get("moe_router_group_topk") or 1
    return max(2, groups, _power_of_two(-(-topk * groups // chosen)))


def ask(small: Architecture, recipe: Recipe, device: torch.device, raised: Raised) -> Answer:
    """Quantize the control of ``small`` as ``raised`` came about. Call it in ``standins.installed``, outside
    any world."""
    control = plain(small)
    with open_world(Layout(), device):
        return _asked(control, recipe, device, raised)


def _asked(control: Architecture, recipe: Recipe, device: torch.device, raised: Raised) -> Answer:
    """On its own, as the model must be gone before its world is closed."""
    try:
        model = build_model(control, Layout(), device)
    except Exception as error:
        if is_no_verdict(error):
            raise
        return Answer(False, f"a model of plain sizes cannot be built: {Raised.of(error).text}")
    try:
        quantize(model, recipe, control, device)
    except Exception as error:
        if is_no_verdict(error):
            raise
        other = Raised.of(error)
        if raised.same_as(other):
            return Answer(True, "a model of plain sizes raises the same")
        return Answer(False, f"a model of plain sizes raises {other.text}")
    return Answer(False, "a model of plain sizes goes through")
