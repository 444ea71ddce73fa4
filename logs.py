"""The files that a run leaves in out_dir: one JSON object a line, written as the run goes, cut back when it is resumed.

    metrics.jsonl    an object for each step                    eval.jsonl      for each evaluation, split and setting
    samples.jsonl    for each kept response                     skipped.jsonl   for each response of an update left out
"""
import contextlib
import json
import math
import os
import shutil

from configurator import UserError
from logger import open_logger

NAMES = ("metrics", "eval", "samples", "skipped")


def finite(value):
    """value, or None in the place of a number that is not finite, also within lists and dicts: JSON has no nan."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Logs:
    """The files, and the logger beside them. Only the main process has them: on the others nothing is written or read."""

    def __init__(self, out_dir, logger, config, sizes, first_step, main):
        """sizes: {name: bytes} that the checkpoint to go on from holds; what was written after it is cut off. {}: a new run,
        which also removes the checkpoints that an earlier one left. UserError where a file is shorter than its size."""
        self.out_dir, self.files, self.logger = out_dir, {}, None
        if not main:
            return
        if not sizes:
            shutil.rmtree(f"{out_dir}/checkpoints", ignore_errors=True)
        for name in NAMES:
            path = f"{out_dir}/{name}.jsonl"
            self.files[name] = open(path, "ab")
            if self.files[name].tell() < sizes.get(name, 0):
                raise UserError(f"{path} is shorter than at the checkpoint; restore it, or start anew with --overwrite=True")
            self.files[name].truncate(sizes.get(name, 0))
        self.logger = open_logger(logger, out_dir, config, first_step if sizes else 0)

    def write(self, name, rows):
        """Appends the objects to out_dir/<name>.jsonl; what is not finite becomes null. UserError where they cannot be."""
        if self.files:
            text = "".join(json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
            with self.writing():
                self.files[name].write(text.encode())
                self.files[name].flush()
            if name != "skipped":
                self.logger.write(name, rows)

    def read(self, name):
        """The objects of out_dir/<name>.jsonl so far."""
        if not self.files:
            return []
        with open(f"{self.out_dir}/{name}.jsonl", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def sizes(self):
        """{name: bytes} of the files, once all that was written to them is on the disk."""
        with self.writing():
            for file in self.files.values():
                file.flush()
                os.fsync(file.fileno())
        return {name: file.tell() for name, file in self.files.items()}

    @contextlib.contextmanager
    def writing(self):
        """UserError where the disk takes no more; what it took of a line is cut off when the run goes on."""
        try:
            yield
        except OSError as error:
            raise UserError(f"the logs in {self.out_dir} cannot be written ({error.strerror}); make room and go on from the "
                            "newest checkpoint by --init_from=resume") from None

    def close(self):
        if self.logger is not None:
            self.logger.close()
