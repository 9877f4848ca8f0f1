"""Arguments: flags -> the values that Megatron arrives at, what it refuses of them, and what they make."""

from harness.arguments.values import Arguments, How, Origin, flag_for, resolve

__all__ = ["Arguments", "How", "Origin", "flag_for", "resolve"]
