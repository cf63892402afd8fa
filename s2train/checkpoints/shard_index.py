"""Reads the index of a checkpoint's shards."""

from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader


def saved_entries(checkpoint: Path) -> set[str]:
    """Return the names of the tensors and objects in a checkpoint's shards.

    An object's name is its `unique_key`. Megatron's `load_sharded_metadata` fails under torch 2.15: it passes each
    tensor's properties to `torch.empty`, which doesn't take their new field `strides`.

    Raises:
        Exception: of any type, if the index is damaged.
    """
    return {str(name) for name in FileSystemReader(checkpoint).read_metadata().state_dict_metadata}
