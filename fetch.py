"""The real data sets, fetched and converted to the rows that data.py reads, their pictures in images/ beside:
geometry3k of 2101, 300 and 601 problems, mm_math5k of 5000, 100 and 100 (train, validation, test; the paper).

    python fetch.py geo3k                 # data/geometry3k from the authors' files, ManTle/MAYE on the hub
    python fetch.py mm_math               # data/mm_math5k from the same
    python fetch.py geo3k_raw FOLDER      # data/geometry3k from Geometry3K's own layout (Inter-GPS)
    python fetch.py geo3k FOLDER          # geo3k or mm_math from a copy of the authors' files on disk
"""
import argparse
import json
import os
import pathlib
import re
import shutil
import tempfile

from configurator import UserError

SPLITS = ("rl", "validation", "test")
FILES = {"geometry3k": "geometry3k_{}_v0.jsonl", "mm_math5k": "mm_math_{}_v0.jsonl"}
REPO = "ManTle/MAYE"


def make_row(id, question, answer, solution, image):
    """A row as data.py reads it: one <image> in the question, the boxed answer where there is no solution.
    image: the path of its picture in the source."""
    if question.count("<image>") != 1:
        question = "<image>" + question.replace("<image>", " ").strip()
    answer = str(answer).strip()
    return {"question": question, "answer": answer, "solution": solution or f"\\boxed{{{answer}}}",
            "id": str(id), "image": image}


def read_maye(source, dataset):
    """[train, validation, test] rows of the authors' files: geometry3k/ or mm_math/ holds their jsonl, and
    pictures in folders beside them. The test set of mm_math is MathVerse's."""
    folder, splits = pathlib.Path(source, dataset.removesuffix("5k")), []
    for split in SPLITS:
        name = FILES[dataset].format(split).replace("mm_math_test", "math_verse_test")
        splits.append([])
        for line in (folder / name).read_text(encoding="utf-8").split("\n"):
            if not line.strip():
                continue
            row = json.loads(line)
            image = pathlib.Path(row["image"])
            if image.is_absolute() or ".." in image.parts:
                raise ValueError(f"{name}: image {row['image']!r:.100} leaves the folder")
            splits[-1].append(make_row(row["id"], row["question"], row["answer"], row.get("solution"),
                                       folder / image))
    return splits


def read_geo3k_raw(source, dataset):
    """[train, validation, test] rows of Geometry3K as Inter-GPS published it: a folder a problem, anywhere
    below source, with data.json and img_diagram.png; the answer is the letter of a choice."""
    splits = {"train": {}, "val": {}, "test": {}}  # split -> {id: row}
    for file in pathlib.Path(source).rglob("data.json"):
        row = json.loads(file.read_text(encoding="utf-8"))
        choices = row.get("compact_choices") or row["choices"]
        splits[row["data_type"]][row["id"]] = make_row(
            f"geometry3k_{row['id']}", row["annotat_text"], choices["ABCD".index(row["answer"])], "",
            file.with_name("img_diagram.png"))
    return [[rows[id] for id in sorted(rows)] for rows in splits.values()]


SOURCES = {"geo3k": ("geometry3k", read_maye), "mm_math": ("mm_math5k", read_maye),
           "geo3k_raw": ("geometry3k", read_geo3k_raw)}  # name -> (data set, its reader)


def fetch(name):
    """The folder, in the hub's cache, that holds the files of SOURCES[name]."""
    if name == "geo3k_raw":
        raise UserError("geo3k_raw is on no hub: `python fetch.py geo3k_raw FOLDER`, where it lies on disk")
    import huggingface_hub  # comes with transformers
    folder = SOURCES[name][0].removesuffix("5k")
    try:
        return huggingface_hub.snapshot_download(REPO, repo_type="dataset", allow_patterns=[f"{folder}/*"])
    except Exception as e:  # offline, moved, full disk: the hub's client has a dozen error classes for these
        raise UserError(f"cannot fetch {REPO} from the hub ({type(e).__name__}); "
                        f"with a copy of it on disk, `python fetch.py {name} FOLDER`") from e


def write(folder, dataset, splits):
    """Writes the splits' jsonl and their pictures to folder; {file name: rows}."""
    written = {}
    os.makedirs(f"{folder}/images")
    for split, rows in zip(SPLITS, splits):
        for i, row in enumerate(rows):
            image = f"images/{split}-{i:05d}{row['image'].suffix}"
            shutil.copyfile(row["image"], f"{folder}/{image}")
            row["image"] = image
        written[FILES[dataset].format(split)] = rows
    if dataset == "mm_math5k":  # what SFT can learn from: solutions that are more than the boxed answer
        alone = re.compile(r"\s*\\boxed\{.*\}[\s.]*")
        written["mm_math_sft_v0.jsonl"] = [row for row in splits[0] if not alone.fullmatch(row["solution"])]
    for name, rows in written.items():
        with open(f"{folder}/{name}", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return written


def convert(name, source, root="data"):
    """Makes the data set of SOURCES[name] below root from the files in source, all or nothing, and prints the
    rows of each file. UserError when source is laid out otherwise, or the data set is there already."""
    dataset, reader = SOURCES[name]
    target = os.path.join(root, dataset)
    if os.path.exists(target):
        raise UserError(f"{target}: is there already, remove it to make it again")
    os.makedirs(root, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=f"{dataset}.", dir=root)
    try:
        splits = reader(source, dataset)
        if not any(splits):
            raise ValueError("no problem found")
        written = write(temporary, dataset, splits)
        os.chmod(temporary, 0o755)  # mkdtemp's 0700 would shut other users out
        os.rename(temporary, target)
    except (OSError, LookupError, TypeError, ValueError) as e:
        raise UserError(f"{source}: not the layout that {name} reads ({type(e).__name__}: {e})") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for file, rows in written.items():
        print(f"{target}/{file}: {len(rows)} rows")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("folder", nargs="?", help="where its files are; none: fetch them from the hub")
    args = parser.parse_args()
    try:
        convert(args.name, args.folder or fetch(args.name))
    except UserError as e:
        parser.exit(2, f"{e}\n")
