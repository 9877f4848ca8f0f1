"""Backward: one gradient step through fake quantization, as training that is aware of it takes.

ModelOpt rounds straight through: a gradient passes a quantizer as if it were not there, except, where a
config turns ``pass_through_bwd`` off, for numbers that were clipped. So every quantized matrix must get a
gradient, and so must what stands before the first one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from harness.errors import is_no_verdict
from harness.finding import Finding
from harness.layout_rules import Owner
from harness.proofs.proof import Proof, finding, judged, said, unsupported
from harness.proofs.quantizers import quantizers_off
from harness.routing import experts

NAME = "backward"
_EMBEDDING = "embedding.word_embeddings"


def prove_backward(
    model: nn.Module,
    matrices: Sequence[str],
    tokens: torch.Tensor,
    logits: torch.Tensor | None = None,
    tokens_of_expert: Mapping[str, int] | None = None,
) -> Proof:
    """One backward pass from the next token's cross-entropy; gradients of ``matrices`` and the embedding.

    ``matrices`` are module paths, ``tokens`` ids [batch, sequence]. ``logits`` are the model's for them,
    with their graph, where the caller has run it so already. ``tokens_of_expert`` says by path what each
    expert saw in that pass, where it was not this function's own: one without a token has no gradient.
    Gradients are gone afterwards, and the model is as it was. Unsupported where ModelOpt has no backward, and
    where the model raises the same with its quantizers off.
    """
    trained = {path: model.get_parameter(f"{path}.weight") for path in (*matrices, _EMBEDDING)}
    frozen = [path for path, weight in trained.items() if not weight.requires_grad]
    if len(frozen) == len(trained):
        what = "every weight is frozen: there is nothing to train"
        return judged(NAME, [finding(None, what, "a gradient", None)], "no gradients")
    grown = [(parameter, parameter.grad) for parameter in model.parameters()]
    seen = dict(tokens_of_expert or {})
    try:
        for parameter, _ in grown:
            parameter.grad = None
        with torch.enable_grad():
            if logits is None:
                logits, seen = forward_with_graph(model, tokens)
            _loss(logits, tokens).backward()  # type: ignore[no-untyped-call]
        findings = [*check_gradients(trained, frozen, seen)]
    except NotImplementedError as error:
        return unsupported(NAME, Owner.MODELOPT, said(error), "no gradient passes the quantizers")
    except RuntimeError as error:
        if is_no_verdict(error):
            raise
        if _raised_without_quantizers(model, tokens) == said(error):
            return unsupported(NAME, Owner.MEGATRON, said(error), "nor has the unquantized model gradients")
        message = f"a gradient step raises {said(error)}"
        return judged(NAME, [finding(None, message, "gradients", type(error).__name__)], "no gradients")
    finally:
        for parameter, gradient in grown:
            parameter.grad = gradient
    idle = [path for path in trained if _idle(path, seen)]
    detail = f"{len(trained) - len(frozen) - len(idle)} weights have a gradient, the embedding among them"
    detail += f"; {len(frozen)} are frozen" if frozen else ""
    detail += f"; {len(idle)} are of experts that saw no token" if idle else ""
    return judged(NAME, findings, detail)


def _raised_without_quantizers(model: nn.Module, tokens: torch.Tensor) -> str | None:
    """What the same step raises with every quantizer off. It leaves gradients behind where it raises none."""
    try:
        with quantizers_off(model), torch.enable_grad():
            logits, _ = forward_with_graph(model, tokens)
            _loss(logits, tokens).backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if is_no_verdict(error):
            raise
        return said(error)
    return None


def forward_with_graph(model: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, int]]:
    """Logits [batch, sequence, vocabulary] as ``trace.forward`` gives them, and what each expert saw."""
    batch_size, length = tokens.shape
    positions = torch.arange(length, device=tokens.device).expand(batch_size, -1)
    mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
    seen = {name: 0 for name, _ in experts(model)}

    def counting(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen[name] += args[0].shape[0]

        return hook

    handles = [expert.register_forward_pre_hook(counting(name)) for name, expert in experts(model)]
    try:
        logits: torch.Tensor = model(
            tokens, positions, mask.expand(batch_size, 1, -1, -1), runtime_gather_output=True
        )
    finally:
        for handle in handles:
            handle.remove()
    return logits, seen


def _loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each next token, of the last in a sequence the first.

    A position without a loss would leave without a gradient those experts that only it was sent to.
    """
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.roll(-1, 1).flatten())


def check_gradients(
    trained: Mapping[str, nn.Parameter], frozen: Sequence[str], seen: Mapping[str, int]
) -> Iterator[Finding]:
    """Findings where a weight, by module path, has no gradient, or one of no use; an idle expert may."""
    for path, weight in trained.items():
        if path in frozen:
            continue
        gradient = weight.grad
        wrong = 0 if gradient is None else int((~torch.isfinite(gradient)).sum())
        if wrong:
            yield finding(path, f"gradient is not finite in {wrong} of {weight.numel()} places", 0, wrong)
        elif _idle(path, seen):
            continue
        elif gradient is None:
            yield finding(path, "weight gets no gradient", "a gradient", None)
        elif not gradient.any():
            yield finding(path, "gradient is zero in every place", "> 0", 0.0)


def _idle(path: str, seen: Mapping[str, int]) -> bool:
    """Whether ``path`` is of an expert that saw no token."""
    return any(count == 0 and path.startswith(f"{name}.") for name, count in seen.items())
