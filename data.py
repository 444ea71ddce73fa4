"""Samples, prompts and images: all between a jsonl file and the numbers that a model takes. Also fetches the real sets.

    python data.py toy                     # data/toy, drawn in seconds (it also appears by itself on first use)
    python data.py geo3k                   # data/geometry3k from the authors' files, ManTle/MAYE on the hub
    python data.py mm_math                 # data/mm_math5k from the same
    python data.py geo3k_hub               # data/geometry3k from hiyouga/geometry3k (parquet: pip install pyarrow)
    python data.py geo3k_raw FOLDER        # data/geometry3k from Geometry3K's own layout, one folder a problem
    python data.py mm_math_hub             # data/mm_math5k from THU-KEG/MM_Math (our draw, without the paper's test)
    python data.py geo3k FOLDER            # the same conversion from a copy on disk, nothing is fetched (any name)

One JSON object a line: question (with one <image>), answer, solution (RL needs none), id, image (path relative to the
jsonl). Every row is checked before a model is loaded, and all bad ones are named at once. A prompt is never cut, since
cutting through an image's tokens is the commonest way to lose a run. An image is resized once, here, to a size that the
image processor and the engine do not change again, so all of them see the same pixels.

Taken     rows: ends of line as Unix or Windows writes them, UTF-8 byte order marks, blank lines, any script; a number as
          answer or id, as Python writes it; keys of no use here, with anything in them, NaN too.
          images: JPEG, PNG, WEBP, GIF, BMP, by content, whatever their name says. The first frame of several; palette,
          CMYK, grey of 1 to 16 bits as RGB; white behind transparent parts; turned as EXIF says, not turned where EXIF is
          broken; from 1x1 to 100 million pixels (images.py has the memory), up to 200:1. A file damaged so that its
          decoder does not notice is taken as decoded.
          paths: below the jsonl's folder as they are written. Links on disk are followed wherever they lead: the hub's
          cache and shared disks are made of them, and a row cannot make one.
Refused   with file, line and reason. Rows: no JSON, no UTF-8, over 1 MB, nested too deeply, a key twice; a value missing,
          of another type, NaN, Infinity or out of range (1e400, integers of 300 digits); half a surrogate pair; a control
          character in id, image or answer; <image> not once; an empty id or answer, one that the judge cannot read;
          special tokens of the model in the text; a prompt that is too long. Paths that are absolute (also on Windows)
          or climb out. Images: missing, empty, truncated, broken, other formats; folders, pipes, devices; over 100
          million pixels, over 200:1; a PNG whose text or colour profile unpacks to over 1 MB. UTF-16: the file, once.
Warned of by print_warnings, with counts: ids that are there twice, control characters in questions and solutions, images
          and problems of train that validation or test has too.
"""
import codecs
import collections
import concurrent.futures
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import random
import re
import shutil
import sys
import zipfile
from typing import NamedTuple

from configurator import UserError
from images import check_image, final_size, open_image, read_image  # noqa: F401 (open_image is for others to import)
from reward import last_boxed, readable_batch

SIZES = {"mm_math5k": (5000, 100, 100), "geometry3k": (2101, 300, 601)}  # train, validation, test (the paper's table)
NAMES = {"mm_math5k": ("mm_math_rl_v0", "mm_math_validation_v0", "mm_math_test_v0"),
         "geometry3k": ("geometry3k_rl_v0", "geometry3k_validation_v0", "geometry3k_test_v0")}
MADE_BY = {"toy": "toy", "geometry3k": "geo3k", "mm_math5k": "mm_math"}  # folder -> `python data.py NAME` makes it
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
INSTRUCTION = " Solve the problem step by step. Put the final answer in \\boxed{}."
SHOWN = 20  # bad rows named in one message
MAX_ROW = 1_000_000  # bytes of a line
BOM = b"\xef\xbb\xbf"  # the byte order mark of UTF-8
KINDS = {"question": str, "answer": (str, int, float), "id": (str, int), "image": str, "solution": str}
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # all control characters but tab and ends of lines


class Sample(NamedTuple):
    id: str
    question: str  # with one <image>
    answer: str
    solution: str  # '' when the row has none
    image: str  # path, absolute or relative to the working directory


class Inputs(NamedTuple):
    prompt: str  # chat-formatted, ONE <|image_pad|>: what an engine gets, which expands it itself
    image: object  # PIL.Image, RGB, at its final size
    query_ids: list  # of int, the image placeholder expanded: what the trainer gets
    pixel_values: object  # (patches, patch dimension) float32
    grid_thw: object  # (1, 3) int64: frames, rows and columns of patches


def prompt_text(tokenizer, question):
    """The chat-formatted prompt of a question, one <|image_pad|> for <image>. RL, SFT and evaluation use this."""
    turn = {"role": "user", "content": question.replace("<image>", VISION) + INSTRUCTION}
    return tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)


def order(n, seed, epoch):
    """The order of n samples in an epoch: a permutation of range(n), a pure function of its arguments everywhere."""
    indices = list(range(n))
    random.Random(f"order {seed} {epoch}").shuffle(indices)  # a str is hashed by sha512, whatever PYTHONHASHSEED says
    return indices


def load_processor(model_dir):
    """(tokenizer, image processor) of a checkpoint folder or hub name; UserError where they cannot be loaded.
    The processor is the PIL one by name: it needs no torchvision, and gives the same pixels where there is one."""
    from transformers import AutoTokenizer  # here: it takes seconds, and `python data.py` needs none of it
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(model_dir)
        if not (image_processor.size["shortest_edge"] and image_processor.size["longest_edge"]):
            raise ValueError("its image processor is another one")
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{model_dir}: no tokenizer and image processor of a Qwen2-VL or Qwen2.5-VL there "
                        f"({' '.join(str(e).split())[:200]})") from e
    if tokenizer.chat_template is None or "<|image_pad|>" not in tokenizer.get_vocab():
        raise UserError(f"{model_dir}: the tokenizer has no chat template or no <|image_pad|>; give the folder of a "
                        "Qwen2-VL or Qwen2.5-VL, instruct version")
    return tokenizer, image_processor


def inside(folder, path):
    """folder/path; ValueError when path is absolute or climbs out of the folder."""
    plain = os.path.normpath(path.replace("\\", "/"))
    if os.path.isabs(plain) or re.match(r"\w:", plain) or plain.split(os.sep)[0] == os.pardir:
        raise ValueError(f"path {path!r:.100} leaves the folder of its file")
    return os.path.join(folder, path)


def ensure(path):
    """Draw the toy set if path lies in data/toy and is not there; UserError for any other file that is missing,
    and for one that may not be read."""
    folder = os.path.dirname(os.path.normpath(path))
    if not os.path.exists(path) and folder.split(os.sep)[-2:] == ["data", "toy"]:
        import toy
        toy.make_toy(folder)
    if not os.path.isfile(path):
        name = MADE_BY.get(os.path.basename(folder))
        what_to_do = f"`python data.py {name}` makes it" if name else "give the path of a jsonl file"
        raise UserError(f"{path}: no such file; {what_to_do}")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: cannot be read, its permissions forbid it")


def read_rows(path):
    """(line number, bytes) of each line that is not blank, cut after MAX_ROW + 1 bytes; one line in memory at a time.
    Only \\n ends a line: JSON may hold the others raw. UserError for UTF-16."""
    with open(path, "rb") as file:
        for number in itertools.count(1):
            line = rest = file.readline(MAX_ROW + 1)
            if not line:
                return
            if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError(f"{path}:1: the file is in UTF-16, save it as UTF-8")
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(MAX_ROW)
            if (line := line.removeprefix(BOM)).strip():
                yield number, line


def unique(pairs):
    """The dict of a JSON object's (key, value) pairs; ValueError for a key that is there twice: which one is meant?"""
    if len(row := dict(pairs)) < len(pairs):
        key, _ = collections.Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {key!a:.100} is there twice")
    return row


def faults(key, value, wanted):
    """What is wrong with the value of a key of a row, as a list of at most one str."""
    if value is None:
        return [f"no {key}"] * wanted
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{key} is {value}"]  # NaN and Infinity, which are no JSON but Python reads and writes them; 1e400
    if isinstance(value, bool) or not isinstance(value, KINDS[key]):
        return [f"{key} is a {type(value).__name__}"]
    if re.search("[\ud800-\udfff]", text := str(value)):
        return [f"{key} has half of a surrogate pair"]  # no tokenizer takes it, and no file in UTF-8 holds it
    if key != "question" and wanted and not text.strip():
        return [f"empty {key}"]
    control = re.search(r"[\x00-\x1f\x7f]", text.rstrip()) if key == "answer" else CONTROL.search(text)
    if control and key in ("id", "image", "answer"):
        return [f"{key} has a control character, {control[0]!r} (LaTeX in JSON needs two backslashes)"]
    return []


def parse_row(line, folder, need_solution, special):
    """The Sample of one line; ValueError says what is wrong with it. special: tokens that no text may contain."""
    if len(line) > MAX_ROW:
        raise ValueError(f"longer than {MAX_ROW} bytes")
    try:  # int() itself refuses 4300 digits, and some 10**308 have no float
        row = json.loads(line.decode("utf-8"), object_pairs_hook=unique,
                         parse_int=lambda digits: int(digits) if len(digits) < 300 else math.inf)
    except json.JSONDecodeError as e:
        raise ValueError(f"not valid JSON ({e.msg}, column {e.colno})") from e
    except UnicodeDecodeError as e:
        raise ValueError(f"not UTF-8 ({e.reason}, byte {e.start + 1})") from e
    except RecursionError as e:
        raise ValueError("not valid JSON (nested too deeply)") from e
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object but a {type(row).__name__}")
    wrong = [what for key in KINDS for what in faults(key, row.get(key), key != "solution" or need_solution)]
    if wrong:
        raise ValueError("; ".join(wrong))
    sample = Sample(id=str(row["id"]), question=row["question"], answer=str(row["answer"]).strip(),
                    solution=row.get("solution") or "", image=row["image"])
    image = inside(folder, sample.image)
    if (found := sample.question.count("<image>")) != 1:
        wrong.append(f"question must have one <image>, has {found}")
    texts = sample.question + sample.solution * need_solution
    wrong += [f"special token {token} in the text" for token in special if token in texts]
    if wrong:
        raise ValueError("; ".join(wrong))
    return sample._replace(image=image)


def open_readers():
    """A pool of threads that read images or hash them: both release Python's lock, and threads need not send pixels."""
    return concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1), "reader")


class Dataset:
    """The samples of a jsonl file, all checked; inputs(i) makes one of them into what engine and trainer take.
    UserError names every bad row as file:line: what."""
    def __init__(self, path, tokenizer, image_processor, min_pixels, max_pixels, max_prompt_tokens,
                 need_solution=False):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        factor = image_processor.patch_size * image_processor.merge_size  # pixels on a side of one image token
        self.pixels = (factor, min_pixels, max_pixels)
        low, high = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
        if not max(low, 1) <= min_pixels <= max_pixels <= high or max_pixels < factor**2:
            raise UserError(f"{min_pixels=} {max_pixels=}: must be in order and within the model's own {low}..{high} "
                            f"(else the engine would resize again), max_pixels at least {factor**2}")
        ensure(path)
        count, rows, bad = 0, [], collections.defaultdict(list)  # bad: {line: [what is wrong]}
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        special |= set(tokenizer.all_special_tokens)
        for line, text in read_rows(path):
            count += 1
            try:
                rows.append((line, parse_row(text, os.path.dirname(path), need_solution, sorted(special))))
            except ValueError as e:
                bad[line].append(str(e))
        self.kept = {}  # {row: Query}: see model.keep_all
        self.path, self.lines, self.samples = path, [line for line, _ in rows], [sample for _, sample in rows]
        # a gold answer that the judge cannot read back as itself would score every response 0
        answers = sorted({sample.answer for sample in self.samples})
        unreadable = {answer for answer, read in zip(answers, readable_batch(answers)) if not read}
        prompts = [prompt_text(tokenizer, sample.question) for sample in self.samples]
        ids = tokenizer(prompts, add_special_tokens=False)["input_ids"] if prompts else []
        with open_readers() as pool:
            sizes = list(pool.map(check_image, [sample.image for sample in self.samples]))
        for (line, sample), text_ids, size in zip(rows, ids, sizes):
            if sample.answer in unreadable:
                bad[line].append(f"the judge cannot read the answer {sample.answer!r:.100}")
            if isinstance(size, str):
                bad[line].append(size)
                continue
            try:
                width, height = final_size(*size, *self.pixels)
                if (tokens := len(text_ids) - 1 + width * height // factor**2) > max_prompt_tokens:
                    bad[line].append(f"the prompt has {tokens} tokens, over {max_prompt_tokens=}: raise it, or lower "
                                     "max_pixels")
            except ValueError as e:
                bad[line].append(str(e))
        if bad:
            shown = [f"{path}:{line}: {'; '.join(what)}" for line, what in sorted(bad.items())]
            more = [f"... and {len(shown) - SHOWN} more"] * (len(shown) > SHOWN)
            title = f"{path}: {len(bad)} of {count} rows are bad, mend or remove them:"
            raise UserError("\n".join([title, *shown[:SHOWN], *more]))
        if not count:
            raise UserError(f"{path}: the file has no rows")

    def __len__(self):
        return len(self.samples)

    def inputs(self, i, pixels=True):
        """Inputs of sample i. The image is read from disk each time. pixels=False leaves pixel_values None,
        for an engine that makes its own."""
        sample = self.samples[i]
        prompt, image = prompt_text(self.tokenizer, sample.question), read_image(sample.image, *self.pixels)
        import torch  # here: reading and checking data does without its 200 MB
        patch, values = self.image_processor.patch_size, None
        grid = torch.tensor([[1, image.height // patch, image.width // patch]])
        if pixels:
            features = self.image_processor(images=[image], do_resize=False, return_tensors="pt")
            values = features["pixel_values"].float()
            assert torch.equal(features["image_grid_thw"], grid), f"{sample.image}: {features['image_grid_thw']} {grid}"
        pad = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        at, count = ids.index(pad), int(grid.prod()) // self.image_processor.merge_size**2
        return Inputs(prompt, image, ids[:at] + [pad] * count + ids[at + 1:], values, grid)


def print_warnings(datasets):
    """Prints, a line each with counts, what is doubtful in the datasets of a run, {split or any name: Dataset}. Images are
    compared by the bytes of their files, so that copies under other names count. For the main process, once."""
    for dataset in datasets.values():
        first = {}  # id -> line
        twice = [(line, first[sample.id], sample.id) for line, sample in zip(dataset.lines, dataset.samples)
                 if first.setdefault(sample.id, line) != line]
        if twice:
            print(f"warning: {dataset.path}: {len(twice)} of {len(dataset)} rows have the id of an earlier row (first line "
                  f"{twice[0][0]}: {twice[0][2]!a:.100} as on line {twice[0][1]}); they share seeds in sampling, and count "
                  "as one problem in the report's browser")
        control = [(line, found[0]) for line, sample in zip(dataset.lines, dataset.samples)
                   if (found := CONTROL.search(sample.question + sample.solution))]
        if control:
            print(f"warning: {dataset.path}: {len(control)} of {len(dataset)} rows have a control character in question or "
                  f"solution (first line {control[0][0]}: {control[0][1]!r}); LaTeX in JSON needs two backslashes")
    if "train" not in datasets or len(datasets) == 1:
        return
    paths = sorted({sample.image for dataset in datasets.values() for sample in dataset.samples})
    with open_readers() as pool:
        digest = dict(zip(paths, pool.map(lambda path: hashlib.blake2b(pathlib.Path(path).read_bytes()).digest(), paths)))
    keys = {name: [(digest[sample.image], " ".join(sample.question.split())) for sample in dataset.samples]
            for name, dataset in datasets.items()}
    problems, images = set(keys["train"]), {image for image, _ in keys["train"]}
    for name in [name for name in keys if name != "train"]:
        same = sum(key in problems for key in keys[name])
        other = sum(key[0] in images for key in keys[name]) - same
        if same:
            print(f"warning: {same} of {len(keys[name])} problems of {name} are also in train (same image and question); "
                  f"accuracy on {name} counts them")
        if other:
            print(f"warning: {other} of {len(keys[name])} problems of {name} have an image of train with another question")
    sys.stdout.flush()


# The real sets. A reader gives the [train, validation, test] lists of rows of a folder on disk. A row's image
# is a function that returns the picture's bytes: nothing is read before it is written.

def make_row(id, question, answer, solution, image):
    """A row of the paper's jsonl: <image> in front if the question has none, the boxed answer for no solution."""
    question = question if question.count("<image>") == 1 else "<image>" + question.replace("<image>", " ").strip()
    answer = str(answer).strip()
    return dict(question=question, answer=answer, solution=solution or f"\\boxed{{{answer}}}", id=str(id), image=image)


def read_maye(source, dataset):
    """The authors' files: the paper's own rows, in <dataset>/*.jsonl with pictures in folders beside."""
    folder, splits = os.path.join(source, dataset.removesuffix("5k")), []
    for name in NAMES[dataset]:
        name = name.replace("mm_math_test", "math_verse_test")
        rows = [json.loads(line) for _, line in read_rows(os.path.join(folder, f"{name}.jsonl"))]
        splits.append([make_row(row["id"], row["question"], row["answer"], row.get("solution"),
                                pathlib.Path(inside(folder, row["image"])).read_bytes) for row in rows])
    return splits


def read_geo3k_hub(source, dataset):
    """hiyouga/geometry3k: data/{train,validation,test}-*.parquet with images [{bytes, path}], problem, answer, id."""
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise UserError("geo3k_hub: parquet needs `pip install pyarrow`; `python data.py geo3k` needs none") from e
    splits = []
    for split in ("train", "validation", "test"):
        files = sorted(pathlib.Path(source, "data").glob(f"{split}-*.parquet"))
        table = [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]
        splits.append([make_row(f"geometry3k_{row.get('id', f'{split}_{i}')}", row["problem"], row["answer"], "",
                                functools.partial(bytes, row["images"][0]["bytes"])) for i, row in enumerate(table)])
    return splits


def read_geo3k_raw(source, dataset):
    """Geometry3K as Inter-GPS published it: a folder a problem, anywhere below source: data.json and img_diagram.png;
    the answer is the letter of a choice, and data_type names the split."""
    splits = {"train": [], "val": [], "test": []}
    for file in pathlib.Path(source).rglob("data.json"):
        row = json.loads(file.read_bytes())
        answer = (row.get("compact_choices") or row["choices"])["ABCD".index(row["answer"])]
        image = file.with_name("img_diagram.png").read_bytes
        converted = make_row(f"geometry3k_{row['id']}", row["annotat_text"], answer, "", image)
        splits[row["data_type"]].append((row["id"], converted))
    return [[row for _, row in sorted(rows, key=lambda pair: pair[0])] for rows in splits.values()]


def is_numeric(answer):
    """Whether an answer is one number: digits, with fractions, roots, pi and a degree sign, and nothing else."""
    rest = re.sub(r"\\(d?frac|sqrt|pi|times|cdot|left|right|circ|degree|[,;!%$ ])|\^\{?\s*\\circ\s*\}?|[$%°π√]", "",
                  answer)
    return bool(re.search(r"\d", answer)) and not re.search(r"[^\d\s.+\-*/(){}\[\]^]", rest)


def read_mm_math_hub(source, dataset):
    """THU-KEG/MM_Math: MM_Math.jsonl (question, file_name, solution ending in a box) and a zip of pictures. Which 5,000
    the authors chose it does not say: this is our draw of numeric problems. Their test set is MathVerse: none here."""
    archive, members, rows = zipfile.ZipFile(min(pathlib.Path(source).glob("*.zip"))), {}, []
    for member in archive.infolist():
        inside(source, member.filename)  # nothing is unpacked by name, but an archive that tries is not to be trusted
        if member.file_size > 100_000_000:
            raise ValueError(f"{member.filename!r:.100} in the archive has {member.file_size} bytes")
        members[os.path.basename(member.filename)] = member
    for line, text in read_rows(os.path.join(source, "MM_Math.jsonl")):
        row = json.loads(text)
        answer, name = last_boxed(row["solution"]), os.path.basename(row.get("file_name") or "")
        if answer and is_numeric(answer) and name in members:
            image = functools.partial(archive.read, members[name])
            rows.append(make_row(f"mm_math_{line}", row["question"], answer, row["solution"], image))
    rows = [rows[i] for i in order(len(rows), seed=0, epoch=0)]
    train, validation, _ = SIZES[dataset]
    return [rows[validation:validation + train], rows[:validation]]


#           name -> the set it makes, the hub's dataset, the files of it that are fetched, the reader
SOURCES = {"geo3k": ("geometry3k", "ManTle/MAYE", "geometry3k/*", read_maye),
           "geo3k_hub": ("geometry3k", "hiyouga/geometry3k", "data/*.parquet", read_geo3k_hub),
           "geo3k_raw": ("geometry3k", "", "", read_geo3k_raw),
           "mm_math": ("mm_math5k", "ManTle/MAYE", "mm_math/*", read_maye),
           "mm_math_hub": ("mm_math5k", "THU-KEG/MM_Math", "*", read_mm_math_hub)}


def fetch(name):
    """The folder, in the hub's cache, that holds the files of SOURCES[name]."""
    _, repo, files, _ = SOURCES[name]
    if not repo:
        raise UserError(f"{name}: is on no hub; give the folder that holds it, `python data.py {name} FOLDER`")
    import huggingface_hub  # comes with transformers
    try:
        return huggingface_hub.snapshot_download(repo, repo_type="dataset", allow_patterns=[files])
    except Exception as e:  # offline, moved, full disk: the hub's client has a dozen error classes, and all mean this
        raise UserError(f"{name}: cannot fetch {repo} from the hub ({type(e).__name__}); "
                        f"with a copy of it on disk, `python data.py {name} FOLDER`") from e


def convert(name, source, root="data"):
    """{path: rows} of the jsonl files written, with images/ beside them, from the files of SOURCES[name] in source.
    UserError when they are laid out otherwise, or a split has not the paper's size."""
    dataset, _, _, reader = SOURCES[name]
    target = os.path.join(root, dataset)
    if os.path.exists(target):
        raise UserError(f"{target}: is there already, remove it to make it again")
    temporary = f"{target}.tmp-{os.getpid()}"
    try:
        splits = reader(source, dataset)
        for split, rows, size in zip(("train", "validation", "test"), splits, SIZES[dataset]):
            if len(rows) != size:
                raise UserError(f"{source}: the {split} split of {dataset} has {size} rows in the paper, here "
                                f"{len(rows)}")
        files = dict(zip(NAMES[dataset], splits))
        if dataset == "mm_math5k":  # what SFT can learn from: solutions that are more than the boxed answer
            alone = re.compile(r"\s*\\boxed\{.*\}[\s.]*")
            files["mm_math_sft_v0"] = [row for row in splits[0] if not alone.fullmatch(row["solution"])]
        os.makedirs(os.path.join(temporary, "images"))
        owners = {}  # picture -> its row
        for file_name, rows in files.items():
            with open(os.path.join(temporary, f"{file_name}.jsonl"), "w", encoding="utf-8") as file:
                for row in rows:
                    image = f"images/{re.sub(r'[^A-Za-z0-9_-]', '_', row['id'])}.png"  # whatever it is: content decides
                    if owners.setdefault(image, row) is not row:
                        raise ValueError(f"two rows have the id {row['id']!r:.100}")
                    pathlib.Path(temporary, image).write_bytes(row["image"]())
                    file.write(json.dumps(row | {"image": image}, ensure_ascii=False) + "\n")
        os.rename(temporary, target)  # all or nothing
    except (OSError, LookupError, TypeError, AttributeError, ValueError, RuntimeError, zipfile.BadZipFile) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{source}: not the layout that {name} reads ({type(e).__name__}: {e})") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {os.path.join(target, f"{file_name}.jsonl"): len(rows) for file_name, rows in files.items()}


if __name__ == "__main__":
    try:
        name, *source = sys.argv[1:] or ["--help"]
        if name == "toy" and not source:
            import toy
            toy.make_toy("data/toy")
        elif name in SOURCES and len(source) < 2:
            for path, count in convert(name, source[0] if source else fetch(name)).items():
                print(f"{path}: {count} rows")
        elif name in ("--help", "-h"):
            print(__doc__)
        else:
            raise UserError(f"usage: python data.py NAME [FOLDER], NAME one of toy, {', '.join(SOURCES)} (--help)")
    except UserError as e:
        sys.exit(print(e, file=sys.stderr) or 2)
