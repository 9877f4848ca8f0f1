"""Shrink: an architecture and a layout -> the smallest architecture that keeps S1 to S12."""

from harness.shrink.plan import NoPlan, ShrinkPlan, shrink

__all__ = ["NoPlan", "ShrinkPlan", "shrink"]
