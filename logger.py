"""TensorBoard or Weights & Biases beside a run's own files, and two helpers for the printed line.

    python train_rl.py config/toy.py --logger=tensorboard                     # tensorboard --logdir=out/toy/tensorboard
    WANDB_MODE=offline python train_rl.py config/toy.py --logger=wandb        # wandb sync out/toy/wandb/offline-run-*

A logger gets what was just written to metrics.jsonl, eval.jsonl and samples.jsonl. These are the record: a logger that fails
in the middle of a run is reported once and costs the run nothing. Metrics keep their keys; an evaluation is
eval/<split>/<setting> (accuracy) and eval_length/<split>/<setting> (tokens), where all but letters, digits and _ of the
setting is _, as in pass_1_T_0_6_top_p_1: W&B cannot sort by or plot some of the other characters.
"""
import importlib
import json
import os
import re
import sys

import numpy

from configurator import UserError
from data import read_image

MOST_SAMPLES = 8  # of a step and split that are shown, spread over its settings; samples.jsonl has more
MOST_PIXELS = 448  # a side; larger images are shrunk for showing
SHOWN = ("id", "question", "answer", "response")  # and right or wrong, rewards, and the picture


def check_logger(kind):
    """UserError for a logger that this run cannot have. For the start, before anything slow; only the main process logs."""
    if kind not in ("none", "tensorboard", "wandb"):
        raise UserError(f"config: logger must be 'none', 'tensorboard' or 'wandb', got {kind!r}")
    if kind == "none" or os.environ.get("RANK", "0") != "0":
        return
    try:
        module = importlib.import_module("wandb" if kind == "wandb" else "torch.utils.tensorboard")
    except ImportError as e:
        raise UserError(f"logger={kind!r} needs a package ({e}): pip install {kind}, or pass --logger=none") from e
    try:  # without a key wandb.init would stop and ask for one
        if kind == "wandb" and module.setup().settings.mode not in ("offline", "disabled") and not module.login(prompt=False):
            raise module.Error("no API key")
    except module.Error as e:
        raise UserError(f"logger='wandb': {e}; set WANDB_MODE=offline to write to out_dir alone, or run `wandb login`") from e


def open_logger(kind, out_dir, config, first_step=0):
    """A Logger. TensorBoard no longer shows what an earlier run left in out_dir from first_step on."""
    if kind != "none":
        os.makedirs(out_dir, exist_ok=True)  # wandb would write somewhere else without a word
    return {"none": Logger, "tensorboard": TensorBoard, "wandb": Wandb}[kind](out_dir, config, first_step)


def time_left(seconds, done, steps):
    """'45s', '12m' or '3h05m': the time of the steps to come, if they take as long as those done in so many seconds."""
    left = round(seconds / done * (steps - done))
    minutes = round(left / 60)
    return f"{left}s" if left < 60 else f"{minutes}m" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"


def shown(value, spec):
    """value in the format spec; '-' for None, which is null in metrics.jsonl."""
    return "-" if value is None else format(value, spec)


def picture(path):
    """The image upright in RGB, at most MOST_PIXELS a side; None where it cannot be read."""
    try:
        image = read_image(path, 1, 1, MOST_PIXELS**2)
    except Exception:  # a decoder can raise anything on a broken file
        return None
    image.thumbnail((MOST_PIXELS, MOST_PIXELS))
    return image


def verbatim(text):
    """Markdown that shows any text as it is: a space before each line keeps it from ending the fence."""
    text = re.sub(r"[\x00-\x08\x0e-\x1f]", "", text)  # TensorBoard's markdown keeps some control characters for itself
    return "~~~\n" + "".join(f" {line}\n" for line in text.splitlines()) + "~~~"


class Logger:
    """Shows nothing. A subclass has scalars(step, {key: number}), show(objects of samples.jsonl) and end()."""
    scalars = show = end = lambda *_: None
    failed = False

    def __init__(self, *_): pass

    def write(self, name, rows):
        """rows: what was just appended to out_dir/<name>.jsonl; name: metrics, eval or samples."""
        if name == "samples" and rows:
            n = min(MOST_SAMPLES, len(rows))
            return self.guard(self.show, [rows[i * len(rows) // n] for i in range(n)])
        for row in rows:
            values = {key: value for key, value in row.items() if key != "step" and value is not None}
            if name == "eval":
                key = f"{row['split']}/{re.sub('[^A-Za-z0-9_]+', '_', row['setting'])}"
                values = {f"eval/{key}": row["accuracy"], f"eval_length/{key}": row["response_length"]}
            self.guard(self.scalars, row["step"], values)

    def close(self):
        self.guard(self.end)

    def guard(self, act, *args):
        try:
            act(*args)
        except Exception as e:  # a full disk, a lost connection, whatever a package raises: the run is worth more
            if not self.failed:
                print(f"{type(self).__name__}: {type(e).__name__}: {' '.join(str(e).split())[:200]}; the run goes on, its "
                      "record is in out_dir's jsonl files", file=sys.stderr, flush=True)
            self.failed = True


class TensorBoard(Logger):
    """Event files in out_dir/tensorboard. Scalars are float32 there: TensorBoard's fast loader shows none of float64."""

    def __init__(self, out_dir, config, first_step):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(f"{out_dir}/tensorboard", purge_step=first_step)
        self.writer.add_text("config", verbatim("\n".join(f"{k} = {v!r}" for k, v in config.items())), first_step)
        self.end = self.writer.close

    def scalars(self, step, values):
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()  # a run that is killed leaves what it logged

    def show(self, rows):
        for i, row in enumerate(rows, 1):
            tag, about = f"samples/{row['split']}/{i}", f"{row.get('setting', '')} rewards {json.dumps(row['rewards'])}"
            parts = [about.strip(), *(f"{name}: {row[name]}" for name in SHOWN)]
            verdict = "**right**" if row["correct"] else "**wrong**"
            self.writer.add_text(tag, "\n\n".join([verdict, *map(verbatim, parts)]), row["step"])
            if image := picture(row["image"]):
                self.writer.add_image(tag, numpy.asarray(image), row["step"], dataformats="HWC")
        self.writer.flush()


class Wandb(Logger):
    """A run of project nanomaye in out_dir/wandb and, unless offline, on the server."""

    def __init__(self, out_dir, config, _):
        import wandb
        self.wandb, folder = wandb, os.path.abspath(out_dir)
        os.environ.setdefault("WANDB_DATA_DIR", f"{folder}/wandb")  # else the images wait in the home folder for a sync
        self.run = wandb.init(project="nanomaye", name=os.path.basename(folder), dir=folder, config=config)
        self.end = self.run.finish

    def scalars(self, step, values):
        self.run.log(values, step=step)  # calls of one step are one row: an evaluation joins the metrics of its step

    def show(self, rows):
        table = self.wandb.Table(columns=[*SHOWN, "correct", "setting", "rewards", "picture"])
        for row in rows:
            image = picture(row["image"])
            table.add_data(*(row[name] for name in SHOWN), row["correct"], row.get("setting", ""),
                           json.dumps(row["rewards"]), image and self.wandb.Image(image))
        self.run.log({f"samples/{rows[0]['split']}": table}, step=rows[0]["step"])
