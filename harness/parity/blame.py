"""Blame: what differed or could not be imported -> a finding at the flag that most likely did it, or a limit.

That something is wrong, numbers and tensors have said before; the settings only say where to look. A limit
excuses what stands at its own parts and nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.families.rows import QKNorms
from harness.finding import Finding, Severity
from harness.layers import Attention
from harness.parity.importing import Imported, absent_tensor
from harness.parity.settings import ACTING, Setting, acting, differing, limits, unknown
from harness.parity.site import Part, Site

if TYPE_CHECKING:
    from harness.architecture import Architecture
    from harness.arguments import Arguments
    from harness.facts import Facts
    from harness.parity.compare import Comparison
    from harness.parity.twin import Twin

_STAGE = "parity"
# Settings that are named in one message, and tensors.
_SETTINGS, _NAMES = 4, 3


# Numbers that differ


def difference(comparison: Comparison, small: Twin, arguments: Arguments, facts: Facts) -> Finding:
    """The finding of the first part that differs."""
    site = comparison.first
    assert site is not None
    where = f"{site.name} ({site.hf} in Hugging Face, {site.megatron} in Megatron)"
    if site.layer is not None and site.layer < len(small.layers):
        where += f", layer {small.layers[site.layer]} of the published model,"
    before = _before(comparison, site)
    message = f"{where} is the first part that differs: {_by(site.relative)}{before}; {_ends(comparison)}"
    return _at(message, acting(site.part, arguments, facts), arguments, site.megatron)


def _by(relative: float) -> str:
    if math.isinf(relative):
        return "by its shape, or by numbers that are none"
    return f"by {relative:.2g} of its largest value"


def _before(comparison: Comparison, site: Site) -> str:
    if site.alone:
        return " when it is given the same input by itself"
    same = comparison.sites[: comparison.sites.index(site)]
    worst = max((one.relative for one in same), default=0.0)
    return f", while the {len(same)} compared before it agree to {worst:.1g}"


def _ends(comparison: Comparison) -> str:
    if math.isinf(comparison.relative):
        return "the logits are not comparable"
    return f"the logits differ by {comparison.relative:.2g}"


def _at(
    message: str, settings: tuple[Setting, ...], arguments: Arguments, module: str | None = None
) -> Finding:
    """A finding that stands at the setting that differs from the published one, if one does."""
    suspect = next((setting for setting in settings if setting.differs), None)
    wrong = [setting.text for setting in settings if setting.differs]
    others = [setting.text for setting in settings if not setting.differs][:_SETTINGS]
    if wrong:
        message = f"{'; '.join(wrong)}. {message[0].upper()}{message[1:]}"
    if others:
        message += f". {'Also acting' if wrong else 'Acting'} there: {', '.join(others)}"
    if suspect is None:
        return Finding(_STAGE, Severity.ERROR, message, module=module)
    found = arguments.finding(
        suspect.dest, message, stage=_STAGE, expected=suspect.published, actual=suspect.value
    )
    return Finding(
        _STAGE,
        Severity.ERROR,
        message,
        found.flag,
        found.line,
        found.column,
        module,
        suspect.published,
        suspect.value,
    )


# Limits


@dataclass(frozen=True, slots=True)
class _Row:
    """A limit of Megatron at some parts, beyond those that ``families`` knows: when, and in which words."""

    parts: frozenset[Part]
    applies: Callable[[Architecture, Facts, int | None], bool]
    words: str


# The published key of a limit that no flag can lift -> the parts that it changes.
_LIMITED: Mapping[str, frozenset[Part]] = {
    "rope_scaling": frozenset({Part.ROTARY, Part.QUERIES, Part.KEYS, Part.CORE}),
    "rope_interleave": frozenset({Part.QUERIES, Part.KEYS}),
    "norm_topk_prob": frozenset({Part.ROUTER}),
    "topk_method": frozenset({Part.ROUTER}),
    "attention_chunk_size": frozenset({Part.CORE}),
    "attn_temperature_tuning": frozenset({Part.QUERIES, Part.CORE}),
    "attention_bias": frozenset({Part.QUERY_DOWN, Part.KV_DOWN}),
}


def limit_at(site: Site, small: Architecture, facts: Facts) -> str:
    """Why no preset can make ``site`` equal, and whose limit that is; empty where it is none."""
    for limit in limits(facts):
        if site.part in _LIMITED.get(limit.source, frozenset()):
            return (
                f"Megatron: {limit.published} published ({limit.source}), which no flag can make: it builds "
                f"{limit.built}, so {limit.effect} ({site.name}: {_by(site.relative)})"
            )
    words = _known(site.part, small, facts, site.layer)
    if words:
        return f"{words} ({site.name}: {_by(site.relative)})"
    return _unpublished(site, facts)


def _known(part: Part | None, small: Architecture, facts: Facts, layer: int | None) -> str:
    for row in _ROWS:
        if part in row.parts and row.applies(small, facts, layer):
            return f"Megatron: {row.words}"
    return ""


def _unpublished(site: Site, facts: Facts) -> str:
    """What acts at ``site`` and no publisher's figure says: the twin has a default there, and no fact."""
    for dest, key in unknown(facts).items():
        if dest in ACTING[site.part]:
            return (
                f"{facts.label} does not say {key}: the published model was made with transformers' default, "
                f"and differs there ({site.name}: {_by(site.relative)})"
            )
    return ""


def _l2_without_rope(small: Architecture, facts: Facts, layer: int | None) -> bool:
    family = facts.family
    if family is None or family.qk_norm is not QKNorms.L2 or layer is None:
        return False
    mixer = small.layers[layer].mixer
    return isinstance(mixer, Attention) and not mixer.rope


def _normed_by_width(small: Architecture, facts: Facts, layer: int | None) -> bool:
    family = facts.family
    return family is not None and family.qk_norm is QKNorms.WIDTH


_ROWS: tuple[_Row, ...] = (
    _Row(
        frozenset({Part.QUERY_NORM, Part.KEY_NORM, Part.QUERIES, Part.KEYS}),
        _l2_without_rope,
        "it norms queries and keys in every layer, the published model not in those without rotary positions",
    ),
    _Row(
        frozenset({Part.QUERY_NORM, Part.KEY_NORM}),
        _normed_by_width,
        "it norms queries and keys head by head, the published model over all heads together",
    ),
)


# What was not imported


def import_limit(
    imported: Imported, twin: Twin, small: Architecture, arguments: Arguments, facts: Facts
) -> str:
    """What the importer lacks, where no setting of the preset can be the cause; empty otherwise."""
    if imported.missing:
        parts = [part_of(name) for name in imported.missing]
        wrong = [s for part in parts if part for s in acting(part, arguments, facts) if s.differs]
        if not wrong:
            names = ", ".join(imported.missing)
            unread = f"; {_some(imported.unread)} unread" if imported.unread else ""
            stopped = f"; {imported.raised.text}" if imported.raised is not None else ""
            return f"ModelOpt: its importer has no rule {names} for {twin.architecture}{stopped}{unread}"
    if imported.raised is not None:
        layer = _LAYER.search(imported.last)
        known = _known(part_of(imported.last), small, facts, int(layer[1]) if layer else None)
        return f"{known}: {_words(imported)}" if known else ""
    return ""


_LAYER = re.compile(r"layers\.(\d+)\.")


def _words(imported: Imported) -> str:
    """What the importer said when it stopped, and over which tensor."""
    raised = imported.raised
    assert raised is not None
    rest = f" ({' '.join(raised.rest.split())})" if raised.rest else ""
    return f"{raised.text}{rest}, over {imported.last or 'the first tensor'}"


def import_findings(imported: Imported, small: Twin, arguments: Arguments, facts: Facts) -> Iterator[Finding]:
    """One finding for what stopped the import, or one for each part of which something is left over."""
    if imported.raised is not None:
        yield _raised(imported, arguments, facts)
        return
    if imported.missing:
        names = ", ".join(imported.missing)
        part = next((part for name in imported.missing if (part := part_of(name))), None)
        message = f"ModelOpt's importer has no rule {names} for {small.architecture}, and the preset's model"
        yield _at(f"{message} asks for it", _settings(part, arguments, facts), arguments)
    for names, what in (
        (imported.unread, "{} of the checkpoint has no place in the model of the preset"),
        (imported.unfilled, "{} of the model of the preset is in no checkpoint of the published one"),
    ):
        for part, some in _by_part(names).items():
            yield _at(what.format(_some(tuple(some))), _settings(part, arguments, facts), arguments, some[0])


def _raised(imported: Imported, arguments: Arguments, facts: Facts) -> Finding:
    raised = imported.raised
    assert raised is not None
    tensor = absent_tensor(raised)
    if tensor is not None:
        message = f"the model of the preset has {tensor}, and the published checkpoint has no such tensor"
        return _at(message, _settings(part_of(tensor), arguments, facts), arguments, tensor)
    message = f"the importer stopped: {_words(imported)}"
    settings = _settings(part_of(imported.last), arguments, facts)
    if not any(setting.differs for setting in settings):
        settings = (*differing(arguments, facts), *settings)
    return _at(message, settings, arguments, imported.last or None)


def _settings(part: Part | None, arguments: Arguments, facts: Facts) -> tuple[Setting, ...]:
    return acting(part, arguments, facts) if part is not None else differing(arguments, facts)


def _by_part(names: tuple[str, ...]) -> Mapping[Part | None, list[str]]:
    found: dict[Part | None, list[str]] = {}
    for name in names:
        found.setdefault(part_of(name), []).append(name)
    return found


def _some(names: tuple[str, ...]) -> str:
    said = ", ".join(names[:_NAMES])
    return said if len(names) <= _NAMES else f"{said} and {len(names) - _NAMES} more"


# What a tensor, parameter or rule is called in checkpoints, in Megatron and by the importer -> its part, the
# most special first.
_CALLED: tuple[tuple[str, Part], ...] = (
    (r"shared_expert", Part.SHARED),
    (r"experts", Part.MLP),
    (r"router|gate\.(weight|bias)$|e_score_correction_bias|expert_bias", Part.ROUTER),
    (r"q_a_proj|q_down_proj", Part.QUERY_DOWN),
    (r"q_a_layernorm|q_norm|q_layernorm", Part.QUERY_NORM),
    (r"kv_a_layernorm|kv_layernorm", Part.KV_NORM),
    (r"k_norm|k_layernorm", Part.KEY_NORM),
    (r"kv_a_proj|kv_down_proj", Part.KV_DOWN),
    (r"kv_b_proj|kv_up_proj", Part.KV_UP),
    (r"q_b_proj|q_up_proj|linear_q_proj", Part.QUERY_UP),
    (r"sinks|softmax_offset", Part.CORE),
    (r"[qkv]_proj|qkv", Part.PROJECTION),
    (r"o_proj|linear_proj", Part.ATTENTION),
    (r"lm_head|output_layer", Part.LOGITS),
    (r"embed|position_embeddings", Part.EMBEDDING),
    (r"input_layernorm", Part.INPUT_NORM),
    (r"post_attention_layernorm|pre_mlp_layernorm", Part.MLP_NORM),
    (r"mixer\.norm|mixer_norm", Part.MAMBA_NORM),
    (r"A_log|dt_bias|conv1d|in_proj|out_proj|mixer", Part.MAMBA),
    (r"mlp|feed_forward|linear_fc|latent_proj", Part.MLP),
    (r"layers\.\d+\.norm", Part.INPUT_NORM),
    (r"norm", Part.FINAL_NORM),
)


def part_of(name: str) -> Part | None:
    """The part that a tensor, a parameter or a rule of the importer belongs to; None where no row says."""
    return next((part for pattern, part in _CALLED if re.search(pattern, name)), None)
