"""Read and write Hugging Face folders of config.json and .safetensors."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from s2train.errors import ConfigError

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"


def require_safetensors(setting: str, value: str) -> None:
    """Raise ConfigError on `setting` if safetensors is not installed."""
    try:
        import safetensors.torch  # noqa: F401
    except ImportError as error:
        problem = "it needs the package safetensors, which is not installed"
        raise ConfigError(setting, value, problem, "pip install s2train[export]") from error


def write_weights(folder: Path, weights: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Write model.safetensors, or several files and an index above `shard_bytes`."""
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, weight in weights.items():
        if shards[-1] and size + weight.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = weight.detach().cpu().contiguous()
        size += weight.nbytes
    total = sum(weight.nbytes for weight in weights.values())
    of_name: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        (folder / name).touch()  # with the umask's mode: safetensors would make files readable by their owner only
        mode = (folder / name).stat().st_mode
        save_file(shard, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(mode)
        of_name |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": of_name}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


class WeightsFolder:
    """Weights of a folder, read one by one.

    Args:
        setting: the setting that names the folder, for errors.
    Raises:
        ConfigError: config.json or .safetensors files are missing or damaged.
    """

    def __init__(self, folder: Path, setting: str) -> None:
        self.path, self._setting = folder, setting
        self.config: dict[str, Any] = self._json("config.json")
        if (folder / INDEX).is_file():
            self._files: dict[str, str] = self._json(INDEX)["weight_map"]
        elif (folder / "model.safetensors").is_file():
            self._files = dict.fromkeys(self._header("model.safetensors"), "model.safetensors")
        else:
            there = [path.name for path in sorted(folder.glob("*.bin"))]
            problem = f"no {INDEX} or model.safetensors in it" + (f", but {there[0]}" if there else "")
            raise self._error(problem, "Save the model with save_pretrained(…, safe_serialization=True)")
        self._headers = {name: self._header(name) for name in set(self._files.values())}
        for name, file in self._files.items():
            if name not in self._headers[file]:
                raise self._error(f"{file} lacks {name}", "Download it again")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all weights."""
        return {name: tuple(self._headers[file][name]["shape"]) for name, file in self._files.items()}

    def read(self, name: str) -> Tensor:
        """Read one weight to the CPU."""
        from safetensors import safe_open

        with safe_open(self.path / self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def _json(self, name: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.path / name).read_text())
        except (OSError, ValueError) as error:
            raise self._error(f"its {name} can't be read ({error})", "Name a folder that has it") from error
        if not isinstance(found, dict):
            raise self._error(f"its {name} is no JSON object", "Download it again")
        return found

    def _header(self, name: str) -> dict[str, Any]:
        """Read a file's header, and check the file's length against it.

        The header has names, shapes and offsets.
        """
        path = self.path / name
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            expected = 8 + length + max((weight["data_offsets"][1] for weight in header.values()), default=0)
            if path.stat().st_size != expected:
                raise ValueError(f"{path.stat().st_size:,} bytes where its header says {expected:,}")
        except (OSError, ValueError, struct.error, KeyError) as error:
            raise self._error(f"{name} can't be read ({error})", "Download it again") from error
        return header

    def _error(self, problem: str, remedy: str) -> ConfigError:
        return ConfigError(self._setting, self.path, problem, remedy)
