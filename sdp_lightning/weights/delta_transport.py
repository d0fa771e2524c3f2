"""Sends servers what changed since the last publish, and all of it now and then.

A start brings all weights. The first update after it is an anchor: all trained weights, of which
every worker of a server keeps a copy in host memory. Later updates are deltas
(:mod:`sdp_lightning.weights.delta`), which the workers apply to that copy and load it as they do a
full transfer: fused, sharded and packed weights come out the same. Every ``anchor_every``-th update
is an anchor again. A server that returns gets base, anchor and the deltas since.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdp_lightning.errors import EngineError
from sdp_lightning.weights.delta import apply, encode
from sdp_lightning.weights.files import BUCKET_BYTES, WeightFolder, buckets, readable
from sdp_lightning.weights.protocol import ApplyDelta, LoadFolder, ServedType, Target, Use, Weights

logger = logging.getLogger(__name__)

Step = tuple[Use, Path]
Deliver = Callable[[Sequence[Path], Target, Use], Awaitable[None]]


async def tell_folder(folders: Sequence[Path], target: Target, use: Use) -> None:
    """Let ``target`` read each of ``folders`` itself."""
    for folder in folders:
        if use == "delta":
            await target.tell(ApplyDelta(str(folder)))
        else:
            await target.tell(LoadFolder(str(folder), keep=use == "anchor"))


class DeltaTransport:
    """See the module. Keeps a copy of the trained weights, in the type that is sent.

    Args:
        anchor_every: an anchor follows after so many updates; 1 sends no deltas.
        deliver: brings folders to a server, for a use.
        root: parent folder of staged weights; None is shared memory.
        bucket_bytes: size of one file.
    """

    is_live = False

    def __init__(
        self,
        *,
        anchor_every: int,
        deliver: Deliver = tell_folder,
        root: Path | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._files = WeightFolder(root, bucket_bytes=bucket_bytes)
        self._anchor_every, self._bucket_bytes = anchor_every, bucket_bytes
        self._deliver = deliver
        self._whole: tuple[Step, ...] = ()  # all weights in force
        self._latest: tuple[Step, ...] = ()  # what brings the version before to that in force
        self._staged: Step | None = None
        self._snapshot: dict[str, Tensor] = {}  # trained weights, without what is in _unread
        self._unread: list[Step] = []
        self._number = 0

    def stage(self, weights: Weights, *, full: bool, dtype: ServedType | None = None) -> int:
        self._staged = None
        if full:
            _say_if_useless(dtype)
        else:
            self._read_back()
        num_deltas = sum(use == "delta" for use, _ in self._whole)
        use: Use = "delta" if self._snapshot and num_deltas < self._anchor_every - 1 else "anchor"
        if full or use == "anchor":
            folder, num_bytes = self._files.stage(weights, full=full, dtype=dtype)
            use = "load" if full else "anchor"
        else:
            folder, num_bytes = self._write_delta(weights, dtype)
        if full or num_bytes:
            self._staged = use, folder
        return num_bytes

    def activate(self) -> None:
        step, self._staged = self._staged, None
        self._latest = () if step is None else (step,)
        if step is None:
            return
        before, (use, _) = self._whole, step
        if use == "delta":
            self._whole = (*before, step)
        else:
            self._files.activate()
            self._whole = (step,) if use == "load" else (*_of(before, "load"), step)
            if use == "load":
                self._snapshot = {}
        self._unread = [] if use == "load" else [step]

    async def deliver(self, target: Target, *, whole: bool) -> None:
        for use, folder in self._whole if whole else self._latest:
            await self._deliver(readable([folder]), target, use)

    def close(self) -> None:
        self._files.close()

    def _read_back(self) -> None:
        """Bring the copy to the weights in force, from their files."""
        for use, folder in self._unread:
            try:
                for file in sorted(readable([folder])[0].glob("*.safetensors")):
                    if use == "anchor":
                        self._snapshot |= {n: t.clone() for n, t in load_file(file).items()}
                    else:
                        apply(self._snapshot, load_file(file))
            except (OSError, SafetensorError) as error:
                raise EngineError(f"the weights of {folder} cannot be read: {error}") from error
        self._unread = []
        kept = {folder for _, folder in self._whole}  # no reader is behind by two publishes
        for folder in self._files.path.glob("delta-*"):
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _write_delta(self, weights: Weights, dtype: ServedType | None) -> tuple[Path, int]:
        self._number += 1
        folder, num_bytes = self._files.path / f"delta-{self._number}", 0
        try:
            folder.mkdir(mode=0o700)
            for number, part in enumerate(self._parts(weights, dtype)):
                num_bytes += sum(tensor.nbytes for tensor in part.values())
                save_file(part, folder / f"model-{number:05d}.safetensors")
        except (OSError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise EngineError(f"a delta cannot be written to {folder}: {error}") from error
        except EngineError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder, num_bytes

    def _parts(self, weights: Weights, dtype: ServedType | None) -> Iterator[dict[str, Tensor]]:
        """Parts of a delta that are not empty, each of a bucket of ``weights``."""
        for bucket in buckets(weights, self._bucket_bytes, dtype):
            part: dict[str, Tensor] = {}
            for name, tensor in bucket.items():
                if name not in self._snapshot:
                    raise EngineError(
                        f"{name} is trained now and was not at the last anchor: start the run anew."
                    )
                part |= encode(name, self._snapshot[name], tensor)
            if part:
                yield part


def _say_if_useless(dtype: ServedType | None) -> None:
    if dtype in (None, "float32"):
        kind = "several types, or do not say which" if dtype is None else dtype
        logger.warning(
            "transport='delta': the servers hold weights in %s, so they travel as they are "
            "trained. Of float32 values nearly all change in a step: a delta saves nothing there.",
            kind,
        )


def _of(steps: Sequence[Step], use: Use) -> list[Step]:
    return [step for step in steps if step[0] == use]
