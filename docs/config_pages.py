"""Makes the site's page of every configuration group from the dataclasses and the YAML files.

This is a hook of mkdocs, named in mkdocs.yml. The pages live in memory; nothing is written into the source
tree.
"""

import ast
import re
from collections.abc import Iterable
from enum import EnumMeta
from functools import cache
from inspect import getsource
from pathlib import Path
from textwrap import dedent
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints
from unittest.mock import patch

import yaml
from omegaconf import OmegaConf

from mlx_ring.config import choices, rules, sections
from mlx_ring.config.resume_rules import HOST_KEYS, RESUMABLE
from mlx_ring.config.run_config import SECTIONS

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

CONF = Path(__file__).parent.parent / "conf"
WHOLE = (CONF / "config.yaml").read_text(encoding="utf-8")
SHOWN_WHOLE = {  # folders of conf/ that hold no group of ours
    "experiment": "Whole runs that have a name: `experiment=NAME`. Values on the command line come last.",
    "hydra": "How a multirun runs its jobs, and how Optuna draws their values. See [Sweeps](../sweeps.md).",
}
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", NoneType: "null"}
Entries = dict[str, tuple[str, str]]  # by key of a YAML file: the value as written, and the comment behind it


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the pages to the site; mkdocs calls this."""
    from mkdocs.structure.files import File

    for name, content in pages().items():
        files.append(File.generated(config, f"configuration/{name}.md", content=content))
    return files


def pages() -> dict[str, str]:
    """Return the Markdown of every page, by its name."""
    groups = {group: _page(group) for group in [*SECTIONS, *choices.CHOICES]}
    return groups | {folder: _whole(folder, words) for folder, words in SHOWN_WHOLE.items()}


def _page(group: str) -> str:
    files = {path.stem: path.read_text(encoding="utf-8") for path in sorted((CONF / group).glob("*.yaml"))}
    texts = files or {"config": _own_part(group)}
    schemas = choices.CHOICES.get(group) or dict.fromkeys(texts, SECTIONS[group])
    parts = [f"# {group}", _lead(group, list(schemas))]
    for schema in dict.fromkeys(schemas.values()):
        names = [name for name, each in schemas.items() if each is schema]
        if len(schemas) > 1:
            parts.append("## " + ", ".join(f"`{group}={name}`" for name in names))
        for name in names:
            words = _opening(texts[name]) or _entries(texts[name]).get("name", ("", ""))[1]
            if words:
                parts.append(f"`{name}`: {_plain(words)}")
        parts.append(_table(group, schema, {name: texts[name] for name in names}))
        if schema is choices.TransformerModel:
            parts.append(_sizes())
    if any(part.startswith("|") for part in parts):
        parts.append("↻ marks the values that a resumed run may change.")
    return "\n\n".join(filter(None, parts)) + "\n"


def _own_part(group: str) -> str:
    """Return the part of config.yaml that holds a group without a folder."""
    found = re.search(rf"^{group}:\n((?:  .*\n)+)", WHOLE, re.MULTILINE)
    assert found is not None
    return dedent(found[1])


def _lead(group: str, names: list[str]) -> str:
    if len(names) < 2:
        if group in choices.CHOICES:
            return f"There is one choice, `{group}={names[0]}`."
        return f"Change a value with `{group}.KEY=VALUE`."
    found = re.search(rf"^  - {group}: (\S+)(?: # (.*))?$", WHOLE, re.MULTILINE)
    assert found is not None
    usual = found[2] or f"`{found[1]}`"
    return (
        f"Choose with `{group}=NAME`: {', '.join(f'`{name}`' for name in names)}. The default is {usual}. "
        f"Change a value with `{group}.KEY=VALUE`."
    )


def _table(group: str, schema: type, texts: dict[str, str]) -> str:
    """Return a table with a row for each field, and a column of defaults for each file of this dataclass."""
    entries = [_entries(text) for text in texts.values()]
    hints, rules = get_type_hints(schema), _rules(schema, texts)
    siblings = choices.CHOICES.get(group, {"": schema}).values()
    columns = [f"`{name}`" for name in texts] if len(texts) > 1 else ["default"]
    rows = [["key", "type", *columns, "", "↻"], ["---"] * (len(columns) + 4)]
    if group == "run":  # with the one value outside of all groups
        value, comment = _entries(WHOLE)["seed"]
        rows.append(["`seed`", WORDS[int], f"`{value}`", comment, ""])
    for field in (name for name in hints if name not in ("name", "group")):
        key, beside = f"{group}.{field}", [each[field] for each in entries]
        words = [_words(field, schema, [comment for _, comment in beside], siblings)]
        words += [f"must be {rules[key]}"] if key in rules else []
        words += ["may differ between hosts"] if key in HOST_KEYS else []
        defaults = ["must be given" if value == "???" else f"`{value}`" for value, _ in beside]
        mark = "↻" if key.startswith(RESUMABLE) else ""
        rows.append(
            [f"`{key}`", _type(hints[field]), *defaults, _plain("; ".join(filter(None, words))), mark]
        )
    if len(rows) == 2:
        return ""
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _words(field: str, schema: type, beside: list[str], siblings: Iterable[type]) -> str:
    """Return the first comment on a field: in its class, a YAML file, a base class, or a sibling."""
    own, *bases = [_comments().get(each.__name__, {}) for each in schema.__mro__]
    others = [_comments()[base.__name__] for each in siblings for base in each.__mro__[:-2]]
    said = [own.get(field), *beside, *(each.get(field) for each in [*bases, *others])]
    return next(filter(None, said), "")


@cache
def _comments() -> dict[str, dict[str, str]]:
    """Return the comment behind each field of each class of the configuration."""
    found: dict[str, dict[str, str]] = {}
    for source in map(getsource, (rules, sections, choices)):
        lines = source.splitlines()
        for definition in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
            fields = (node for node in definition.body if isinstance(node, ast.AnnAssign))
            found[definition.name] = {
                ast.unparse(node.target): lines[node.lineno - 1].partition("  # ")[2] for node in fields
            }
    return found


def _rules(schema: type, texts: dict[str, str]) -> dict[str, str]:
    """Return the rules that the dataclass checks, by whole key: build it once and note each check."""
    found: dict[str, str] = {}

    def note(accepted: bool, key: str, value: object, rule: str) -> None:
        found[key] = re.sub(r"=\d+$", "", rule)  # "a divisor of heads=4", where heads is 4

    values = yaml.safe_load(next(iter(texts.values())))
    for key, value in values.items():
        if value == "???" or "${" in str(value):
            values[key] = "given"
    with patch.object(rules, "require", note), patch.object(sections, "require", note):
        OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    return found


def _type(hint: Any) -> str:
    if isinstance(hint, UnionType):
        return " or ".join(_type(each) for each in get_args(hint))
    if isinstance(hint, EnumMeta):
        return ", ".join(f"`{member}`" for member in hint.__members__)
    if get_origin(hint) is list:
        return f"list: {_type(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return "values by name"
    return WORDS[hint]


def _entries(text: str) -> Entries:
    """Return the values of a YAML mapping as they are written, each with the comment behind it."""
    return {key.value: _entry(value) for key, value in yaml.compose(text).value}


def _entry(node: Any) -> tuple[str, str]:
    text, start, end = node.start_mark.buffer, node.start_mark.index, node.end_mark.index
    behind = text[end:].partition("\n")[0]
    return text[start:end].strip(), behind.partition("# ")[2].strip("\0")


def _sizes() -> str:
    """Return the table of the values that a transformer's size sets."""
    columns = list(choices.TRANSFORMER_SIZES)
    rows = [["", *(f"`size={size.name}`" for size in columns)], ["---"] * (len(columns) + 1)]
    for field in choices.TRANSFORMER_SIZES[columns[0]]:
        values = [str(choices.TRANSFORMER_SIZES[size][field]) for size in columns]
        rows.append([f"`model.{field}`", *values])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _plain(words: str) -> str:
    """Escape a comment for Markdown, except what is in backquotes."""
    return re.sub(r"(`[^`]*`)|([*_<|])", lambda found: found[1] or f"\\{found[2]}", words)


def _opening(text: str) -> str:
    """Return the comment at the start of a YAML file."""
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(line for line in lines if not line.startswith("@"))


def _whole(folder: str, words: str) -> str:
    parts = [f"# {folder}", words]
    for path in sorted((CONF / folder).rglob("*.yaml")):
        choice = f"{path.parent.relative_to(CONF)}={path.stem}"
        parts.append(f"## `{choice}`\n\n```yaml\n{path.read_text(encoding='utf-8').strip()}\n```")
    return "\n\n".join(parts) + "\n"
