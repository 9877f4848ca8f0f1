"""Format: one quantizer's attributes, as a ModelOpt config gives them -> what becomes of a number.

The words are ModelOpt's (``QuantizerAttributeConfig``), the defaults too. Nothing that a config holds is
lost: what has no field of its own is in ``other``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NumBits = int | tuple[int, int] | str
Blocks = tuple[tuple[int, int | None], ...]

E8M0, E4M3, E2M1 = (8, 0), (4, 3), (2, 1)

# What ``use_constant_amax`` stands for: the largest number of E4M3.
_E4M3_MAX = 448.0
_SPECIAL = ("type", "scale_bits", "scale_block_sizes", "four_over_six")


@dataclass(frozen=True, slots=True)
class Format:
    """One stage of a quantizer: what a number becomes, and which numbers share a scale.

    ``num_bits`` is an integer, (exponent, mantissa), or a name that a custom backend knows.
    ``block_size`` counts elements of the last dimension (the input dimension of a weight); None means no
    such blocks. ``dynamic`` blocks get their scales from the data, static ones keep a calibrated scale
    each. ``axis`` is the dimension that has a scale per index; None with no blocks means one scale per
    tensor. ``more_blocks`` are those along other dimensions, (dimension, size), and those that span a whole
    dimension, whose size is None. ``scale_bits`` is what a block's own scale is rounded to, E8M0 in the
    MX formats. ``uncalibrated`` quantizers (``type: dynamic``) take amax from the tensor at hand.
    ``constant_amax`` is amax where the config fixes it. ``bias`` (affine) and ``rotate`` are the config's,
    as sorted pairs. ``other`` holds the attributes that change nothing of the above.
    """

    num_bits: NumBits = 8
    block_size: int | None = None
    dynamic: bool = False
    axis: int | tuple[int, ...] | None = None
    more_blocks: Blocks = ()
    scale_bits: tuple[int, int] | int | None = None
    uncalibrated: bool = False
    constant_amax: float | None = None
    bias: tuple[tuple[str, Any], ...] = ()
    rotate: tuple[tuple[str, Any], ...] = ()
    four_over_six: bool = False
    unsigned: bool = False
    narrow_range: bool = False
    fake_quant: bool = True
    backend: str | None = None
    other: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> Format:
        """The format of these attributes of a ``QuantizerAttributeConfig``; ``enable`` is not among it."""
        known = dict(attributes)
        known.pop("enable", None)
        blocks = dict(known.pop("block_sizes", None) or {})
        sizes = {int(key): size for key, size in blocks.items() if key not in _SPECIAL}
        last = sizes.pop(-1) if sizes.get(-1) is not None else None
        amax = known.pop("constant_amax", None)
        if known.pop("use_constant_amax", False):
            amax = _E4M3_MAX
        rotate = known.pop("rotate", False)
        if isinstance(rotate, bool):
            rotate = {"enable": True} if rotate else {}
        axis = known.pop("axis", None)
        other = {"scale_block_sizes": blocks["scale_block_sizes"]} if "scale_block_sizes" in blocks else {}
        return cls(
            num_bits=_pair(known.pop("num_bits", 8)),
            block_size=last,
            dynamic=blocks.get("type") == "dynamic",
            axis=tuple(axis) if isinstance(axis, list) else axis,
            more_blocks=tuple(sorted(sizes.items())),
            scale_bits=_pair(blocks.get("scale_bits")),
            uncalibrated=known.pop("type", "static") == "dynamic",
            constant_amax=amax,
            bias=pairs(known.pop("bias", None) or {}),
            rotate=pairs(rotate) if rotate.get("enable") else (),
            four_over_six=bool(blocks.get("four_over_six", False)),
            unsigned=known.pop("unsigned", False),
            narrow_range=known.pop("narrow_range", False),
            fake_quant=known.pop("fake_quant", True),
            backend=known.pop("backend", None),
            other=pairs(known | other),
        )

    @property
    def blocks(self) -> Blocks:
        """Every dimension with blocks, counted from the last one where ModelOpt does, and their size."""
        last = () if self.block_size is None else ((-1, self.block_size),)
        return (*self.more_blocks, *last)

    @property
    def partial_blocks(self) -> tuple[tuple[int, int], ...]:
        """The blocks of a fixed size: those that a dimension may not be a multiple of."""
        return tuple((axis, size) for axis, size in self.blocks if size is not None)

    @property
    def bits(self) -> int:
        """Bits of one number. Raises ValueError where only a custom backend knows them."""
        if isinstance(self.num_bits, str):
            raise ValueError(f"only the backend {self.backend!r} knows how many bits {self.num_bits!r} has")
        return self.num_bits if isinstance(self.num_bits, int) else 1 + sum(self.num_bits)

    @property
    def is_mx(self) -> bool:
        """One of the MX formats: dynamic blocks under a power of two each, and no scale per tensor."""
        return self.dynamic and self.scale_bits == E8M0

    @property
    def is_nvfp4(self) -> bool:
        """E2M1 in blocks under E4M3 scales, dynamic or static, under one scale per tensor."""
        return self.num_bits == E2M1 and self.scale_bits == E4M3

    @property
    def needs_amax(self) -> bool:
        """Whether calibration must give such a quantizer an amax."""
        return not (self.is_mx or self.uncalibrated or self.constant_amax is not None)

    @property
    def plain(self) -> Format:
        """The same without all but numbers, last blocks and axis."""
        return Format(self.num_bits, self.block_size, self.dynamic, self.axis)

    def __str__(self) -> str:
        """In words: ``e2m1, dynamic blocks of 16 under e4m3``."""
        number = f"int{self.num_bits}" if isinstance(self.num_bits, int) else _spelt(self.num_bits)
        kind = "dynamic" if self.dynamic else "static"
        words = [number]
        if self.partial_blocks:
            sizes = " x ".join(str(size) for _, size in self.partial_blocks)
            under = f" under {_spelt(self.scale_bits)}" if self.scale_bits is not None else ""
            words.append(f"{kind} blocks of {sizes}{under}")
        elif self.blocks:
            words.append(f"a scale over dimension {', '.join(str(axis) for axis, _ in self.blocks)}")
        elif self.axis is not None:
            words.append(f"a scale per index of dimension {self.axis}")
        else:
            words.append("one scale")
        if self.constant_amax is not None:
            words.append(f"amax {self.constant_amax:g}")
        extras = {
            "taken from the tensor at hand": self.uncalibrated,
            "with a bias": self.bias,
            "rotated": self.rotate,
            "four over six": self.four_over_six,
        }
        return ", ".join([*words, *(word for word, holds in extras.items() if holds)])


def pairs(mapping: Mapping[Any, Any]) -> tuple[tuple[str, Any], ...]:
    """A mapping as sorted pairs, hashable all through; keys as text, which keeps integers and words apart."""
    return tuple(sorted((str(key), _frozen(value)) for key, value in mapping.items()))


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return pairs(value)
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _spelt(bits: Any) -> str:
    return f"e{bits[0]}m{bits[1]}" if isinstance(bits, tuple) else str(bits)
