"""Script quantized: a subject -> the lines of a program that quantize its model, and prove what was asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from harness.calibration import Calibration
from harness.devices import torch_device
from harness.reproduction.subject import Subject
from harness.trace import BATCH_SIZE, sequence_length


def quantizing(subject: Subject, device: str) -> Iterator[str]:
    model = subject.model
    assert model is not None
    length = sequence_length(model, subject.layout)
    tokens = Calibration(model, torch_device("cpu"), length=length).tokens
    # Calibration sees what is measured: what is beyond the range that it saw would be clipped.
    known = BATCH_SIZE if "forward" in subject.steps else 0
    more = f"torch.randint({model.padded_vocab_size}, {(len(tokens) - known, length)!r})"
    more = f'{more}.to("{device}")'
    yield f"calibration = torch.cat([tokens, {more}])" if known else f"calibration = {more}"
    if "routes" in subject.steps:
        yield "before, routes = routed(model, tokens)"
    if "experts" in subject.steps:
        yield "counts = stack.enter_context(counting(model))"
    yield "mtq.quantize(model, RECIPE, lambda model: forward(model, calibration))"
    if "forward" in subject.steps:
        yield "logits = forward(model, tokens)"


def proofs(subject: Subject) -> Iterator[str]:
    """What was asked to be proved of the quantized model, in the order in which it was."""
    if "routes" in subject.steps:
        yield "after, _ = routed(model, tokens, routes)"
    for step, lines in _PROOFS.items():
        if step in subject.steps:
            yield from lines


_RESTORED = ("restored = built(config)", "fill(restored)")
_SAVED = (
    "saved = io.BytesIO()",
    "torch.save(state, saved)",
    "state = safe_load(io.BytesIO(saved.getvalue()))",
)
_PROOFS: Mapping[str, Sequence[str]] = {
    "backward": (
        "with torch.enable_grad():",
        "    logits = with_graph(model, tokens).flatten(0, 1).float()",
        "    torch.nn.functional.cross_entropy(logits, tokens.roll(-1, 1).flatten()).backward()",
    ),
    "state": (
        "state = mto.modelopt_state(model)",
        *_SAVED,
        *_RESTORED,
        "mto.restore_from_modelopt_state(restored, state)",
        "restored.load_state_dict(model.state_dict(), strict=False)",
    ),
    "sharded state": (
        "state = copy.deepcopy(mto.modelopt_state(model))",
        "remove_per_module_state(state)",
        *_SAVED,
        "shards = shards_of(model.sharded_state_dict())",
        *_RESTORED,
        "mto.restore_from_modelopt_state(restored, state)",
        "wanted = {k: v for k, v in restored.sharded_state_dict().items() if '_extra_state' in k}",
        "extra, missing = loaded_from(shards, wanted)",
        'assert not missing, f"{missing[0]} is not in what was saved"',
        "restored.load_state_dict(extra, strict=False)",
        "for name, module in restored.named_modules():",
        '    if f"{name}._extra_state" in extra and hasattr(module, "modelopt_set_extra_state_callbacks"):',
        '        module.set_extra_state(extra[f"{name}._extra_state"])',
        "tensors, missing = loaded_from(shards, restored.sharded_state_dict())",
        'assert not missing, f"{missing[0]} is not in what was saved"',
        "restored.load_state_dict(tensors, strict=False)",
    ),
    "weights": (
        "with torch.no_grad():",
        "    rounded = {",
        "        path: first_of(module.weight_quantizer)(module.weight.detach())",
        "        for path, module in model.named_modules()",
        '        if hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled',
        "    }",
        "mtq.compress(model)",
    ),
}
