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
"""
import collections
import concurrent.futures
import functools
import json
import math
import os
import pathlib
import random
import re
import shutil
import sys
import warnings
import zipfile
from typing import NamedTuple

from PIL import Image, ImageOps

from configurator import UserError
from reward import last_boxed, readable

SIZES = {"mm_math5k": (5000, 100, 100), "geometry3k": (2101, 300, 601)}  # train, validation, test (the paper's table)
NAMES = {"mm_math5k": ("mm_math_rl_v0", "mm_math_validation_v0", "mm_math_test_v0"),
         "geometry3k": ("geometry3k_rl_v0", "geometry3k_validation_v0", "geometry3k_test_v0")}
MADE_BY = {"toy": "toy", "geometry3k": "geo3k", "mm_math5k": "mm_math"}  # folder -> `python data.py NAME` makes it
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
INSTRUCTION = " Solve the problem step by step. Put the final answer in \\boxed{}."
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # no EPS and the like: to decode those, other programs are started
MAX_RATIO = 200  # longer pictures are refused by Qwen's image processor
SHOWN = 20  # bad rows named in one message
Image.MAX_IMAGE_PIXELS = 100_000_000  # open_image fails from here on; Pillow only warns, and fails from twice that on
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


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


def final_size(width, height, factor, min_pixels, max_pixels):
    """(width, height) of like shape, multiples of factor, between min_pixels and max_pixels. Qwen2-VL's arithmetic,
    applied until it changes nothing: one pass can leave a long thin picture at a size that the next pass would change.
    ValueError where there is no such size."""
    for _ in range(16):
        if max(width, height) > MAX_RATIO * min(width, height):
            raise ValueError(f"the image is too long and thin, {width}x{height}, at most {MAX_RATIO}:1")
        w, h = round(width / factor) * factor, round(height / factor) * factor
        if w * h > max_pixels:
            shrink = math.sqrt(width * height / max_pixels)
            w, h = (max(factor, math.floor(side / shrink / factor) * factor) for side in (width, height))
        elif w * h < min_pixels:
            grow = math.sqrt(min_pixels / (width * height))
            w, h = (math.ceil(side * grow / factor) * factor for side in (width, height))
        if (w, h) == (width, height):
            return w, h
        width, height = w, h
    raise ValueError(f"the image fits no size between {min_pixels=} and {max_pixels=}, set them further apart")


def open_image(path):
    """(PIL image, its pixels not decoded yet; (width, height) once upright). ValueError for one that is too large."""
    image = Image.open(path, formats=FORMATS)
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width}x{image.height}, more than {Image.MAX_IMAGE_PIXELS // 10**6} million pixels")
    sideways = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # the camera was turned
    return image, image.size[::-1] if sideways else image.size


def check_image(path):
    """(width, height) of the upright picture, all of it decoded once; a str that says what is wrong, if it is."""
    if not os.path.isfile(path):  # also keeps us from waiting on a pipe
        return f"no image {path}"
    try:
        image, size = open_image(path)
        with image:
            image.draft(None, (1, 1))  # a JPEG is decoded at an eighth of its size, which still reads every byte
            image.load()
        return size
    except Exception as e:  # a decoder can raise anything on a broken file, and the row is reported
        return f"image {path} cannot be read ({' '.join(str(e).split()) or type(e).__name__})"


def read_image(path, factor, min_pixels, max_pixels):
    """The picture upright, in RGB, on white where it is transparent, at its final size."""
    image, size = open_image(path)
    with image:
        width, height = final_size(*size, factor, min_pixels, max_pixels)
        # libjpeg can decode to a half, quarter or eighth, in as much less memory; never below twice the size we need
        scale = 2 * max(width, height) / max(size)
        image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip at 255 instead of scaling
            image = image.convert("I").point(lambda v: v * (1 / 257)).convert("L")
        clear = "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa")
        if image.mode != (mode := "RGBA" if clear else "RGB"):  # convert copies, even where it has nothing to do
            image = image.convert(mode)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if clear:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image


def inside(folder, path):
    """folder/path; ValueError when path is absolute or climbs out of the folder."""
    plain = os.path.normpath(path.replace("\\", "/"))
    if os.path.isabs(plain) or re.match(r"\w:", plain) or plain.split(os.sep)[0] == os.pardir:
        raise ValueError(f"path {path!r:.100} leaves the folder of its file")
    return os.path.join(folder, path)


def ensure(path):
    """Draw the toy set if path lies in data/toy and is not there; UserError for any other file that is missing."""
    folder = os.path.dirname(os.path.normpath(path))
    if not os.path.exists(path) and folder.split(os.sep)[-2:] == ["data", "toy"]:
        import toy
        toy.make_toy(folder)
    if not os.path.isfile(path):
        name = MADE_BY.get(os.path.basename(folder))
        what_to_do = f"`python data.py {name}` makes it" if name else "give the path of a jsonl file"
        raise UserError(f"{path}: no such file; {what_to_do}")


def read_rows(path):
    """[(line number, bytes)] of the lines that are not blank. Only \\n ends a line: JSON may hold the others raw."""
    lines = pathlib.Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [(i, line) for i, line in enumerate(lines, start=1) if line.strip()]


def parse_row(line, folder, need_solution, special):
    """The Sample of one line; ValueError says what is wrong with it. special: tokens that no text may contain."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not valid JSON in UTF-8 ({e})") from e
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object but a {type(row).__name__}")
    kinds = {"question": str, "answer": (str, int, float), "id": (str, int), "image": str, "solution": str}
    wanted = [key for key in kinds if key != "solution" or need_solution]
    if missing := [key for key in wanted if row.get(key) is None]:
        raise ValueError(f"no {', '.join(missing)}")
    wrong = [f"{key} is a {type(row[key]).__name__}" for key, kind in kinds.items()
             if row.get(key) is not None and (not isinstance(row[key], kind) or isinstance(row[key], bool))]
    if wrong:
        raise ValueError(", ".join(wrong))
    sample = Sample(id=str(row["id"]), question=row["question"], answer=str(row["answer"]).strip(),
                    solution=row.get("solution") or "", image=row["image"])
    "".join(sample).encode("utf-8")  # half a surrogate pair is valid JSON, but no tokenizer takes it: a ValueError too
    image = inside(folder, sample.image)
    if (found := sample.question.count("<image>")) != 1:
        wrong.append(f"question must have one <image>, has {found}")
    texts = sample.question + sample.solution * need_solution
    wrong += [f"special token {token} in the text" for token in special if token in texts]
    wrong += ["empty answer"] * (not sample.answer)
    wrong += ["empty solution"] * (need_solution and not sample.solution.strip())
    if wrong:
        raise ValueError(", ".join(wrong))
    return sample._replace(image=image)


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
        lines, rows, bad = read_rows(path), [], collections.defaultdict(list)  # bad: {line: [what is wrong]}
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        special |= set(tokenizer.all_special_tokens)
        for line, text in lines:
            try:
                rows.append((line, parse_row(text, os.path.dirname(path), need_solution, sorted(special))))
            except ValueError as e:
                bad[line].append(str(e))
        self.samples = [sample for _, sample in rows]
        # a gold answer that the judge cannot read back as itself would score every response 0
        unreadable = {answer for answer in sorted({sample.answer for sample in self.samples}) if not readable(answer)}
        prompts = [prompt_text(tokenizer, sample.question) for sample in self.samples]
        ids = tokenizer(prompts, add_special_tokens=False)["input_ids"] if prompts else []
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases the GIL
            sizes = list(pool.map(check_image, [sample.image for sample in self.samples]))
        first = {}  # id -> line
        for (line, sample), text_ids, size in zip(rows, ids, sizes):
            if first.setdefault(sample.id, line) != line:
                bad[line].append(f"id {sample.id!r:.100} is also on line {first[sample.id]}")
            if sample.answer in unreadable:
                bad[line].append(f"the judge cannot read the answer {sample.answer!r:.100}")
            if isinstance(size, str):
                bad[line].append(size)
                continue
            try:
                width, height = final_size(*size, *self.pixels)
                if (count := len(text_ids) - 1 + width * height // factor**2) > max_prompt_tokens:
                    bad[line].append(f"the prompt has {count} tokens, over {max_prompt_tokens=}: raise it, or lower "
                                     "max_pixels")
            except ValueError as e:
                bad[line].append(str(e))
        if bad:
            shown = [f"{path}:{line}: {'; '.join(what)}" for line, what in sorted(bad.items())]
            more = [f"... and {len(shown) - SHOWN} more"] * (len(shown) > SHOWN)
            title = f"{path}: {len(bad)} of {len(lines)} rows are bad, mend or remove them:"
            raise UserError("\n".join([title, *shown[:SHOWN], *more]))
        if not lines:
            raise UserError(f"{path}: the file has no rows")

    def __len__(self):
        return len(self.samples)

    def inputs(self, i):
        """Inputs of sample i. The image is read from disk each time: nothing is kept."""
        sample = self.samples[i]
        prompt, image = prompt_text(self.tokenizer, sample.question), read_image(sample.image, *self.pixels)
        features = self.image_processor(images=[image], do_resize=False, return_tensors="pt")
        grid = features["image_grid_thw"]
        pad = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        at, count = ids.index(pad), int(grid.prod()) // self.image_processor.merge_size**2
        return Inputs(prompt, image, ids[:at] + [pad] * count + ids[at + 1:], features["pixel_values"].float(), grid)


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
