"""Parity: the same weights in a Hugging Face model and in Megatron's, and whether the logits are equal.

The Hugging Face side is configured by the publisher's facts, the Megatron side by the preset; both are
shrunk by one plan, and that is all they share. ``twin.py`` and ``checkpoint.py`` make the Hugging Face side.
"""
