"""Recipe: a quantize config -> what each quantizer of a model becomes, asked by path.

ModelOpt applies the entries of ``quant_cfg`` in their order to every quantizer whose path matches
(``set_quantizer_by_cfg``): an entry with ``cfg`` replaces all that was set, one without only turns the
quantizer on or off. What no entry matches keeps the default of the class, int8 and on.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from harness.recipes.format import Format, pairs
from harness.recipes.located import Items, Table, plain
from harness.recipes.modelopt import LIBRARY
from harness.roles import role_of

# Calibration that moves a scale per input channel from the activations into the weights. ``awq_clip`` by
# itself only clips; ``svdquant`` begins with ``awq_lite``.
_FOLDING = ("awq_lite", "awq_full", "smoothquant", "svdquant")

# A pattern that may tell one layer from another: it names the layers, or a number, or any character.
_BY_LAYER = re.compile(r"layers|\?|\[[^\]]*[!\d-][^\]]*\]|(?<![A-Za-z_\d])\d")


@dataclass(frozen=True, slots=True)
class Algorithm:
    """How amax and scales are found: the method, None for no calibration at all, and its options."""

    method: str | None
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def folds_scales(self) -> bool:
        """Whether it leaves a scale per input channel (``pre_quant_scale``)."""
        return self.method in _FOLDING

    def option(self, name: str, default: Any) -> Any:
        """The value of an option, ModelOpt's own ``default`` where the config has none."""
        return dict(self.options).get(name, default)

    def skips(self, module: str) -> bool:
        """Whether its options (SVDQuant's ``skip_layers``) leave the module at this path alone."""
        return any(fnmatchcase(module, pattern) for pattern in self.option("skip_layers", None) or ())


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of ``quant_cfg``: which quantizers, by pattern and class of their module, become what.

    ``formats`` is None where the entry only turns them on or off; with several, ``sequential``, a number is
    quantized several times in a row. ``place`` is the line of the file that says so, where one does.
    """

    pattern: str
    parent_class: str | None
    enable: bool
    formats: tuple[Format, ...] | None
    sequential: bool = False
    place: str = field(default="", compare=False)

    @property
    def shipped(self) -> bool:
        """Whether it stands in a file that ModelOpt brings along."""
        return self.place.startswith(f"{LIBRARY}/")

    def fits(self, quantizer: str, parent_class: str | None = None) -> bool:
        """Whether it applies to the quantizer of that path, of a module that ModelOpt knows by that class."""
        return self.parent_class in (None, parent_class) and fnmatchcase(quantizer, self.pattern)


@dataclass(frozen=True, slots=True)
class Quantizer:
    """What a recipe leaves a quantizer as: its stages in a row, and whether each is on."""

    stages: tuple[tuple[Format, bool], ...]
    sequential: bool = False

    @property
    def formats(self) -> tuple[Format, ...]:
        """The formats of the stages that are on."""
        return tuple(format for format, enabled in self.stages if enabled)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A ModelOpt quantization config by name.

    ``config_name`` is the name of ModelOpt's constant, None for a YAML file or a combination; ``source``
    says where it stands. ``text`` is the config itself, as Python writes it. ``by_layer`` says that a
    pattern may tell one layer from another, so that one of a kind does not stand for all; ``has_blocks``
    that some entry puts numbers in blocks of a fixed size.
    """

    name: str
    config_name: str | None
    source: str
    text: str
    algorithms: tuple[Algorithm, ...] = field(hash=False, compare=False)
    entries: tuple[Entry, ...] = field(hash=False, compare=False)
    by_layer: bool = field(hash=False, compare=False)
    has_blocks: bool = field(hash=False, compare=False)

    @classmethod
    def of(
        cls, config: Mapping[str, Any], name: str, source: str = "given", config_name: str | None = None
    ) -> Recipe:
        """The recipe of a config in ModelOpt's own form, a list of entries."""
        entries = tuple(_entry(entry, str(place)) for entry, place in _placed(config["quant_cfg"]))
        return cls(
            name=name,
            config_name=config_name,
            source=source,
            text=repr(_tidied(plain(config))),
            algorithms=_algorithms(config),
            entries=entries,
            by_layer=any(_BY_LAYER.search(entry.pattern) for entry in entries),
            has_blocks=any(stage.partial_blocks for entry in entries for stage in entry.formats or ()),
        )

    def to_config(self) -> dict[str, Any]:
        """The config as ModelOpt holds it, a new copy at each call."""
        config: dict[str, Any] = ast.literal_eval(self.text)
        return config

    @property
    def algorithm(self) -> str | None:
        """The method of calibration, None where there is none; several as ``a, b``."""
        if len(self.algorithms) == 1:
            return self.algorithms[0].method
        return ", ".join(str(each.method) for each in self.algorithms)

    @property
    def folds_scales(self) -> bool:
        """Whether calibration leaves a scale per input channel (``pre_quant_scale``) beside the weights."""
        return any(algorithm.folds_scales for algorithm in self.algorithms)

    def quantizer(self, path: str, which: str = "weight", parent_class: str | None = None) -> Quantizer:
        """What becomes of one quantizer of the module at ``path``.

        ``which`` is ``weight``, ``input``, ``output``, ``k_bmm`` and so on, or the quantizer's whole name.
        ``parent_class`` is the name that ModelOpt knows the module's class by; without one, entries for
        a class do not apply.
        """
        return _applied(self, path, which, parent_class)

    def formats(
        self, path: str, which: str = "weight", parent_class: str | None = None
    ) -> tuple[Format, ...]:
        """The formats that such a quantizer puts a number through in a row; none where it is off."""
        return _applied(self, path, which, parent_class).formats

    def formats_of(self, path: str, which: str = "weight") -> tuple[Format, ...]:
        """As ``formats``, of a module of Megatron's: none where ModelOpt has no quantized form of it."""
        role = role_of(path)
        if role is None or not role.convertible:
            return ()
        return _applied(self, path, which, role.parent_class).formats

    # ---- what a recipe does to a matrix that no pattern names ----

    @property
    def weights(self) -> tuple[Format, ...]:
        """The plain formats of the weights of a linear that no pattern names."""
        return tuple(format.plain for format in self.formats("", "weight"))

    @property
    def inputs(self) -> Format | None:
        """The plain format of such a linear's inputs, None where they stay as they are."""
        return next((format.plain for format in self.formats("", "input")), None)


def combined(first: Recipe, second: Recipe) -> Recipe:
    """``first`` with the entries of ``second`` after its own, as ModelOpt's examples add a KV-cache config.

    The algorithm is the first one's, or ``max`` (``update_quant_cfg_with_kv_cache_quant``).
    """
    name = f"{first.name}+{second.name}"
    config = first.to_config()
    config["quant_cfg"] = config["quant_cfg"] + second.to_config()["quant_cfg"]
    config["algorithm"] = config.get("algorithm") or "max"
    made = Recipe.of(config, name, f"{first.source} + {second.source}")
    return replace(made, entries=(*first.entries, *second.entries))


def _algorithms(config: Mapping[str, Any]) -> tuple[Algorithm, ...]:
    # Of a plain dict without one, as the KV-cache configs are, ``mtq.quantize`` does not calibrate.
    value = plain(config.get("algorithm"))
    return tuple(map(_algorithm, value)) if isinstance(value, list) else (_algorithm(value),)


def _algorithm(value: Any) -> Algorithm:
    if not isinstance(value, Mapping):
        return Algorithm(value)
    return Algorithm(value.get("method"), pairs({key: value[key] for key in value if key != "method"}))


def _placed(entries: Any) -> list[tuple[Any, Any]]:
    if isinstance(entries, Items):
        return [(item, item.place if isinstance(item, Table) else at) for item, at in entries.located()]
    return [(entry, "") for entry in entries]


def _entry(entry: Mapping[str, Any], place: str) -> Entry:
    cfg = entry.get("cfg") or None
    if isinstance(cfg, list) and not any(cfg):
        cfg = None
    stages = cfg if isinstance(cfg, list) else [cfg]
    return Entry(
        pattern=entry["quantizer_name"],
        parent_class=entry.get("parent_class"),
        enable=entry.get("enable", True),
        formats=None if cfg is None else tuple(map(Format.of, map(plain, stages))),
        sequential=isinstance(cfg, list),
        place=place,
    )


def _tidied(config: dict[str, Any]) -> dict[str, Any]:
    """With the empty ``cfg`` of an entry that is off as None, which ModelOpt makes of it."""
    for entry in config["quant_cfg"]:
        if "cfg" in entry and not entry["cfg"]:
            entry["cfg"] = None
    return config


@cache
def _applied(recipe: Recipe, path: str, which: str, parent_class: str | None) -> Quantizer:
    attribute = which if which.endswith("_quantizer") else f"{which}_quantizer"
    name = f"{path}.{attribute}" if path else attribute
    # A linear's output quantizer is off until an entry turns it on; all else is on, and int8.
    per_row = attribute == "weight_quantizer" and parent_class != "nn.Embedding"
    stages: list[tuple[Format, bool]] = [
        (Format(axis=0 if per_row else None), attribute != "output_quantizer")
    ]
    sequential = False
    for entry in recipe.entries:
        if entry.fits(name, parent_class):
            if entry.formats is not None:
                stages = [(format, entry.enable) for format in entry.formats]
                sequential = entry.sequential
            else:
                stages = [(_turned(format, entry.enable), entry.enable) for format, _ in stages]
        elif sequential:
            for index, (format, _) in enumerate(stages):
                if entry.fits(f"{name}.{index}", parent_class):
                    # A member becomes one format more only through several entries of lists, which no
                    # config has; the first format stands for them.
                    made = entry.formats[0] if entry.formats else _turned(format, entry.enable)
                    stages[index] = (made, entry.enable)
    if parent_class == "nn.Embedding" and attribute == "input_quantizer":
        # Its input are indices: ModelOpt keeps this one off whatever an entry says.
        stages = [(format, False) for format, _ in stages]
    return Quantizer(tuple(stages), sequential)


def _turned(format: Format, enable: bool) -> Format:
    """Turning a quantizer off by itself also ends its rotation; turning it on does not bring it back."""
    return format if enable or not format.rotate else replace(format, rotate=())
