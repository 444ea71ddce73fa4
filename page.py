"""The report's page: samples of finished runs become compact data with thumbnails and marks, and one HTML file.

    samples, notes = read_samples([("toy-0", "rl", "out/toy-0"), ("toy_sft-0", "sft", "out/toy_sft-0")], max_samples=5000)
    write_page("report/index.html", {"title": "toy", "notes": notes, "figures": [], "tables": [], "configs": [],
                                     "samples": samples})

page.html is the template: all of the page's HTML, CSS and JavaScript. Here its two holes are filled, the data and the
Content-Security-Policy. All text of a run is hostile: a model can write anything, and so can whoever sends you a
samples.jsonl. So data is one block of JSON without a single `<`, the page shows it as text only, and the policy holds
the hashes of the template's one script and one style: nothing else runs, and nothing is fetched.

The page stays under 30 MB: each picture has a share of IMAGE_BYTES, and whole problems are left out, never half of one,
when samples are more than max_samples or TEXT_BYTES.
"""
import base64
import bisect
import hashlib
import io
import json
import math
import os
import re

from data import open_image, read_image
from reflection import aha_moment, find_words
from reward import last_box

IMAGE_BYTES = 15_000_000    # of all thumbnails, as they stand in the page (base64)
TEXT_BYTES = 10_000_000     # of all samples' text and numbers
REST_BYTES = 3_000_000      # of figures, tables and configs
ONE_IMAGE_BYTES = 32_768    # base64 of 24 KB
SIDES = (320, 256, 192, 144, 96, 64, 40)    # pixels: the longer side of a thumbnail, the first that fits; never enlarged
TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "page.html")
TEXTS = ("run", "id", "split", "setting", "image", "question", "answer", "response", "finish_reason", "error")
NUMBERS = ("line", "step", "length", "score")     # line: of samples.jsonl
# a sample as the page gets it: TEXTS and reward names as indices into one table of strings, since most of them repeat
FIELDS = (*TEXTS, *NUMBERS, "correct", "rewards", "marks", "aha")
OUTSIDE, TOO_MANY = "outside the folder of images", "left out, too many pictures"
WORD, BOX, AHA = range(3)   # what a mark [start, end, kind] marks


# reading

def read_row(line):
    """{field: value} of a line of samples.jsonl: '' for a text and None for a number that is missing or of a wrong type.
    ValueError (or RecursionError, from the parser) for a line that is no object with a text response."""
    row = json.loads(line)
    if type(row) is not dict or type(row.get("response")) is not str:
        raise ValueError("no object with a response")

    def number(value):  # whole or not; what JavaScript cannot hold exactly is no step and no score
        return value if type(value) in (int, float) and abs(value) < 2**53 else None

    def text(value):    # ids and answers may be numbers
        return value if type(value) is str else str(value) if number(value) is not None else ""

    sample = {key: text(row.get(key)) for key in TEXTS} | {key: number(row.get(key)) for key in NUMBERS}
    rewards = row["rewards"] if type(row.get("rewards")) is dict else {}
    sample["rewards"] = [(name, value) for name, value in rewards.items() if number(value) is not None]
    sample["correct"] = row["correct"] if type(row.get("correct")) is bool else None    # None: not judged
    return sample


def find_marks(response, correct):
    """(marks, aha) of a response. marks: [start, end, kind], by start, of the reflection words that reflection.py counts,
    the box that reward.py judges, and the word of the candidate aha moment; in UTF-16 units, as JavaScript counts. aha:
    [strength, value before, word, final value] of a right response that has a candidate, else None."""
    marks, aha, found = [(start, end, WORD) for start, end in find_words(response)], None, last_box(response)
    if found:
        box, end = found
        marks.append((response.rindex("\\boxed", 0, end - len(box)), end, BOX))
        moment = aha_moment(response, box) if correct else None
        if moment:
            strength, before, word, start = moment
            aha = [strength, before, word, box]
            marks.append((start, start + len(word), AHA))
    astral = [i for i, char in enumerate(response) if char > "\uffff"]      # each takes two units
    return [[start + bisect.bisect_left(astral, start), end + bisect.bisect_left(astral, end), kind]
            for start, end, kind in sorted(marks)], aha


def read_runs(runs):
    """({(split, id): its samples}, notes) of all runs' samples.jsonl, in order. A row without id is a problem of its own."""
    problems, notes, missing = {}, [], []
    for name, _, out_dir in runs:
        path, lines, bad = os.path.join(out_dir, "samples.jsonl"), 0, 0
        try:
            with open(path, "rb") as file:      # bytes: text that is not utf-8 is then one line's error
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    lines += 1
                    try:
                        sample = read_row(line)
                    except (ValueError, RecursionError):
                        bad += 1
                        continue
                    sample |= {"run": name, "line": number, "id": sample["id"] or f"{name} line {number}"}
                    sample["marks"], sample["aha"] = find_marks(sample["response"], sample["correct"])
                    problems.setdefault((sample["split"], sample["id"]), []).append(sample)
        except FileNotFoundError:
            missing.append(name)
        except OSError as error:
            notes.append(f"{name}: samples.jsonl cannot be read ({error.strerror}), so the page has no samples of it")
        if bad:
            notes.append(f"{name}: {bad:,} of {lines:,} lines of samples.jsonl are no objects with a text response; left out")
    if missing:
        notes.append(f"no samples.jsonl, so no samples on the page, of {', '.join(missing)}")
    return problems, notes


# thumbnails

def thumbnail(path, limit, folder="."):
    """the picture as a data URL of at most limit characters, or in a few words why not ('' for no path). Small pictures
    keep their pixels where these fit. A path that leads out of the folder is not followed: whoever wrote samples.jsonl could
    put any picture of this machine on a page that is passed on."""
    if not path or not os.path.isfile(path):    # also keeps us from waiting on a pipe
        return "no such file" if path else ""
    if os.path.commonpath([os.path.realpath(folder), os.path.realpath(path)]) != os.path.realpath(folder):
        return OUTSIDE
    try:
        image, (width, height) = open_image(path)
        image.close()
        scale = min(1, SIDES[0] / max(width, height))
        image = read_image(path, 1, 1, max(1, int(width * height * scale * scale)))     # upright, RGB, on white
        ways = [(SIDES[0], dict(lossless=True))] * (scale == 1) + [(side, dict(quality=80)) for side in SIDES]
        for side, options in ways:
            image.thumbnail((side, side))       # does nothing to smaller ones
            image.save(file := io.BytesIO(), "WEBP", **options)
            url = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
            if len(url) <= limit:
                return url
    except Exception:   # a decoder can raise anything on a broken file
        return "cannot be read"
    return TOO_MANY


# packing

def encode(value):
    """value as JSON that can stand in HTML: pure ASCII, so half a surrogate pair and U+2028 are escapes, and no `<`."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False, default=float).replace("<", "\\u003c")


def choose(problems, max_samples):
    """(rows, strings) of the problems that fit: the samples as lists in the order of FIELDS, and the table of strings
    that they point into. Problems with a candidate aha moment come first, then by a hash of the id: no order of the data
    can hide a kind of problem, and the same runs give the same page."""
    def key(problem):
        no_aha = not any(sample["aha"] for sample in problems[problem])
        return no_aha, hashlib.sha256(problem[1].encode("utf-8", "surrogatepass")).digest()

    rows, strings, index, size = [], [], {}, 0

    def at(text):
        if text not in index:
            index[text] = len(strings)
            strings.append(text)
        return index[text]

    for problem in sorted(problems, key=key):
        if len(rows) + len(problems[problem]) > max_samples:
            continue
        before, packed = len(strings), []
        for sample in problems[problem]:
            packed.append([at(sample[key]) for key in TEXTS] + [sample[key] for key in NUMBERS] +
                          [sample["correct"], [[at(name), value] for name, value in sample["rewards"]],
                           sample["marks"], sample["aha"]])
        more = len(encode(strings[before:])) + len(encode(packed))
        if size + more > TEXT_BYTES:        # a smaller one may still fit
            for text in strings[before:]:
                del index[text]
            del strings[before:]
            continue
        size += more
        rows += packed
    return rows, strings


def read_samples(runs, max_samples, folder="."):
    """(samples for the page, notes) of runs [(name, 'rl' or 'sft', out_dir)]. Pictures' paths are relative to the working
    directory, as the runs wrote them; those that lead out of the folder are left out."""
    problems, notes = read_runs(runs)
    rows, strings = choose(problems, max_samples)
    order = {name: number for number, (name, _, _) in enumerate(runs)}
    run, id, split, line, image = (FIELDS.index(name) for name in ("run", "id", "split", "line", "image"))
    rows.sort(key=lambda row: (order[strings[row[run]]], row[line]))     # as the runs wrote them
    total, shown = sum(map(len, problems.values())), len({(row[split], row[id]) for row in rows})
    if len(rows) < total:
        notes.append(f"samples: {len(rows):,} of {total:,} are in the page, all those of {shown:,} of {len(problems):,} "
                     f"problems, those with a candidate aha moment first; at most {max_samples:,} samples and "
                     f"{TEXT_BYTES / 1e6:g} MB of text")
    paths = list(dict.fromkeys(row[image] for row in rows if strings[row[image]]))
    limit = min(ONE_IMAGE_BYTES, IMAGE_BYTES // max(1, len(paths)))
    images = {str(path): thumbnail(strings[path], limit, folder) for path in paths}
    lost = [url for url in images.values() if not url.startswith("data:")]
    for what, n in (("are outside the folder of images, --images=FOLDER names another", lost.count(OUTSIDE)),
                    ("are left out since all would be too much for the page", lost.count(TOO_MANY)),
                    ("are missing or cannot be read here", len(lost) - lost.count(OUTSIDE) - lost.count(TOO_MANY))):
        if n:
            notes.append(f"pictures: {n:,} of {len(images):,} {what}; their places are marked")
    return {"fields": FIELDS, "rows": rows, "strings": strings, "images": images}, notes


# writing

def clean(value):
    """value with None for each float that JSON does not have (nan, inf)."""
    if isinstance(value, dict):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fill(template, report):
    """the page: template with its {{policy}} and {{data}}."""
    def hashed(tag):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", template, re.S).group(1)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    policy = (f"default-src 'none'; img-src data:; style-src {hashed('style')}; script-src {hashed('script')}; "
              "base-uri 'none'; form-action 'none'")
    head, tail = template.replace("{{policy}}", policy).split("{{data}}")       # data is put in last: it may hold braces
    return head + encode(report) + tail


def write_page(path, report):
    """Write the page of report: title, notes, figures, tables, configs, and samples (the first of what read_samples
    returns, or None). Configs, tables, figures are left out, in this order and with a note, where they are too large."""
    page = clean({key: report.get(key) or [] for key in ("figures", "tables", "configs")})
    page |= {"title": str(report.get("title") or "")[:500], "samples": report.get("samples"),
             "notes": [str(note)[:1000] for note in (report.get("notes") or [])[:100]]}
    for part in ("configs", "tables", "figures"):
        if len(encode([page["configs"], page["tables"], page["figures"]])) > REST_BYTES:
            page["notes"].append(f"{part}: left out, {len(encode(page[part])) / 1e6:.1f} MB is too much for the page")
            page[part] = []
    with open(TEMPLATE, encoding="utf-8") as file:
        text = fill(file.read(), page).encode()
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            file.write(text)
        os.replace(temporary, path)     # a reader sees the old page or the new one
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
