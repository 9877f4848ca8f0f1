"""Schema: values read from a YAML file -> the same values, if ModelOpt would take them for what they are for.

The classes and their fields are those of ModelOpt's config module, whose own checks
(``normalize_quant_cfg_list``, the validators of ``QuantizerCfgEntry`` and ``QuantizerAttributeConfig``) say
what goes together. What a field's value may be is left to ModelOpt where no arithmetic here hangs on it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from harness.recipes.located import Items, Place, Table, plain, wrong
from harness.recipes.modelopt import CONFIG_MODULE, declared

CONFIG, ENTRY, ENTRIES = "QuantizeConfig", "QuantizerCfgEntry", "QuantizerCfgListConfig"
ATTRIBUTES, ATTRIBUTE_LIST, RECIPE = "QuantizerAttributeConfig", "list of QuantizerAttributeConfig", "recipe"

# What the items of a list are, and what stands under a key; nothing else may be a list that takes imports.
ITEM_SCHEMA: Mapping[str, str] = {ENTRIES: ENTRY, ATTRIBUTE_LIST: ATTRIBUTES}
CHILD_SCHEMA: Mapping[tuple[str, str], str] = {
    (RECIPE, "quantize"): CONFIG,
    (CONFIG, "quant_cfg"): ENTRIES,
    (ENTRY, "cfg"): ATTRIBUTE_LIST,
}

_FLOATS = ((4, 3), (5, 2), (2, 1), (1, 2), (0, 3), (3, 0), (3, 2), (2, 3))
_BLOCK_WORDS = ("type", "scale_bits", "scale_block_sizes", "four_over_six")
_EXMY = re.compile(r"[Ee](\d+)[Mm](\d+)")


def with_bits(value: Any) -> Any:
    """The same, with every ``num_bits`` and ``scale_bits`` of the form ``e4m3`` as a pair."""
    if isinstance(value, Items):
        return Items(value.place, [(with_bits(item), at) for item, at in value.located()])
    if not isinstance(value, Table):
        return value
    made = {}
    for key, (item, at) in value.located().items():
        pair = _EXMY.fullmatch(item) if key in ("num_bits", "scale_bits") and isinstance(item, str) else None
        made[key] = ((int(pair[1]), int(pair[2])) if pair else with_bits(item), at)
    return Table(value.place, made)


def schema_named(path: str, place: Place) -> str:
    """The class that a ``modelopt-schema`` comment names. Raises UnknownRecipe where it is no config's."""
    module, _, name = path.rpartition(".")
    if module == CONFIG_MODULE and (name == ENTRIES or name in declared().fields):
        return name
    raise wrong(place, f"{path} is no class that a quantization config is made of")


def check_keys(table: Table, schema: str | None) -> None:
    """Raises UnknownRecipe where a mapping has keys that ``schema`` does not know, whatever their values."""
    if schema == RECIPE:
        _table(table, table.place, "a PTQ recipe", ("metadata", "quantize"))
    elif schema in (CONFIG, ENTRY):
        what = "a quantize config" if schema == CONFIG else "an entry of quant_cfg"
        if schema == CONFIG or "quantizer_name" in table:
            _table(table, table.place, what, declared().fields[schema])


def check(value: Any, schema: str, place: Place) -> None:
    """Raises UnknownRecipe, with the line, where ``value`` is not what ``schema`` asks for."""
    checks: Mapping[str, Callable[[Any, Place], None]] = {
        CONFIG: _config,
        ENTRY: _entry,
        ENTRIES: _entries,
        ATTRIBUTES: _attributes,
    }
    if schema in checks:
        checks[schema](value, place)
    else:
        _table(value, place, schema, declared().fields[schema])


def _config(value: Any, place: Place) -> None:
    table = _table(value, place, "a quantize config", declared().fields[CONFIG])
    if "quant_cfg" not in table:
        raise wrong(table.place, "a quantize config without quant_cfg; ModelOpt would make all of it int8")
    _entries(table["quant_cfg"], table.at("quant_cfg"))
    _algorithm(table.get("algorithm"), table.at("algorithm"))


def _entries(value: Any, place: Place) -> None:
    for entry, at in _items(value, place, "quant_cfg").located():
        _entry(entry, at)


def _entry(value: Any, place: Place) -> None:
    if isinstance(value, Table) and "quantizer_name" not in value and len(value) == 1:
        (name,) = value
        if name not in declared().fields[ENTRY]:
            raise wrong(
                place, f"the old form of an entry: say quantizer_name: {name!r} and its cfg or enable"
            )
    table = _table(value, place, "an entry of quant_cfg", declared().fields[ENTRY])
    name = table.get("quantizer_name")
    if not isinstance(name, str):
        raise wrong(table.at("quantizer_name"), f"quantizer_name is a pattern, not {name!r}")
    if not {"cfg", "enable"} & set(table):
        raise wrong(table.place, f"the entry of {name!r} says neither cfg nor enable")
    enable = table.get("enable", True)
    if not isinstance(enable, bool):
        raise wrong(table.at("enable"), f"enable is true or false, not {enable!r}")
    parent = table.get("parent_class")
    if not (parent is None or isinstance(parent, str)):
        raise wrong(table.at("parent_class"), f"parent_class is the name of a class, not {parent!r}")
    cfg, at = table.get("cfg"), table.at("cfg")
    if isinstance(cfg, list) and any(cfg):
        for stage, where in _items(cfg, at, "cfg").located():
            _attributes(stage, where)
    elif cfg:
        _attributes(cfg, at)
    elif cfg is not None and enable:
        raise wrong(at, f"the cfg of {name!r} is empty: drop it to keep what was set, or say enable: false")


def _attributes(value: Any, place: Place) -> None:
    table = _table(value, place, "a quantizer's cfg", declared().fields[ATTRIBUTES])
    if plain(table) == {"enable": True}:
        raise wrong(table.place, "a quantizer that is on needs more than enable: true")
    _num_bits(table)
    blocks = table.get("block_sizes")
    if blocks is not None:
        _block_sizes(blocks, table.at("block_sizes"))
        if table.get("axis") is not None:
            raise wrong(table.at("axis"), "axis and block_sizes exclude one another")
    if table.get("type", "static") not in ("static", "dynamic"):
        raise wrong(table.at("type"), f"type is static or dynamic, not {table['type']!r}")
    if table.get("use_constant_amax") and table.get("constant_amax") is not None:
        raise wrong(table.at("constant_amax"), "constant_amax and use_constant_amax exclude one another")


def _num_bits(table: Table) -> None:
    bits, place = table.get("num_bits", 8), table.at("num_bits")
    if table.get("backend") is not None:
        return
    if isinstance(bits, tuple):
        blocks = table.get("block_sizes")
        dynamic = isinstance(blocks, dict) and blocks.get("type") == "dynamic"
        if bits not in _FLOATS:
            raise wrong(place, f"e{bits[0]}m{bits[1]} is no format of ModelOpt's")
        if bits not in ((4, 3), (2, 1)) and not dynamic:
            raise wrong(place, f"e{bits[0]}m{bits[1]} is only for dynamic blocks")
    elif not isinstance(bits, int) or isinstance(bits, bool) or bits < 1:
        raise wrong(place, f"num_bits is a number of bits or exponent and mantissa as in e4m3, not {bits!r}")


def _block_sizes(value: Any, place: Place) -> None:
    if not isinstance(value, Table):
        raise wrong(place, f"block_sizes says a size for each dimension, not {value!r}")
    axes = 0
    for key, (size, at) in value.located().items():
        if isinstance(key, str):
            if key not in _BLOCK_WORDS:
                raise wrong(at, _unknown(key, "block_sizes", _BLOCK_WORDS))
        elif not isinstance(key, int) or not (size is None or (type(size) is int and size > 0)):
            raise wrong(at, f"{key!r}: {size!r} is no dimension and size of its blocks")
        else:
            axes += 1
    if value.get("type", "static") not in ("static", "dynamic"):
        raise wrong(value.at("type"), f"type is static or dynamic, not {value['type']!r}")
    if value.get("type") == "dynamic" and axes != 1:
        raise wrong(place, f"dynamic blocks lie along one dimension, not {axes}")


def _algorithm(value: Any, place: Place) -> None:
    methods = declared().methods
    if isinstance(value, Items):
        for item, at in value.located():
            _algorithm(item, at)
    elif isinstance(value, Table):
        method = value.get("method")
        if method is not None and method not in methods:
            raise wrong(value.at("method"), _unknown(method, "calibration algorithms", methods))
        fields = declared().fields[methods[method] if method else "QuantizeAlgorithmConfig"]
        _table(value, place, f"the algorithm {method}", fields)
    elif value is not None and value not in methods:
        raise wrong(place, _unknown(value, "calibration algorithms", methods))


def _table(value: Any, place: Place, what: str, allowed: Collection[str]) -> Table:
    """``value``, if it is a mapping of ``allowed`` keys."""
    if not isinstance(value, Table):
        raise wrong(place, f"{what} is a mapping, not {plain(value)!r}")
    for key in value:
        if key not in allowed:
            raise wrong(value.at(key), _unknown(key, f"keys of {what}", allowed))
    return value


def _items(value: Any, place: Place, what: str) -> Items:
    if not isinstance(value, Items):
        raise wrong(place, f"{what} is a list, not {plain(value)!r}")
    return value


def _unknown(word: Any, of: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(str(word), known, n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
    return f"{word!r} is not among the {of}; {hint}"
