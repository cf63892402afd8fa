"""Writes docs/settings.md, the page of all settings.

    python -m s2train.settings_page

It reads the dataclasses that are registered with Hydra, and the comments at their fields, which are the only home of
each description. A test compares the page with them.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from s2train import config
from s2train.checkpoints.hugging_face import config as hugging_face
from s2train.command_line.composition import CONF
from s2train.command_line.usage import Setting, sections_of, settings_of, summary
from s2train.evaluation import config as evaluation
from s2train.generation import config as generation
from s2train.needles import config as needles
from s2train.planning import config as planning
from s2train.preparation import config as preparation
from s2train.probes import config as probes
from s2train.semsa import config as semsa

PAGE = CONF.parent / "docs" / "settings.md"
_HEAD = """# Settings

```sh
python launch/pretrain.py +model=tiny_hybrid train.steps=300 optim.lr=3e-4 plan=true
```

This page lists the settings of every program, as `--help` does. Set them on the command line, as above, or in files of
[conf/](../conf). Defaults have the command line's syntax: `null` is None, and … must be set.

The page is generated from the dataclasses and comments of [config.py](../s2train/config.py) and of the `config.py` in
folders of [s2train](../s2train). To change it, change them, and run `python -m s2train.settings_page`. Settings of
kinds of attention, in `layout.kinds`, are described with [block selection](block-selection.md) and
[HyperAttention](hyperattention.md).
"""
_CONFIGS = (config, planning, hugging_face, needles, preparation, generation, probes, semsa, evaluation)
_PROGRAM = re.compile(r"`(launch/\w+\.py)`")
_CODE = re.compile(r"(`[^`]*`)")


def register_all() -> None:
    """Register the settings of every program with Hydra."""
    for module in _CONFIGS:
        module.register()


def programs() -> dict[str, type]:
    """Return each program's settings dataclass by the program's path, training first."""
    register_all()
    schemas = [_schema(entry) for name, entry in _store().items() if name.endswith("_schema.yaml")]
    of_program = {_program(schema): schema for schema in schemas}
    return dict(sorted(of_program.items(), key=lambda item: (item[1] is not config.PretrainConfig, item[0])))


def page() -> str:
    """Format the page."""
    known = programs()
    lines = [_HEAD]
    for path, schema in known.items():
        lines.append(f"## {path}\n")
        parent = next((other for other in known.values() if other is not schema and issubclass(schema, other)), None)
        if parent is None:
            lines += [*_table(list(settings_of(schema, ""))), *_sections(schema, "")]
            continue
        inherited = {setting.name for setting in settings_of(parent, "")}
        own = [setting for setting in settings_of(schema, "") if setting.name not in inherited]
        lines += [f"All settings of `{_program(parent)}`, and:\n", *_table(own)]
    lines.append("## Launchers of sweeps\n")
    for schema in (config.LocalSweepConfig, config.SlurmSweepConfig):
        lines += [f"{_escaped(summary(schema))}\n", *_table(list(settings_of(schema, "hydra.launcher.")))]
    return "\n".join(lines).rstrip() + "\n"


def _store() -> dict[str, Any]:
    return ConfigStore.instance().repo


def _schema(entry: Any) -> type:
    schema = OmegaConf.get_type(entry.node)
    assert schema is not None
    return schema


def _program(schema: type) -> str:
    found = _PROGRAM.search(summary(schema))
    assert found, f"{schema.__name__}: write its program into its docstring: A run of `launch/NAME.py`."
    return found[1]


def _sections(schema: type, prefix: str) -> Iterator[str]:
    for name, section, comment in sections_of(schema):
        yield f"### {prefix}{name}\n"
        yield f"{_escaped(comment)}\n"
        yield from _table(list(settings_of(section, f"{prefix}{name}.")))
        yield from _sections(section, f"{prefix}{name}.")


def _table(settings: Sequence[Setting]) -> list[str]:
    if not settings:
        return []
    return ["| setting | default | type | |", "|---|---|---|---|", *map(_row, settings), ""]


def _row(setting: Setting) -> str:
    kind, comment = setting.kind.replace("typing.", ""), _escaped(setting.comment)
    return f"| `{setting.name}` | {_code(setting.value)} | {kind} | {comment} |"


def _code(text: str) -> str:
    return text if text in ("", "…") else "`{}`".format(text.replace("|", r"\|"))


def _escaped(text: str) -> str:
    """Escape what Markdown would take as markup, outside of code."""
    parts = _CODE.split(text)
    return "".join(
        part.replace("|", r"\|") if part.startswith("`") else re.sub(r"([*<>|])", r"\\\1", part) for part in parts
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
