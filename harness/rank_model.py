"""Rank model: one rank of a small model -> built, run and quantized, each a stage of its case.

Where the other ranks are simulated, only what does not hang on their numbers is checked: shapes, formats,
what ran.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from harness import trace
from harness.activations import activations
from harness.build import build_model, compare_parameters, parameter_shapes, refused
from harness.case import Check, Outcome
from harness.finding import has_errors
from harness.proofs import backward, state, weights
from harness.quantize import Quantization, quantize
from harness.rounding import largest_error
from harness.routing import Pass, forward_along, forward_and_routes
from harness.sharding import rank_parameters
from harness.standins.output import captured
from harness.world import receiving, simulated

if TYPE_CHECKING:
    from harness.architecture import Architecture
    from harness.layout import Layout
    from harness.rank import Rank
    from harness.recipes import Recipe
    from harness.stages import Run, Stage

# What a stage says of a rank whose numbers mean nothing.
SHAPES_ONLY = "simulated rank: shapes only"


@dataclass(frozen=True, slots=True)
class Job:
    """What one rank is to do. ``small`` is the plan's model; it runs in ``dtype``.

    ``length`` counts the tokens of a sequence, ``sequences`` those to calibrate with, as many as needed
    where None. ``prove`` are those of ``case.PROOFS`` to make.
    """

    small: Architecture
    recipe: Recipe
    layout: Layout
    rank: Rank
    dtype: torch.dtype
    length: int
    sequences: int | None = None
    prove: tuple[str, ...] = ()


@dataclass(slots=True)
class Outputs:
    """What came of it: logits [batch, sequence, vocabulary] where the rank is of the last pipeline stage.

    ``log`` is what ModelOpt said.
    """

    logits: torch.Tensor | None = None
    quantized: torch.Tensor | None = None
    sequences: int | None = None
    log: str = ""


def run_rank(run: Run, job: Job, device: torch.device) -> Outputs:
    """The stages build, forward and quantize. Call it inside ``standins.installed`` and ``open_world``."""
    outputs, model = Outputs(), _build(run, job, device)
    first: Pass | None = None
    with receiving():
        if run.can("forward"):
            first = _forward(run, job, device, model, outputs)
        if run.can("quantize"):
            _quantize(run, job, device, model, outputs, first)
    return outputs


def _build(run: Run, job: Job, device: torch.device) -> Any:
    model: Any = None
    with run.stage("build") as stage:
        expected = rank_parameters(job.small, job.layout, job.rank)
        with stage.foreign():
            model = build_model(job.small, job.layout, device, dtype=job.dtype)
        stage.findings.extend(refused(job.small, job.layout, device))
        if stage.usable:
            stage.findings.extend(compare_parameters(expected, parameter_shapes(model)))
            stage.detail = f"{len(expected)} parameters as in the inventory"
    return model


def _forward(run: Run, job: Job, device: torch.device, model: Any, outputs: Outputs) -> Pass | None:
    """The pass of the unquantized model, None where it came to no end."""
    small, length, batch = job.small, job.length, trace.BATCH_SIZE
    tokens = trace.token_ids(small.padded_vocab_size, batch, length, device)
    first: Pass | None = None
    with run.stage("forward") as stage:
        expected = activations(
            small, sequence_length=length, batch_size=batch, layout=job.layout, rank=job.rank
        )
        with stage.foreign(model), trace.recording(model) as recorder:
            first = forward_and_routes(model, tokens)
        # Where the pass raised, the trace up to there says first which shapes parted.
        stage.findings[:0] = trace.compare_trace(expected, recorder.trace())
        run.watch.traced(stage, expected, recorder.trace())
        if first is None:
            return None
        stage.detail = f"{len(expected)} modules as planned"
        last = job.rank.pp == job.layout.pp - 1
        if simulated():
            stage.detail += f", {SHAPES_ONLY}"
        elif last:
            stage.detail += ", logits finite"
        if not last:
            states = (length // job.layout.tp, batch, small.hidden_size)
            stage.findings.extend(trace.check_shape(first.output, states, "hidden states"))
        elif simulated():
            logits = (batch, length, small.padded_vocab_size)
            stage.findings.extend(trace.check_shape(first.output, logits, "logits"))
        else:
            stage.findings.extend(trace.check_logits(first.output, tokens, small.padded_vocab_size))
            outputs.logits = first.output
    return first


def _quantize(
    run: Run, job: Job, device: torch.device, model: Any, outputs: Outputs, first: Pass | None
) -> None:
    with run.stage("quantize") as stage:
        result = None
        with stage.foreign(model), run.watch.quantizing(model):
            result = quantize(
                model,
                job.recipe,
                job.small,
                device,
                length=job.length,
                sequences=job.sequences,
                layout=job.layout,
                rank=job.rank,
                first=first,
            )
        if result is None:
            return
        for proof in result.proofs:
            stage.proved(proof)
        stage.detail = f"{len(result.matrices)} matrices, {result.quantizers} quantizers"
        if simulated():
            stage.detail += f", {SHAPES_ONLY}"
        elif result.error is not None:
            stage.detail += f", relative error {result.error:.3g}"
            outputs.quantized = result.output
        outputs.sequences, outputs.log = result.sequences, result.log
        _prove(stage, job, device, model, result)


def _prove(stage: Stage, job: Job, device: torch.device, model: Any, result: Quantization) -> None:
    """The proofs that were asked for. Packing throws the weights away, so it comes last."""
    if not job.prove:
        return
    reason = _unprovable(stage)
    if reason:
        stage.checks.extend(Check(name, Outcome.SKIPPED, reason) for name in job.prove)
        return
    run = partial(forward_along, first=result.first)

    def fresh() -> Any:
        return build_model(job.small, job.layout, device, seed=_OTHER_SEED, dtype=job.dtype)

    with stage.foreign(), captured():
        if backward.NAME in job.prove:
            if job.layout.pp > 1:
                reason = "a gradient crosses the stages of a pipeline, and each rank has one"
                stage.checks.append(Check(backward.NAME, Outcome.SKIPPED, reason))
            else:
                trained = [path for path in result.matrices if _has_weight(model, path)]
                stage.proved(backward.prove_backward(model, trained, result.first.tokens))
        if state.NAME in job.prove:
            stage.proved(state.prove_state(model, fresh, run, result.output))
            stage.proved(state.prove_sharded_state(model, fresh, run, result.output))
        if weights.NAME in job.prove:
            config, bound = job.recipe.to_config(), largest_error(job.recipe, job.small)
            stage.proved(weights.prove_weights(model, config, run, result.output, bound))


# A restored model must owe nothing to the numbers that it was built with.
_OTHER_SEED = 4321


def _unprovable(stage: Stage) -> str | None:
    if has_errors(stage.findings):
        return "the model is not quantized as it should be"
    return SHAPES_ONLY if simulated() else None


def _has_weight(model: Any, path: str) -> bool:
    """Not so of an output layer that takes the embedding's."""
    return getattr(model.get_submodule(path), "weight", None) is not None
