"""The teacher's outputs for a whole data set, computed once and kept on disk."""
import hashlib
import logging
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from dataset import digest
from models.layers import QK, Alignment
from runtime.errors import UserError, first_line
from runtime.files import ARRAY_ERRORS, atomic_write, is_file, load_array, locked, write_json, writing
from runtime.setup import to_device

logger = logging.getLogger("haste")
FLUSH_SECONDS = 60  # a kill loses at most this much work


def at_once(path, flags):
    """An opener for open(): each write is on the disk, with no other bytes, before it returns."""
    return os.open(path, flags | os.O_DSYNC)


class CachedTeacher:
    """The teacher's outputs for a whole data set, float16, memory-mapped: dataset positions (N,) -> Alignment.

    All processes compute them together, once, into `folder`/{key}; the key depends on the teacher's weights and
    precision and on the data's fingerprint and image_stamps(). Each output has its own file, so a run that needs fewer
    outputs computes nothing. A run waits while another run computes the same outputs.
    """

    sees_images = False

    def __init__(self, folder, teacher, dataset, accelerator, batch_size=32):
        self.device, names = accelerator.device, teacher.names()
        parts = (teacher.key(), teacher.precision or accelerator.mixed_precision, dataset.fingerprint(),
                 digest(dataset.image_stamps()))
        [key] = broadcast_object_list([hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]])
        self.folder = Path(folder) / key
        if self._missing(names):
            with writing(self.folder), locked(self.folder.with_suffix(".lock"), accelerator.is_main_process):
                if missing := self._missing(names):  # else another run has just finished
                    self._build(missing, teacher, dataset, accelerator, batch_size)
        try:
            self.arrays = self._open(names)
            if any(len(array) != len(dataset) for array in self.arrays.values()):
                raise ValueError(f"it is not of {len(dataset)} images")
        except ARRAY_ERRORS as error:
            raise UserError(f"The teacher cache {self.folder} is damaged ({first_line(error)}); delete it, and it is "
                            "computed again.") from error

    def _open(self, names):
        return {name: np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}

    def _missing(self, names):
        """The `names` whose outputs are incomplete; the same on all processes."""
        return broadcast_object_list([[name for name in names if not is_file(self.folder / f"{name}.complete")]])[0]

    def _build(self, names, teacher, dataset, accelerator, batch_size):
        """Compute the missing batches, also after a stop. The record has one byte per batch.

        Batch b holds the same images for any number of processes.
        """
        teacher.cast(accelerator.mixed_precision)  # only now: the key depends on the weights
        record, count = self.folder / f"{'-'.join(names)}.done.npy", math.ceil(len(dataset) / batch_size)
        if accelerator.is_main_process and not (is_file(record) and load_array(record).shape == (count,)):
            self.folder.mkdir(parents=True, exist_ok=True)
            others = {path.parent for ending in ("complete", "done.npy")
                      for path in self.folder.parent.glob(f"*/*.{ending}")} - {self.folder}
            if others:  # nobody else would notice gigabytes that no run reads any more
                size = sum(path.stat().st_size for other in others for path in other.glob("*.npy"))
                logger.info(f"{self.folder.parent} also holds {size / 1e9:.1f} GB of other teachers, data or code "
                            f"({', '.join(sorted(path.name for path in others))}); delete what no run uses")
            with accelerator.autocast():
                first = teacher.outputs(teacher(dataset.image(0)[None]))
            size = len(dataset) * sum(2 * first[name].numel() for name in names)
            if size > (free := shutil.disk_usage(self.folder).free):
                raise UserError(f"--teacher-cache needs {size / 1e9:.1f} GB in {self.folder}, which has "
                                f"{free / 1e9:.1f} GB free; name another folder or run without it.")
            for other in self.folder.glob("*.done.npy"):  # of a stopped run with other outputs, whose files go now
                other.unlink()
            for name in names:
                path = self.folder / f"{name}.npy"
                np.lib.format.open_memmap(path, "w+", np.float16, (len(dataset), *first[name].shape[1:]))
                with open(path, "r+b") as file:  # find a full disk now, not after hours
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            with atomic_write(record) as file:
                np.save(file, np.zeros(count, np.uint8))
        accelerator.wait_for_everyone()
        arrays = self._open(names)
        files = {name: open(self.folder / f"{name}.npy", "r+b", 0, opener=at_once) for name in names}  # noqa: SIM115
        done = np.load(record, mmap_mode="r+", allow_pickle=False)
        todo = np.flatnonzero(done == 0)[accelerator.process_index::accelerator.num_processes].tolist()
        accelerator.wait_for_everyone()  # all have read it
        written, flushed = [], time.monotonic()
        hidden = None if accelerator.is_main_process else True  # None: shown on a terminal; a log has a line a minute
        for batch in tqdm(todo, desc="teacher outputs", unit="batch", disable=hidden):
            rows = slice(batch * batch_size, min((batch + 1) * batch_size, len(dataset)))
            with accelerator.autocast():
                images = torch.stack([dataset.image(i) for i in range(rows.start, rows.stop)])
                outputs = teacher.outputs(teacher(images))
            for name, array in arrays.items():
                values = np.ascontiguousarray(outputs[name].half().cpu().numpy())
                if not np.isfinite(values).all():
                    raise UserError(f"The teacher's {name} does not fit float16; run without --teacher-cache.")
                # Neither through a mapping nor later: NFS may then write whole pages, with old rows of other machines.
                files[name].seek(array.offset + rows.start * values[0].nbytes)
                files[name].write(values)
            written.append(batch)
            if batch == todo[-1] or time.monotonic() - flushed > FLUSH_SECONDS:
                done[written] = 1  # only now, so that the record is true after a crash of the machine
                done.flush()
                written, flushed = [], time.monotonic()
                made = min(int(done.sum()) * batch_size, len(dataset))
                logger.info(f"teacher outputs: {made:,} of {len(dataset):,} images")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for name in names:
                write_json(self.folder / f"{name}.complete", {"images": len(dataset)})
            record.unlink()
        accelerator.wait_for_everyone()

    def __call__(self, positions):
        rows = {name: to_device(torch.from_numpy(array[positions.numpy()]), self.device)
                for name, array in self.arrays.items()}
        return Alignment([value for name, value in rows.items() if name.startswith("features")],
                         {int(name.removeprefix("block")): QK(value[:, 0], value[:, 1])
                          for name, value in rows.items() if name.startswith("block")})

