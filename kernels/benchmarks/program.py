"""Options of the programs here, and how they write their results."""

import argparse
import datetime
import json
import os
import platform
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
import triton


def add_output(parser: argparse.ArgumentParser, name: str, help: str = "JSON") -> None:
    """Add `--output`, by default a dated file in the current folder."""
    default = Path(f"{datetime.date.today().isoformat()}-{name}.json")
    parser.add_argument("--output", type=Path, default=default, help=help)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to test the program")


def check_output(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Reject an output that exists or can't be written."""
    check_new(parser, given.output, "--output")


def check_new(parser: argparse.ArgumentParser, path: Path | None, option: str) -> None:
    """Reject an option's file that exists or can't be written."""
    if path is None:
        return
    if os.path.exists(path):
        parser.error(f"{path} exists: results are not overwritten, name another {option}")
    try:
        with TemporaryFile(dir=next(folder for folder in path.absolute().parents if os.path.exists(folder))):
            pass
    except OSError as error:
        parser.error(f"{path} can't be written ({error.strerror}): name another {option}")


def check_device(
    parser: argparse.ArgumentParser, given: argparse.Namespace, on_cpu: str = "with torch's kernels"
) -> None:
    """End the program with an error if the device is missing.

    Args:
        on_cpu: how the program runs with `--device cpu`.
    """
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"no CUDA device; --device cpu tests the program {on_cpu}")


def machine(device: torch.device) -> dict[str, Any]:
    """Return the device, and the versions of what ran on it."""
    found: dict[str, Any] = {
        "device": platform.machine() + " CPU",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "memory": properties.total_memory}
        found |= {"multiprocessors": properties.multi_processor_count}
    return found


def write_results(data: dict[str, Any], path: Path) -> None:
    """Write results in one step: an interruption leaves the earlier ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    temporary.replace(path)
