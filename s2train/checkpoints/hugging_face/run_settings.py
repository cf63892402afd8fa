"""Settings that a run needs besides weights.

They are in an export's config.json, and in files that `+model=imported/NAME` composes.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from s2train.checkpoints.hugging_face.tokenizer_files import TOKENIZER
from s2train.command_line.commands import hydra_setting, python_command
from s2train.command_line.composition import CONF
from s2train.config import LayoutConfig, ModelConfig, PretrainConfig, ScheduleConfig
from s2train.errors import ConfigError, as_typed, message_line
from s2train.files import check_writable, replacing

KEY = "s2train"  # in config.json
Section = TypeVar("Section")
IMPORTED = "imported"  # folder in conf/model, conf/layout and conf/schedule


def settings_json(cfg: PretrainConfig, folder: Path, is_bytes: bool) -> dict[str, Any]:
    """Return layout, schedule, tokenizer and end token for config.json.

    Mask files are copied into `folder`.
    """
    layout = asdict(cfg.layout)
    names: dict[str, str] = {}  # one copy of each file: heads with equal masks of two files would be different patterns
    for pattern in _with_file(layout):
        name = names.setdefault(pattern["file"], f"masks-{len(names)}.npz")
        shutil.copyfile(pattern["file"], folder / name)
        pattern["file"] = name
    return {
        "layout": layout,
        "schedule": asdict(cfg.schedule),
        "tokenizer": "bytes" if is_bytes else TOKENIZER,
        "end_token": cfg.data.end_token,
    }


def read_settings(saved: Any, weights: Path, output: Path) -> tuple[LayoutConfig, ScheduleConfig]:
    """Read what `settings_json` wrote; mask files get their paths in `output`.

    `copy_masks` copies them there.

    Raises:
        ConfigError: on `weights`: an entry is damaged, or this version doesn't have the settings.
    """
    given = saved if isinstance(saved, Mapping) else {}
    layout: Any = given.get("layout")
    schedule = given.get("schedule")
    for name, found in (("", saved), (".layout", layout), (".schedule", schedule)):
        if not isinstance(found, Mapping):
            raise damaged(weights, name, found, "not settings by name")
    if (tokenizer := given.get("tokenizer")) not in ("bytes", TOKENIZER):
        raise damaged(weights, ".tokenizer", tokenizer, f"not bytes or {TOKENIZER}")
    if not isinstance(end_token := given.get("end_token"), str | None):
        raise damaged(weights, ".end_token", end_token, "not the name of a token")
    layout = deepcopy(dict(layout))
    for pattern in _with_file(layout):
        name = pattern["file"]
        if not isinstance(name, str) or Path(name).name != name or not (weights / name).is_file():
            raise damaged(weights, ".layout: file", name, "no file of the export")
        pattern["file"] = str(output.absolute() / name)
    return _merged(LayoutConfig, layout, "layout", weights), _merged(ScheduleConfig, schedule, "schedule", weights)


def damaged(weights: Path, entry: str, found: object, problem: str) -> ConfigError:
    """Make the error of an entry below `KEY` that can't be read."""
    shown = f"config.json has {KEY}{entry}={as_typed(found)[:60]}, {problem}"
    return ConfigError("weights", weights, shown, "Export the run again with this version (launch/export.py)")


def _merged(kind: type[Section], given: Any, section: str, weights: Path) -> Section:
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), given))  # type: ignore[return-value]
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        name = getattr(error, "full_key", None)
        found = OmegaConf.select(OmegaConf.create(dict(given)), name) if name else given
        raise damaged(
            weights, f".{section}.{name}" if name else f".{section}", found, message_line(error).rstrip(".")
        ) from error


def copy_masks(layout: LayoutConfig, weights: Path) -> None:
    """Copy mask files from an export to where `layout` expects them."""
    for pattern in _with_file(asdict(layout)):
        shutil.copyfile(weights / Path(pattern["file"]).name, pattern["file"])


def _with_file(layout: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a layout's patterns that read a file; others may be damaged."""
    named, kinds = (_values(layout.get(name)) for name in ("patterns", "kinds"))
    of_kinds = [kind.get("pattern") for kind in kinds if isinstance(kind, dict)]
    for pattern in (layout.get("pattern"), *named, *of_kinds):
        rules = pattern.get("rules") if isinstance(pattern, dict) else None
        for one in (pattern, *(rules if isinstance(rules, list) else ())):
            if isinstance(one, dict) and one.get("file") is not None:
                yield one


def _values(settings: Any) -> list[Any]:
    return list(settings.values()) if isinstance(settings, dict) else []


class ModelFiles:
    """Settings files of an imported model.

    They lie in conf/model/imported, conf/layout/imported and conf/schedule/imported.

    Args:
        cfg: settings to start a run with; the files are named after its model.
        conf: folder of configuration groups; None: the programs'.
        has_layout: whether layout and schedule come from the model; otherwise the command line chooses them.

    Raises:
        ConfigError: a file of that name has other settings, or the folder can't be written.
    """

    def __init__(self, cfg: PretrainConfig, conf: str | None, has_layout: bool) -> None:
        self._conf, self._name, self._tokenizer = conf, cfg.model.name, cfg.data.tokenizer
        self._end_token = cfg.data.end_token
        root = CONF if conf is None else Path(conf)
        check_writable("conf", root)
        defaults: list[Any] = ["_self_"]
        self._files: dict[Path, str] = {}
        if has_layout:
            for group, settings in (("layout", cfg.layout), ("schedule", cfg.schedule)):
                defaults.append({f"override /{group}": f"{IMPORTED}/{self._name}"})
                text = f"# @package {group}\n" + OmegaConf.to_yaml(OmegaConf.create(asdict(settings)))
                self._files[root / group / IMPORTED / f"{self._name}.yaml"] = text
        train, optim = cfg.train, cfg.optim
        data = {"tokenizer": cfg.data.tokenizer}
        if cfg.data.end_token is not None:
            data["end_token"] = cfg.data.end_token
        content = {
            "defaults": defaults,
            "model": _model(cfg.model),
            "data": data,
            "train": {name: getattr(train, name) for name in ("steps", "seq_length", "global_batch_size", "precision")},
            "optim": {name: getattr(optim, name) for name in ("lr", "warmup_steps")},
        }
        saved = "Written by launch/import.py. Steps, length, batch and learning rate are yours to choose."
        head = f"# @package _global_\n# {saved}\n"
        self.path = root / "model" / IMPORTED / f"{self._name}.yaml"
        self._files[self.path] = head + OmegaConf.to_yaml(OmegaConf.create(content))
        for path, text in self._files.items():
            if path.exists() and path.read_text() != text:
                problem = f"{path} has other settings, of an earlier import"
                raise ConfigError("output", self._name, problem, "Name another folder, or remove that file")

    def write(self) -> None:
        """Write the files, the model's last."""
        for path, text in self._files.items():
            with replacing(path) as temporary:
                temporary.write_text(text)

    @property
    def data_command(self) -> str | None:
        """Return a shell command that prepares the bundled corpus for `command`.

        Return None if the model's own tokens work.
        """
        if self._tokenizer == "bytes":
            return None
        words = ["input=bundled", hydra_setting("output", self._data), hydra_setting("tokenizer", self._tokenizer)]
        end = [] if self._end_token is None else [hydra_setting("end_token", self._end_token)]
        return python_command("launch/prepare_data.py", *words, *end)

    def command(self, start: str) -> str:
        """Return a shell command that starts a run from `start`.

        `start` is the import.
        """
        words = [] if self._conf is None else ["--config-dir", self._conf]
        words += [f"+model={IMPORTED}/{self._name}", hydra_setting("checkpoint.resume", start)]
        words += [hydra_setting("run_dir", f"runs/{self._name}-trained")]
        data = [] if self.data_command is None else [hydra_setting("data.path", self._data)]
        return python_command("launch/pretrain.py", *words, *data)

    @property
    def _data(self) -> str:
        return f"runs/data/{self._name}"


def model_name(output: Path) -> str:
    """Return a path's last part without characters that need quoting.

    Hydra or a shell would have to quote them.
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", output.absolute().name).strip("-.") or "model"


def _model(model: ModelConfig) -> dict[str, Any]:
    """Return the model's settings, without unset ones of the RoPE scaling."""
    settings, scaling = asdict(model), model.rope_scaling
    del settings["rope_scaling"]
    return settings if scaling.kind == "none" else settings | {"rope_scaling": {"kind": scaling.kind, **scaling.given}}
