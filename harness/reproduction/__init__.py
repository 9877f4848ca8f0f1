"""Reproduction: one case of a report -> the same again, watched, made smaller, or on its own without this
package.

``witness.py`` looks on while the case runs in this process, ``reduction.py`` looks for the flags at fault,
and ``script.py`` writes the failure as a program of megatron-core, ModelOpt and torch alone.
"""
