"""Settings from a YAML file and the command line: read, overridden, checked against the dataclasses, written back."""

import difflib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML, YAMLError

from mltd.checkpoint import plain
from mltd.run_config import RunConfig, resolved
from tarp_kernels.files import write_atomically


class ConfigError(ValueError):
    """Settings that cannot be read or do not fit; the message names the file or the setting."""


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings of a YAML file (None: the defaults) with overrides such as "meta.outer_lr=1e-3" on top.

    What is not given has its default or is decided by the method. Raises ConfigError for broken YAML, a name that
    does not exist, a value of the wrong type or outside its range; OSError for a file that cannot be read.
    """
    values = {} if path is None else _read(path)
    for override in overrides:
        _override(values, override)
    values.setdefault("model", {})  # so that what is missed is its name
    where = "" if path is None else f"{path}: "
    try:
        config = TypeAdapter(RunConfig).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise ConfigError(where + _explained(error)) from None
    try:
        return resolved(config, values)
    except ValueError as error:
        raise ConfigError(f"{where}{error}") from None


def write_config(path: Path, config: RunConfig) -> None:
    """Write all settings; `load_config` reads the same ones back."""
    write_atomically(path, as_yaml(config).encode())


def as_yaml(config: RunConfig) -> str:
    text = io.StringIO()
    writer = _yaml()
    writer.default_flow_style = False
    # escaped, on one line: not all characters that end a line, or lines that were folded, come back as they were
    writer.allow_unicode, writer.width = False, 1_000_000
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.dump(plain(asdict(config)), text)
    return text.getvalue()


def _yaml() -> YAML:
    # YAML 1.2: 1e-3 is a number, "no" is a word, and a key that comes twice is an error
    return YAML(typ="safe", pure=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = _yaml().load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        raise ConfigError(f"{path}:{_line(error)} is not YAML: {getattr(error, 'problem', None) or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not text in UTF-8 ({error})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}, expected settings by name, such as `method: tarp`")
    return values


def _line(error: Any) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f"{mark.line + 1}:"


def _override(values: dict[str, Any], override: str) -> None:
    name, sign, text = override.partition("=")
    *groups, last = name.strip().split(".")
    if not sign or not last:
        raise ConfigError(f"--set: got {override!r}, expected name=value, such as meta.outer_lr=1e-3")
    try:
        value = _yaml().load(text)
    except YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"--set {name}: the value {text!r} is not YAML: {problem}") from None
    for group in groups:
        if values.get(group) is None:
            values[group] = {}
        values = values[group]
        if not isinstance(values, dict):
            raise ConfigError(f"--set {name}: {group} is the value {values!r}, which has no settings inside")
    values[last] = value


def _explained(error: ValidationError) -> str:
    """The first mistake in a line."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        return f"{name}: no such setting; {_suggestion(str(first['loc'][-1]), _known(first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"{name}: is missing; set it in the file or with --set {name}=..."
    if first["type"] == "value_error":  # a message of the dataclass itself, which names its own field
        return f"{name}.{first['ctx']['error']}".lstrip(".")
    expected = first["msg"].replace("Input should be", "expected").replace("valid array", "list")
    return f"{name}: got {first['input']!r}, {expected}"


def _suggestion(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    listed = f"expected one of {', '.join(known)}"
    return f"did you mean {near[0]}? {listed}" if near else listed


def _known(path: Sequence[Any]) -> list[str]:
    """The names of the settings in a group."""
    kind: Any = RunConfig
    for part in path:
        hint = get_type_hints(kind)[part]
        kind = next(choice for choice in (hint, *get_args(hint)) if is_dataclass(choice))
    return [setting.name for setting in fields(kind)]
