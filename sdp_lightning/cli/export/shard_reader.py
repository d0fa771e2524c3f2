"""Reads a folder of shards without running what is in it.

torch reads the folder's ``.metadata`` with pickle, which can call any function that the file names.
The reader here allows only the classes that torch writes there, and no instruction that takes more
memory than the file has; shards hold tensors, which torch reads with ``weights_only``.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import pickle
import pickletools
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata as parts
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from sdp_lightning.errors import CheckpointError, error_text

_ALLOWED = {
    parts.__name__: {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex"),
        *("StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    filesystem.__name__: {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if type(value) is torch.dtype)},
    **{name: {"PosixPath", "WindowsPath"} for name in ("pathlib", "pathlib._local")},
}


class ShardReader(FileSystemReader):
    """A folder of ``torch.distributed.checkpoint``, of which nothing but data is read."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the folder holds, and where.

        Raises:
            CheckpointError: if ``.metadata`` is damaged, or holds anything but what torch writes.
        """
        path = pathlib.Path(self.path) / ".metadata"
        with _damage_named(path):
            data = path.read_bytes()
            _check_memory(data)
            found: object = _MetadataUnpickler(io.BytesIO(data)).load()
            if not isinstance(found, Metadata):
                raise pickle.UnpicklingError(f"it holds a {type(found).__name__}")
            found.storage_meta = StorageMeta(load_id=self.load_id)
            return found

    def layout(self) -> dict[str, Tensor]:
        """Every tensor's shape and dtype by name, as a tensor without values.

        Raises:
            CheckpointError: as :meth:`read_metadata`, or if a shape makes no sense.
        """
        with _damage_named(pathlib.Path(self.path) / ".metadata"):
            entries = self.read_metadata().state_dict_metadata
            return {
                str(name): torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
                for name, entry in entries.items()
                if isinstance(entry, TensorStorageMetadata)
            }


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if global_name not in _ALLOWED.get(module_name, ()):
            raise pickle.UnpicklingError(
                f"it names {module_name}.{global_name}, which is never part of it and is not called"
            )
        return super().find_class(module_name, global_name)


def _check_memory(data: bytes) -> None:
    """Refuse what makes pickle take memory beyond the size of the file."""
    for code, argument, _ in pickletools.genops(data):
        is_put = code.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if code.name == "BYTEARRAY8" or (is_put and int(argument or 0) > len(data)):
            raise pickle.UnpicklingError(f"its instruction {code.name} takes too much memory")


@contextlib.contextmanager
def _damage_named(path: pathlib.Path) -> Generator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # pickle raises a dozen kinds for damaged files
        raise CheckpointError(
            f"cannot read {str(path)!r} of a folder of shards: {error_text(error)}. It is damaged, "
            "or was not written by torch."
        ) from error
