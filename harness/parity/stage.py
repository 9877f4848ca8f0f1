"""Stage: a plan and the publisher's facts -> whether the same weights give the same logits, and if not, why.

A tiny Hugging Face model is made from the facts and saved, ModelOpt imports it into the tiny Megatron model
of the preset, and both run on the same tokens. A difference is a finding of the first part that differs;
a limit of the importer or of Megatron is none, and excuses nothing but the part that it is tied to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from harness.build import build_model
from harness.errors import out_of_memory
from harness.finding import Finding
from harness.layout import Layout
from harness.parity import checkpoint
from harness.parity.blame import (
    build_finding,
    difference,
    import_findings,
    import_limit,
    limit_at,
    not_reached,
)
from harness.parity.compare import TOLERANCES, Comparison, compare
from harness.parity.corrections import correct
from harness.parity.importing import Imported, import_checkpoint
from harness.parity.settings import completed
from harness.parity.twin import NoTwin, Twin, twin
from harness.stages import Raised
from harness.standins import installed
from harness.standins.patching import patched
from harness.trace import sequence_length, token_ids
from harness.world import open_world

if TYPE_CHECKING:
    from harness.architecture import Architecture
    from harness.arguments import Arguments
    from harness.facts import Facts
    from harness.parity.site import Site
    from harness.shrink import ShrinkPlan

NAME = "parity"
BATCH_SIZE = 2
# Tokens beyond the last that a window reaches, and windows longer than this are not reached.
_BEYOND, _LONGEST_WINDOW, _SHORTEST = 12, 512, 40


@dataclass(frozen=True, slots=True)
class Parity:
    """What the comparison came to.

    Errors among ``findings`` mean that the models differ. ``limit`` says why the comparison cannot be made,
    or what of the model it could not hold equal, and whose limit that is; empty where nothing limits it.
    ``relative`` is the largest difference of the logits over the largest published one, None where there
    are none to compare; ``sites`` every part that was compared.
    """

    findings: tuple[Finding, ...]
    limit: str
    detail: str
    relative: float | None = None
    sites: tuple[Site, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.limit and not any(finding.is_error for finding in self.findings)


def prove_parity(plan: ShrinkPlan, facts: Facts, device: torch.device) -> Parity:
    """Compare the plan's model with the publisher's, both in float32 on ``device``, on one rank.

    Call it with no world open. What Megatron or ModelOpt raises is in the result.
    """
    facts, warnings = completed(facts, plan.before.arguments)
    with TemporaryDirectory() as name, installed(device, plan.before), _exact():
        folder = Path(name)
        try:
            small = twin(facts, plan)
            published = checkpoint.build(small)
        except NoTwin as error:
            return Parity((), f"no small Hugging Face model: {error}", "")
        checkpoint.save(published, small, folder)
        published = published.to(device)
        with open_world(Layout(), device):
            proved = _proved(plan, facts, device, small, published, folder)
    return replace(proved, findings=(*proved.findings, *warnings))


def _proved(
    plan: ShrinkPlan, facts: Facts, device: torch.device, small: Twin, published: Any, folder: Path
) -> Parity:
    """On its own, as the model must be gone before its world is closed."""
    arguments = plan.before.arguments
    try:
        model = build_model(plan.after, Layout(), device, dtype=torch.float32)
    except Exception as error:
        return _raised(error, arguments, facts)
    imported = import_checkpoint(model, folder)
    if not imported.complete:
        limit = import_limit(imported, small, plan.after, arguments, facts)
        if limit:
            return Parity((), limit, _detail(imported, small, None))
        return Parity(tuple(import_findings(imported, small, arguments, facts)), "", "")
    length = tokens_of_a_sequence(plan.after, small)
    tokens = token_ids(vocabulary_of_both(plan.after, small), BATCH_SIZE, length, device)
    corrections = correct(published, tokens.shape[1])
    excuses: list[str] = []
    with ExitStack() as lifted:
        while True:
            try:
                comparison = compare(published, model, tokens, TOLERANCES[device.type])
            except Exception as error:
                return _raised(error, arguments, facts)
            detail = "; ".join((_detail(imported, small, comparison), *corrections))
            proved = Parity((), "; ".join(excuses), detail, comparison.relative, comparison.sites)
            if comparison.first is None:
                warnings = not_reached(facts, excuses, tokens.shape[1])
                return replace(proved, findings=tuple(warnings))
            excuse = limit_at(comparison.first, plan.after, arguments, facts)
            if excuse is None or excuse.words in excuses:
                found = difference(comparison, small, arguments, facts)
                return replace(proved, findings=(found,), limit="")
            excuses.append(excuse.words)
            if excuse.lift is None:
                return replace(proved, limit="; ".join(excuses))
            lifted.enter_context(excuse.lift(published, model))


def _raised(error: Exception, arguments: Arguments, facts: Facts) -> Parity:
    """What Megatron raised is a finding; what this package raised comes through, and that memory ran out."""
    raised = Raised.of(error)
    if raised.owner is None or out_of_memory(error):
        raise error
    return Parity((build_finding(raised, arguments, facts),), "", "")


def tokens_of_a_sequence(small: Architecture, published: Twin) -> int:
    """So many that they reach beyond the windows of both sides, where they are short enough to be reached."""
    window = published.text_config.get("sliding_window")
    reach = window + _BEYOND if isinstance(window, int) and window <= _LONGEST_WINDOW else 0
    length = max(_SHORTEST, reach, sequence_length(small))
    return min(length, small.max_position_embeddings)


def vocabulary_of_both(small: Architecture, published: Twin) -> int:
    """So many token ids are known to both sides: Megatron's may be padded."""
    vocabulary: int = published.text_config["vocab_size"]
    return min(small.padded_vocab_size, vocabulary)


def _detail(imported: Imported, small: Twin, comparison: Comparison | None) -> str:
    parts = [f"{len(imported.read)} tensors of {small.architecture}"]
    if comparison is not None:
        parts = [f"logits agree to {comparison.relative:.1e}, {len(comparison.sites)} parts", *parts]
    if imported.ours:
        parts.append(f"ours, as ModelOpt's importer has no such rule: {', '.join(imported.ours)}")
    window = small.text_config.get("sliding_window")
    if isinstance(window, int) and window > _LONGEST_WINDOW:
        parts.append(f"windows of {window} tokens are not reached")
    parts += [*small.assumed, *(f"left out: {what}" for what in small.left_out)]
    return "; ".join(parts)


@contextmanager
def _exact() -> Iterator[None]:
    """Matrix products of float32 numbers in float32, and not in TF32's ten bits."""
    with ExitStack() as stack:
        for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
            stack.enter_context(patched(backend, "allow_tf32", False))
        yield
