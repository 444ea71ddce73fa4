"""A row of a jsonl -> token ids and pictures: what trainer, engine and tower are fed with.

    {"question": "<image>Find x.", "answer": "5", "id": "geo-1", "image": "images/1.png", "solution": "..."}

A row has `image` (a path below the jsonl's folder), or `images` (a list of them), or neither, and as many
<image> in its question; only SFT needs `solution`. Every row is checked before a model is loaded, and all bad
ones are named at once. A prompt is never cut: to cut a picture's tokens is the commonest way to lose a run. A
picture is resized once, here, to a size that neither image processor nor vLLM changes: all see the same.
"""
import concurrent.futures
import hashlib
import json
import os
import pathlib
import random
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from transformers import AutoTokenizer
# the PIL one by name: it needs no torchvision, and gives the same pixels where there is one
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from configurator import UserError
from reward import readable_batch

INSTRUCTION = " Solve the problem step by step. Put the final answer in \\boxed{}."
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
KINDS = {"id": (str, int), "question": str, "answer": (str, int, float), "solution": str, "image": str,
         "images": list}  # key of a row -> what its value may be
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # no EPS and the like: Pillow starts other programs for those
SHOWN = 20  # bad rows named in one message
Image.MAX_IMAGE_PIXELS = 50_000_000  # Pillow unpacks no picture of more than twice that


class Sample(NamedTuple):
    id: str
    question: str  # with one <image> for each picture
    answer: str
    solution: str  # '' when the row has none
    images: tuple  # of paths, absolute or relative to the working directory

    def fields(self):
        """What the rows that a run writes say of it; image (the first, or null) is for other programs."""
        return {"id": self.id, "image": self.images[0] if self.images else None, "images": self.images,
                "question": self.question, "answer": self.answer}


class Query(NamedTuple):
    ids: list  # of int, each picture's one placeholder expanded to its tokens
    positions: torch.Tensor  # (3, Q) int64, M-RoPE: frame, row, column
    grids: torch.Tensor  # (pictures, 3) int64: frames, rows and columns of patches
    images: list  # of PIL.Image, RGB, at their final size; [] once there are pixels
    pixels: list  # of (patches, patch dimension) float32: made by model.encode; [] once there are features
    features: list  # of (tokens, n H), one a picture: made by model.encode; [] before


class Sampling(NamedTuple):
    temperature: float
    top_p: float
    max_new_tokens: int


class Completion(NamedTuple):
    token_ids: list  # of int; the EOS that ended it included
    logprobs: list  # of float, one a token: log_softmax(logits / temperature), banned ids at -inf
    finish_reason: str  # 'stop': an EOS was sampled; 'length': there was no room for more


def request_seed(seed, step, sample_id, k) -> int:
    """63 bits, a function of the arguments only: for the k-th response to one sample at one step of a run."""
    digest = hashlib.sha256(f"{seed} {step} {k} {sample_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def order(n, seed, epoch) -> list:
    """The order of n samples in an epoch: a permutation of range(n), a pure function of the arguments."""
    indices = list(range(n))
    random.Random(f"order {seed} {epoch}").shuffle(indices)  # sha512 of the str: the same everywhere
    return indices


def step_requests(step, train, seed, batch_size, samples_per_query, world):
    """(rows, seeds): indices into train of this rank's responses, samples_per_query in a row of one query,
    and the seed of each. Query p of the step is of rank p % world_size: so the k-th minibatches of all ranks
    together are a block of the step, the same for any number of ranks."""
    steps_per_epoch = len(train) // batch_size
    epoch, batch = divmod(step - 1, steps_per_epoch)
    queries = order(len(train), seed, epoch)[batch * batch_size:(batch + 1) * batch_size]
    rows = [row for row in queries[world.rank::world.world_size] for _ in range(samples_per_query)]
    return rows, [request_seed(seed, step, train.samples[row].id, k % samples_per_query)
                  for k, row in enumerate(rows)]


# ---- text and token ids
def load_processor(model_dir):
    """(tokenizer, image processor) of a checkpoint folder or hub name; UserError where it has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(model_dir)
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{model_dir}: no tokenizer and image processor of a Qwen2-VL, Qwen2.5-VL "
                        f"or Qwen3-VL (instruct) there ({' '.join(str(e).split())[:200]})") from e
    return tokenizer, image_processor


def prompt_text(tokenizer, question) -> str:
    """The chat-formatted prompt, one <|image_pad|> for each <image>. RL, SFT and evaluation all use this."""
    content = question.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>") + INSTRUCTION
    return tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                         add_generation_prompt=True)


def special_token_ids(tokenizer, model_dir):
    """(ids that end a response, ids that none may hold). The former: the tokenizer's EOS and the model's
    generation_config.json's (Qwen's chat models: two). The latter: the vision tokens, since a sampled
    <|image_pad|> would be a picture to every later forward."""
    vocabulary = tokenizer.get_vocab()
    banned = sorted(vocabulary[token] for token in VISION_TOKENS if token in vocabulary)
    ids, path = {tokenizer.eos_token_id}, pathlib.Path(model_dir) / "generation_config.json"
    if path.exists():
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        ids |= set(eos) if isinstance(eos, list) else {eos}
    return sorted(ids - {None}), banned


def mrope_positions(ids, grids, image_token_id, merge_size):
    """(3, Q) int64: frame, row, column of each token, as transformers' get_rope_index has them: text counts
    on in all three; a picture's tokens count from where it stands, text after it from behind its longer side.
    ids: Q ints, placeholders expanded; grids: (pictures, 3) patches, merge_size of them a side of a token."""
    parts, at, start = [], 0, 0  # at: tokens that are placed; start: position of the next
    for frames, rows, columns in (grids // torch.tensor([1, merge_size, merge_size])).tolist():
        text = ids.index(image_token_id, at) - at  # tokens before this picture
        parts.append(torch.arange(start, start + text).expand(3, -1))
        start += text
        places = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns))
        parts.append(start + places.T)
        at += text + len(places)
        start += max(rows, columns)
    return torch.cat([*parts, torch.arange(start, start + len(ids) - at).expand(3, -1)], 1)


# ---- pictures
def open_readers():
    """A pool of threads that read pictures: decoding and resizing release Python's lock."""
    return concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1), "reader")


def final_size(width, height, factor, min_pixels, max_pixels):
    """(width, height) of like shape, multiples of factor: Qwen2-VL's arithmetic until it changes nothing, as
    once can leave a thin picture at a size that would be changed again. ValueError where there is none."""
    size = (height, width)
    for _ in range(16):
        last, size = size, smart_resize(*size, factor, min_pixels, max_pixels)
        if size == last:
            return size[::-1]
    raise ValueError(f"{width}x{height} fits no size between {min_pixels=} and {max_pixels=}")


def read_image(path, factor, min_pixels, max_pixels):
    """The picture at path: PIL.Image, RGB, upright, on white where it is transparent, at its final size."""
    with Image.open(path, formats=FORMATS) as file:
        image = ImageOps.exif_transpose(file)  # decodes, also where there is nothing to turn
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip at 255, and show white
        image = image.convert("I").point(lambda v: v * (1 / 257)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    size = final_size(*image.size, factor, min_pixels, max_pixels)
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def check_image(path, *pixels):
    """The final (width, height) of a picture, read as it will be; or a str that says what is wrong."""
    try:
        return read_image(path, *pixels).size
    except Exception as e:  # a decoder can raise anything on a broken file; the row is reported
        return f"image {path}: {' '.join(str(e).split()) or type(e).__name__}"


# ---- rows
def ensure(path):
    """Draws the toy if path lies in data/toy and is missing; UserError for any other file that is missing."""
    folder = os.path.dirname(os.path.normpath(path))
    if not os.path.exists(path) and folder.split(os.sep)[-2:] == ["data", "toy"]:
        import toy.draw  # here: only the toy needs it
        toy.draw.make_toy(folder)
    if not os.path.isfile(path):
        name = {"geometry3k": "geo3k", "mm_math5k": "mm_math"}.get(os.path.basename(folder))
        what_to_do = f"`python fetch.py {name}` makes it" if name else "give the path of a jsonl file"
        raise UserError(f"{path}: no such file; {what_to_do}")


def parse_row(line, folder, special, need_solution):
    """The Sample of one line (bytes); ValueError says what is wrong. special: tokens that no text may hold.
    A path may not climb out of the folder. Links are followed: the hub's cache is made of them."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object but a {type(row).__name__}")
    row = {key: row[key] for key in KINDS if row.get(key) is not None and row[key] == row[key]}  # no NaN
    needed = ["id", "question", "answer"] + ["solution"] * need_solution
    wrong = [f"no {key}" for key in needed if not str(row.get(key, "")).strip()]
    wrong += [f"{key} is a {type(value).__name__}" for key, value in row.items()
              if not isinstance(value, KINDS[key]) or isinstance(value, bool)]
    if wrong:
        raise ValueError("; ".join(wrong))
    images = row.get("images", [row["image"]] if "image" in row else [])
    if not all(isinstance(path, str) for path in images) or "image" in row and images[:1] != [row["image"]]:
        raise ValueError("images must be a list of paths, the first one that of image")
    if found := [path for path in images if os.path.isabs(path) or os.pardir in pathlib.Path(path).parts]:
        raise ValueError(f"path {found[0]!r:.100} leaves the folder of its file")
    if (found := row["question"].count("<image>")) != len(images):
        raise ValueError(f"the question has {found} <image> for {len(images)} pictures")
    text = row["question"] + row.get("solution", "") * need_solution
    text.encode()  # half of a surrogate pair, which no tokenizer takes: a UnicodeEncodeError is a ValueError
    if found := [token for token in special if token in text]:
        raise ValueError(f"special tokens in the text: {' '.join(found)}")
    return Sample(str(row["id"]), row["question"], str(row["answer"]).strip(), row.get("solution", ""),
                  tuple(os.path.join(folder, path) for path in images))


class Dataset:
    """The samples of a jsonl file, all checked; query(i) makes one of them into what the policy takes.
    UserError names every bad row as file:line: what."""
    def __init__(self, path, tokenizer, image_processor, min_pixels, max_pixels, max_prompt_tokens,
                 need_solution=False):
        self.path, self.tokenizer, self.image_processor = path, tokenizer, image_processor
        self.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        factor = image_processor.patch_size * image_processor.merge_size  # pixels on a side of an image token
        self.pixels = (factor, min_pixels, max_pixels)
        low, high = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
        if not max(low, factor**2) <= min_pixels <= max_pixels <= high:
            raise UserError(f"{min_pixels=} {max_pixels=}: must be in order and within the model's own "
                            f"{max(low, factor**2)}..{high}, or the engine would resize again")
        ensure(path)
        special = sorted(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        samples, bad = {}, {}  # by line number: Sample, and what is wrong
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if line.strip():
                        samples[number] = parse_row(line, os.path.dirname(path), special, need_solution)
                except (ValueError, RecursionError) as e:
                    bad[number] = str(e)
        if not samples and not bad:
            raise UserError(f"{path}: the file has no rows")
        self.samples = list(samples.values())
        prompts = [self.prompt(i) for i in range(len(self))]
        self._text_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"] if prompts else []
        paths = sorted({path for sample in self.samples for path in sample.images})
        with open_readers() as pool:
            self._sizes = dict(zip(paths, pool.map(lambda path: check_image(path, *self.pixels), paths)))
        # a gold answer that the judge cannot read back as itself would score every response 0
        readable = readable_batch([sample.answer for sample in self.samples])
        for i, (number, sample) in enumerate(samples.items()):
            wrong = [self._sizes[path] for path in sample.images if isinstance(self._sizes[path], str)]
            if not readable[i]:
                wrong.append(f"the judge cannot read the answer {sample.answer!r:.100}")
            if not wrong and (n := len(self.ids(i))) > max_prompt_tokens:
                wrong.append(f"prompt of {n} tokens, over {max_prompt_tokens=}: raise it or lower max_pixels")
            if wrong:
                bad[number] = "; ".join(wrong)
        if bad:
            shown = [f"{path}:{number}: {what}" for number, what in sorted(bad.items())[:SHOWN]]
            more = [f"... and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
            title = f"{path}: {len(bad)} of {len(samples | bad)} rows are bad:"
            raise UserError("\n".join([title, *shown, *more]))

    def __len__(self):
        return len(self.samples)

    def prompt(self, i) -> str:
        """The prompt of sample i, one placeholder a picture: what vLLM gets, which expands it itself."""
        return prompt_text(self.tokenizer, self.samples[i].question)

    def grids(self, i):
        """(pictures, 3) int64: frames, rows and columns of patches of sample i's pictures; opens none."""
        patch, sizes = self.image_processor.patch_size, [self._sizes[path] for path in self.samples[i].images]
        return torch.tensor([[1, h // patch, w // patch] for w, h in sizes], dtype=torch.int64).view(-1, 3)

    def ids(self, i) -> list:
        """Token ids of sample i's prompt, each placeholder as often as its picture has tokens."""
        counts = (self.grids(i).prod(1) // self.image_processor.merge_size**2).tolist()
        ids = []
        for token in self._text_ids[i]:
            ids += [token] * (counts.pop(0) if token == self.image_token_id else 1)
        return ids

    def query(self, i) -> Query:
        """The Query of sample i, its pictures read from disk, features still []."""
        ids, grids = self.ids(i), self.grids(i)
        positions = mrope_positions(ids, grids, self.image_token_id, self.image_processor.merge_size)
        images = [read_image(path, *self.pixels) for path in self.samples[i].images]
        return Query(ids, positions, grids, images, pixels=[], features=[])


def open_datasets(paths, tokenizer, image_processor, min_pixels, max_pixels, max_prompt_tokens,
                  need_solution=False):
    """(the Dataset of train, {split: those of the others}) of paths, {split: path, or '' for none}. Warns of
    problems and pictures (by their bytes) of the others that are in train too. need_solution: of train."""
    datasets, problems = {}, {}
    for split, path in paths.items():
        if path:
            datasets[split] = Dataset(path, tokenizer, image_processor, min_pixels, max_pixels,
                                      max_prompt_tokens, need_solution and split == "train")
            problems[split] = [(row.question, *(hashlib.sha256(pathlib.Path(file).read_bytes()).digest()
                                                for file in row.images)) for row in datasets[split].samples]
    train = set(problems.pop("train"))  # (question, digest of each picture) of each sample
    pictures = {picture for _, *images in train for picture in images}
    for split, others in problems.items():
        same = sum(problem in train for problem in others)
        seen = sum(not pictures.isdisjoint(images) for _, *images in others)
        if (same or seen) and os.environ.get("RANK", "0") == "0":
            print(f"warning: of {len(others)} problems of {split}, {same} are in train too (question and "
                  f"pictures), and {seen} have a picture of train")
    return datasets.pop("train"), datasets
