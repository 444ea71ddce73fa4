"""The report's page: samples of finished runs with marks and thumbnails, and one HTML file.

page.html is the template, with all HTML, CSS and JavaScript; here its two holes are filled, the data and the
Content-Security-Policy. All text of a run is hostile: a model can write anything, and so can whoever sends
you a samples.jsonl. So the data is one block of JSON without a single `<`, the page shows it as text only,
and the policy has the hashes of the one script and the one style: nothing else runs, and nothing is fetched.
"""
import base64
import hashlib
import io
import json
import os
import re

from data import read_image
from report.marks import mark
from report.scheme import number, read_jsonl

SIDE = 320  # pixels: the longer side of a thumbnail at most
IMAGE_BYTES = 20_000_000  # of all thumbnails, as they stand in the page
TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "page.html")
TEXTS = ("id", "split", "setting", "question", "answer", "finish_reason", "error")
NUMBERS = ("step", "length", "score")


def read_sample(row, run, line):
    """A row of samples.jsonl as the page takes it: '' for a missing text, None for a missing number."""
    sample = {key: "" if row.get(key) is None else str(row[key]) for key in TEXTS}
    sample |= {key: number(row.get(key)) for key in NUMBERS} | {"run": run, "line": line}
    sample["correct"] = row["correct"] if type(row.get("correct")) is bool else None  # None: not judged
    rewards = row["rewards"] if type(row.get("rewards")) is dict else {}
    sample["rewards"] = {name: value for name, value in rewards.items() if number(value) is not None}
    images = row["images"] if type(row.get("images")) is list else [row.get("image")]
    sample["images"] = [str(path) for path in images if path]
    sample["parts"], sample["aha"] = mark(str(row.get("response", "")), sample["correct"])
    return sample


def choose(samples, most):
    """The samples of whole problems, at most so many: those with a candidate aha moment first, then by a hash
    of the id, so that no order of the data hides a kind of problem and the same runs give the same page."""
    problems = {}
    for sample in samples:
        problems.setdefault((sample["split"], sample["id"]), []).append(sample)

    def key(problem):
        no_aha = not any(sample["aha"] for sample in problems[problem])
        return no_aha, hashlib.sha256(problem[1].encode("utf-8", "surrogatepass")).digest()

    left, chosen = most, set()
    for problem in sorted(problems, key=key):
        if len(problems[problem]) <= left:
            left -= len(problems[problem])
            chosen.add(problem)
    return [sample for sample in samples if (sample["split"], sample["id"]) in chosen]


def thumbnail(path, folder):
    """The picture as a data URL, or in a few words why there is none. A path that leads out of the folder is
    not followed: whoever wrote samples.jsonl could put any picture of yours on a page that is passed on."""
    if not os.path.isfile(path):  # also keeps us from waiting on a pipe
        return "no such file"
    root = os.path.realpath(folder)
    if os.path.commonpath([root, os.path.realpath(path)]) != root:
        return "outside the folder of images, --images=FOLDER names another"
    try:
        image = read_image(path, 1, 1, SIDE * SIDE)  # upright, RGB, on white
        image.thumbnail((SIDE, SIDE))
        image.save(file := io.BytesIO(), "WEBP", quality=80, lossless=max(image.size) <= 128)
    except Exception:  # a decoder can raise anything on a broken file
        return "cannot be read"
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def read_samples(runs, most, folder):
    """(samples, {path: data URL or why there is none}, notes) of the runs' samples.jsonl. Pictures' paths are
    relative to the working directory, as the runs wrote them."""
    rows = {run.name: read_jsonl(f"{run.folder}/samples.jsonl") for run in runs}
    samples = [read_sample(row, name, i) for name in rows for i, row in enumerate(rows[name], 1)]
    shown = choose(samples, most)
    images, left = {}, IMAGE_BYTES
    for path in dict.fromkeys(path for sample in shown for path in sample["images"]):
        url = thumbnail(path, folder)
        images[path] = url if len(url) <= left else "left out, too many pictures"
        left -= len(images[path])
    notes = []
    if missing := [name for name in rows if not rows[name]]:
        notes.append(f"no samples.jsonl, so no samples on the page, of {', '.join(missing)}")
    if len(shown) < len(samples):
        notes.append(f"samples: {len(shown):,} of {len(samples):,} are in the page, whole problems, those "
                     f"with a candidate aha moment first; at most {most:,}")
    if lost := [reason for reason in images.values() if not reason.startswith("data:")]:
        reasons = "; ".join(sorted(set(lost)))
        notes.append(f"pictures: {len(lost):,} of {len(images):,} are not shown ({reasons})")
    return shown, images, notes


def write_page(path, report):
    """Write the page of report: {title, notes, figures, tables, configs, samples, images}."""
    with open(TEMPLATE, encoding="utf-8") as file:
        template = file.read()
    hashes = {}
    for tag in ("script", "style"):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
        hashes[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    policy = (f"default-src 'none'; img-src data:; style-src 'sha256-{hashes['style']}'; "
              f"script-src 'sha256-{hashes['script']}'; base-uri 'none'; form-action 'none'")
    # pure ASCII, so half a surrogate pair and U+2028 are escapes
    data = json.dumps(report, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    head, tail = template.replace("{{policy}}", policy).split("{{data}}")  # data last: it may hold braces
    with open(path, "w", encoding="utf-8") as file:
        file.write(head + data + tail)
