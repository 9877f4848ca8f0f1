"""Blame: what differed or could not be imported -> a finding at the flag that most likely did it, or a limit.

That something is wrong, numbers and tensors have said before; the settings only say where to look. A limit
excuses what stands at its own parts and nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.families.rows import QKNorms
from harness.finding import Finding, Severity
from harness.layers import Attention
from harness.parity.importing import Imported, absent_tensor
from harness.parity.lifting import Lift, no_norm_without_rotation, published_rotation
from harness.parity.settings import ACTING, Setting, acting, differing, limits, unknown
from harness.parity.site import Part, Site

if TYPE_CHECKING:
    from harness.architecture import Architecture
    from harness.arguments import Arguments
    from harness.facts import Facts
    from harness.parity.compare import Comparison
    from harness.parity.twin import Twin
    from harness.stages import Raised

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
    settings = acting(site.part, arguments, facts)
    elsewhere = [s.text for s in differing(arguments, facts) if s.dest not in ACTING[site.part]][:_SETTINGS]
    if elsewhere and not any(setting.differs for setting in settings):
        message += f". Elsewhere the preset differs: {'; '.join(elsewhere)}"
    return _at(message, settings, arguments, site.megatron)


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
        message = f"{'; '.join(wrong)}; {message}"
    if others and not wrong:
        message += f". Acting there: {', '.join(others)}"
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
class Excuse:
    """Why a part cannot be equal and whose limit that is, and how it is lifted to see what is behind it."""

    words: str
    lift: Lift | None = None


@dataclass(frozen=True, slots=True)
class _Row:
    """A limit of Megatron at some parts, beyond those that ``families`` knows: when, and in which words."""

    parts: frozenset[Part]
    applies: Callable[[Architecture, Facts, int | None], bool]
    words: str
    lift: Lift | None = None
    known_as: str = ""  # how the published side of it begins in ``families``


# The published key of a limit that no flag can lift -> the parts that it changes, and how it is lifted. Those
# that act beyond thousands of tokens alone (attention_chunk_size, attn_temperature_tuning) excuse nothing.
_LIMITED: Mapping[str, tuple[frozenset[Part], Lift | None]] = {
    "rope_scaling": (frozenset({Part.ROTARY}), published_rotation),
    "rope_interleave": (frozenset({Part.QUERIES, Part.KEYS}), None),
    "norm_topk_prob": (frozenset({Part.ROUTER}), None),
    "topk_method": (frozenset({Part.ROUTER}), None),
    "attention_bias": (frozenset({Part.QUERY_DOWN, Part.KV_DOWN}), None),
}


def limit_at(site: Site, small: Architecture, arguments: Arguments, facts: Facts) -> Excuse | None:
    """Why no preset can make ``site`` equal; None where a preset could.

    Nor is it a limit where a setting that acts there differs: that may be all there is to it.
    """
    if any(setting.differs for setting in acting(site.part, arguments, facts)):
        return None
    seen = f"({site.name}: {_by(site.relative)})"
    for source, (parts, lift) in _LIMITED.items():
        said = [limit for limit in limits(facts) if limit.source == source]
        if site.part in parts and said:
            published = ", ".join(limit.published for limit in said)
            built = ", ".join(limit.built for limit in said)
            words = f"{published} published ({source}), which no flag can make: it builds {built}, so"
            return Excuse(f"Megatron: {words} {said[0].effect} {seen}", lift)
    row = _known(site.part, small, facts, site.layer)
    if row is not None:
        return Excuse(f"Megatron: {row.words} {seen}", row.lift)
    return _unpublished(site, facts, seen)


def lifts(small: Architecture, arguments: Arguments, facts: Facts) -> Iterator[Excuse]:
    """Every limit of this model that ``limit_at`` would lift where it came to it."""
    sources = {limit.source for limit in limits(facts)}
    rows = [
        (parts, f"Megatron: {source} as published no flag can make", lift)
        for source, (parts, lift) in _LIMITED.items()
        if source in sources
    ]
    rows += [
        (row.parts, f"Megatron: {row.words}", row.lift)
        for row in _ROWS
        if any(row.applies(small, facts, layer) for layer in range(len(small.layers)))
    ]
    for parts, words, lift in rows:
        settings = [setting for part in parts for setting in acting(part, arguments, facts)]
        if lift is not None and not any(setting.differs for setting in settings):
            yield Excuse(words, lift)


def not_reached(facts: Facts, excused: Sequence[str], tokens: int) -> Iterator[Finding]:
    """A warning for each published thing that no flag can say and that did not act in so many tokens."""
    known = {row.known_as for row in _ROWS if any(row.words in words for words in excused)} - {""}
    for limit in limits(facts):
        seen = any(limit.published in words for words in excused)
        if not seen and not any(limit.published.startswith(start) for start in known):
            message = f"{limit.published} published ({limit.source}), which no flag can make: Megatron builds"
            message += f" {limit.built}, so {limit.effect}; nothing of it shows in {tokens} tokens"
            yield Finding(_STAGE, Severity.WARNING, message, expected=limit.published, actual=limit.built)


def _known(part: Part | None, small: Architecture, facts: Facts, layer: int | None) -> _Row | None:
    rows = (row for row in _ROWS if part in row.parts and row.applies(small, facts, layer))
    return next(rows, None)


def _unpublished(site: Site, facts: Facts, seen: str) -> Excuse | None:
    """What acts at ``site`` and no publisher's figure says: the twin has a default there, and no fact."""
    for dest, key in unknown(facts).items():
        if dest in ACTING[site.part]:
            words = (
                f"{facts.label} does not say {key}: the published model was made with transformers' default"
            )
            return Excuse(f"{words}, and differs there {seen}")
    return None


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
        no_norm_without_rotation,
        "an L2 norm on the layers with rotary positions",
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
        return f"Megatron: {known.words}: {_words(imported)}" if known is not None else ""
    return ""


_LAYER = re.compile(r"layers\.(\d+)\.")


def _words(imported: Imported) -> str:
    """What the importer said when it stopped, and over which tensor."""
    raised = imported.raised
    assert raised is not None
    rest = f" ({' '.join(raised.rest.split())})" if raised.rest else ""
    return f"{raised.text}{rest}, over {imported.last or 'the first tensor'}"


def import_findings(imported: Imported, small: Twin, arguments: Arguments, facts: Facts) -> Iterator[Finding]:
    """One finding for what stopped the import, or one for each part of which something is left over.

    What comes of one flag is said once.
    """
    said: set[tuple[str, int | None]] = set()
    for found in _left_over(imported, small, arguments, facts):
        if found.flag is None or (found.flag, found.line) not in said:
            yield found
        if found.flag is not None:
            said.add((found.flag, found.line))


def _left_over(imported: Imported, small: Twin, arguments: Arguments, facts: Facts) -> Iterator[Finding]:
    if imported.raised is not None:
        yield _raised(imported, arguments, facts)
        return
    if imported.missing:
        lacking = ", ".join(imported.missing)
        part = next((part for name in imported.missing if (part := part_of(name))), None)
        message = (
            f"the model of the preset has {lacking}, for which the importer of {small.architecture} has no"
        )
        yield _at(f"{message} rule", _settings(part, arguments, facts), arguments)
    for names, what in (
        (imported.unread, "the checkpoint's {} has no place in the model of the preset"),
        (imported.unfilled, "the published checkpoint has nothing for {} of the model of the preset"),
        (imported.overwritten, "the checkpoint has numbers for {}, a constant in the model of the preset"),
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


def build_finding(raised: Raised, arguments: Arguments, facts: Facts) -> Finding:
    """The finding of a model that Megatron does not build, or does not run."""
    return _at(f"raised {raised.actual}{raised.where}", differing(arguments, facts), arguments)


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
