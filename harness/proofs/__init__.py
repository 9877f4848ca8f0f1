"""Proofs that a quantization really happened, beyond a forward pass: what survives saving, packing and a
gradient step.

Each takes a model that ModelOpt has quantized, inside ``standins.installed`` and ``open_world``, and
returns a ``Proof``. ``state`` and ``backward`` leave the model as it was; ``weights`` packs it, so it goes
last.
"""
