"""Presets with a setting changed, their plans and facts: what the parity tests compare."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from harness.architecture import Architecture
from harness.facts import Facts, facts_beside
from harness.layout import Layout
from harness.parity.stage import Parity, prove_parity
from harness.preset import find_presets
from harness.shrink import ShrinkPlan, shrink
from harness.standins.output import captured
from tests.published import TREE, changed, of_preset

CPU = torch.device("cpu")


@cache
def full_size(name: str) -> tuple[Architecture, Facts]:
    """The preset of that name at full size, and what its publisher says."""
    file = find_presets([name], TREE)[0]
    facts, findings = facts_beside(file.path)
    assert facts is not None, findings
    return of_preset(file), facts


def plan_and_facts(name: str, **changes: Any) -> tuple[ShrinkPlan, Facts]:
    """The plan of a preset, some of its arguments changed, and the facts of the one that it was."""
    full, facts = full_size(name)
    return shrink(changed(full, **changes), Layout()), facts


def parity(name: str, **changes: Any) -> Parity:
    """The comparison of a preset, some of its arguments changed."""
    plan, facts = plan_and_facts(name, **changes)
    with captured():
        return prove_parity(plan, facts, CPU)


@cache
def parity_of(name: str) -> Parity:
    """The comparison of a preset as it is."""
    return parity(name)
