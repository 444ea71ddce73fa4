"""The toy: small geometry problems in the manner of Geometry3K, and a Qwen2.5-VL of about 1.1M parameters that learns them.

    python toy.py               # data/toy: train, val, test (vision-dominant) and text_* (text-dominant), drawn in seconds
    python toy.py base          # data/toy_base: the jsonl of the base's three stages, and init/, the random model before them

A picture is 84 x 84 pixels, 9 image tokens. The numbers stand in the picture and the text names the figure; in the text_*
files the same problems have the numbers in the question too. Nothing here needs a network.

What is new in each split. The numbers printed in a picture, sorted, are its tuple; a hash puts each tuple of three or more
into exactly one split, whatever the family. (11+5=16 is a fact, not a tuple: all facts are practised, since a model of 1.1M
parameters knows the sums that it was shown and no others.)
  train  six families; every stage of the base draws from these tuples too, the reading drills included
  val    the same families, layouts and wordings; the tuples were in no training of any kind
  test   out of distribution: new tuples in four families that no stage has shown. quadrilateral: a new figure, four numbers;
         closed: a triangle asked as a path; spokes: a new figure and a new question; vertical: a known question, standing up.
         (The train family loose has numbers in any cells, so the places of the numbers alone are not new.)
"""
import json
import os
import random
import shutil
import sys
import tempfile
import zlib

from PIL import Image, ImageDraw, ImageFont

SIDE = 84  # pixels
MIDDLES = (14, 42, 70)  # of the cells: patch 14 x merge 2 = 28, so that one image token sees a label whole
SIZES = {"train": 4096, "val": 240, "test": 240}
TRAIN_FAMILIES = ("triangle", "segment", "part", "area", "path", "loose")
TEST_FAMILIES = ("quadrilateral", "vertical", "spokes", "closed")
LETTERS = ("ABCDE", "PQRST", "KLMNO", "UVWXY")
SUFFIX = " Solve the problem step by step. Put the final answer in \\boxed{}."  # data.py's; here to train the tokenizer on it
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>")
CHAT_TEMPLATE = (  # Qwen's, without the default system message, which would be a third of the prompt
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
              r"\s+(?!\S)|\s+")  # Qwen2's words; digits one by one


# ---- problems: numbers, split, steps, solutions
def split_of(numbers):
    """'train', 'val' or 'test' (60, 20, 20%) by a hash of the sorted numbers; fewer than three are a fact, always 'train'."""
    if len(numbers) < 3:
        return "train"
    bucket = zlib.crc32(",".join(map(str, sorted(numbers))).encode()) % 10
    return "val" if bucket < 2 else "test" if bucket < 4 else "train"


def draw_numbers(family, rng):
    """The numbers of one problem in reading order: row by row, from left to right."""
    if family == "area":
        return [rng.randint(2, 9), rng.randint(2, 6), rng.randint(2, 6)]  # the height, the two parts of the base
    if family == "part":
        a, b, c = (rng.randint(2, 9) for _ in range(3))
        return [a + b + c, a, b]  # the whole, two of its three parts
    n = 4 if family in ("path", "quadrilateral") else rng.randint(3, 4) if family == "loose" else 3
    return [rng.randint(2, 9) for _ in range(n)]


def equation(x, op, y):
    return x, op, y, x + y if op == "+" else x - y if op == "-" else x * y


def steps(family, numbers):
    """[(x, operator, y, result)] from the numbers in reading order to the answer, the last result."""
    if family == "area":
        height, a, b = numbers
        return [equation(a, "+", b), equation(a + b, "*", height)]
    out = [equation(numbers[0], "-" if family == "part" else "+", numbers[1])]
    for y in numbers[2:]:
        out.append(equation(out[-1][3], out[0][1], y))
    return out


def write(equations):
    return " ".join(f"{x}{op}{y}={result}." for x, op, y, result in equations)


def guess(answer):
    return f"The answer is \\boxed{{{answer}}}."


def solution(family, numbers, check=False, slip=None):
    """The golden solution. check: it is verified; slip = (which equation, error): one result is wrong, noticed and mended."""
    right = shown = steps(family, numbers)
    if slip:
        which, error = slip
        x, op, y, result = right[which]
        shown = right[:which] + [(x, op, y, result + error)]
        for _, op, y, _ in right[which + 1:]:  # the later steps go on from the wrong result
            shown.append(equation(shown[-1][3], op, y))
    text = f"I read {', '.join(map(str, numbers))}. {write(shown)} "
    if check or slip:
        text += f"Let me verify: {write(right)} {'Wait, that was wrong.' if slip else 'It is correct.'} "
    return text + guess(right[-1][3])


# ---- pictures
def turn(point, times):
    """The point (x, y) after quarter turns about the middle of the picture."""
    for _ in range(times):
        point = (SIDE - point[1], point[0])
    return point


def layout(family, n, rng):
    """(lines, corners, cells, question) of a picture with n numbers. lines: pairs of points; corners: a point a letter;
    cells: a point a number, the middle of its cell, in reading order; question: {0}, {1} ... stand for the letters."""
    def row(y):  # a horizontal segment under row y
        return [(x, y + 11) for x in (6, 30, 54, 78)], [(x, y) for x in MIDDLES]
    turns, closed, lines = 0, family in ("triangle", "closed", "quadrilateral", "area"), []
    if family in ("triangle", "closed"):
        corners, cells = [(42, 6), (78, 78), (6, 78)], [(14, 42), (70, 42), (42, 70)]
        turns = rng.randrange(4)
        question = "Find the perimeter of triangle {0}{1}{2}."
        if family == "closed":
            question = "Find the length of path {0}{1}{2}{0}."
    elif family in ("segment", "vertical"):
        corners, cells = row(rng.choice(MIDDLES))
        turns, question = (1 if family == "vertical" else 0), "Find the length of {0}{3}."
    elif family == "path":
        if rng.random() < .5:
            corners, cells = [(6, 28), (28, 28), (56, 28), (78, 28), (78, 78)], [(14, 14), (42, 14), (70, 14), (70, 42)]
        else:
            corners, cells = [(6, 6), (6, 56), (28, 56), (56, 56), (78, 56)], [(14, 42), (14, 70), (42, 70), (70, 70)]
        turns, question = rng.choice([0, 2]), "Find the length of path {0}{1}{2}{3}{4}."
    elif family == "quadrilateral":
        corners, cells = [(6, 6), (78, 6), (78, 78), (6, 78)], [(42, 14), (14, 42), (70, 42), (42, 70)]
        question = "Find the length of path {0}{1}{2}{3}{0}."
    elif family == "spokes":
        corners, cells = [(42, 42), (28, 5), (79, 56), (5, 79)], [(42, 14), (14, 70), (70, 70)]
        turns, question = rng.randrange(4), "Find {0}{1}+{0}{2}+{0}{3}."
    elif family == "part":
        corners, cells = row(rng.choice(MIDDLES[1:]))
        missing = rng.choice([0, 2])
        cells = [(42, 14)] + [cell for i, cell in enumerate(cells) if i != missing]
        lines = [((6, 26), (78, 26)), ((6, 22), (6, 30)), ((78, 22), (78, 30))]
        question = "The whole is {0}{3}. Find {0}{1}." if missing == 0 else "The whole is {0}{3}. Find {2}{3}."
    elif family == "area":
        corners, cells = [(30, 6), (78, 6), (78, 56), (30, 56)], [(14, rng.choice(MIDDLES[:2])), (42, 70), (70, 70)]
        question = "Find the area of rectangle {0}{1}{2}{3}."
    elif family == "loose":  # numbers in any cells, stray lines
        corners = [(rng.randint(4, 79), rng.randint(4, 79)) for _ in range(rng.randint(2, 5))]
        cells, question = rng.sample([(x, y) for x in MIDDLES for y in MIDDLES], n), "Add the numbers."
    wobble = 1 if family in ("segment", "vertical", "part") else 3  # pixels; a straight line stays nearly straight
    corners = [tuple(min(max(v + rng.randint(-wobble, wobble), 3), SIDE - 4) for v in turn(p, turns)) for p in corners]
    cells = sorted((turn(p, turns) for p in cells), key=lambda p: (p[1], p[0]))
    ends = [corners[0]] * len(corners) if family == "spokes" else corners
    lines = list(zip(ends, corners[1:] + corners[:1] * closed)) + lines
    if family == "area":  # the line that divides the base
        middle = (corners[0][0] + corners[1][0]) // 2
        lines.append(((middle, corners[0][1]), (middle, corners[3][1])))
    return lines, corners, cells, question


def picture(lines, letters, labels):
    """An 84 x 84 RGB image. letters and labels: [(text, (x, y) of its middle)]; a label stands on white."""
    image = Image.new("L", (SIDE, SIDE), 255)
    draw = ImageDraw.Draw(image)
    for p, q in lines:
        draw.line([p, q], fill=170)
    for text, (x, y) in labels:
        draw.rectangle([x - 9, y - 7, x + 9, y + 7], fill=255)
        draw.text((x, y), text, fill=0, font=font(15), anchor="mm")
    for text, (x, y) in letters:
        x, y = (min(max(v, 5), SIDE - 6) for v in (x, y))
        draw.text((x, y), text, fill=120, font=font(10), anchor="mm")
    return image.convert("RGB")


FONTS = {}


def font(size):
    if size not in FONTS:
        FONTS[size] = ImageFont.load_default(size)  # embedded in Pillow: no font file to find
    return FONTS[size]


def problem(family, split, rng):
    """(numbers, question, image) of a new problem whose tuple belongs to the split."""
    numbers = draw_numbers(family, rng)
    while split_of(numbers) != split:
        numbers = draw_numbers(family, rng)
    letters = rng.choice(LETTERS)
    lines, corners, cells, question = layout(family, len(numbers), rng)
    image = picture(lines, list(zip(letters, corners)), [(str(n), cell) for n, cell in zip(numbers, cells)])
    return numbers, question.format(*letters), image


# ---- files
def in_text(question, numbers):
    """The text-dominant question: the numbers of the picture too."""
    return f"{question} The labels are {', '.join(map(str, numbers))}."


def save_rows(folder, name, rows):
    """Writes [(question, answer, solution, image)] as name.jsonl; an image is a PIL image or the name of a file."""
    os.makedirs(f"{folder}/images", exist_ok=True)
    with open(f"{folder}/{name}.jsonl", "w", encoding="utf-8") as f:
        for i, (question, answer, text, image) in enumerate(rows):
            if not isinstance(image, str):
                image.save(f"{folder}/images/{name}-{i:06d}.png")
                image = f"images/{name}-{i:06d}.png"
            f.write(json.dumps({"question": "<image>" + question, "answer": str(answer), "solution": text,
                                "id": f"toy-{name}-{i:06d}", "image": image}) + "\n")


def make_once(root, fill):
    """fill(folder) in a temporary folder, renamed to root when whole: safe in several processes."""
    if os.path.isdir(root):
        return
    parent = os.path.dirname(os.path.abspath(root))
    os.makedirs(parent, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=os.path.basename(root) + ".", dir=parent)
    try:
        os.chmod(folder, 0o755)  # mkdtemp's 0700 would shut other users out
        fill(folder)
        os.rename(folder, root)
    except OSError:
        if not os.path.isdir(root):  # else another process was first, with the same files
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_toy(root="data/toy"):
    """Draws train, val, test and text_train, text_val, text_test under root, if root is not there yet."""
    def fill(folder):
        for split, size in SIZES.items():
            families = TEST_FAMILIES if split == "test" else TRAIN_FAMILIES
            rng, rows, text_rows = random.Random(f"toy {split}"), [], []
            for i in range(size):
                family = families[i % len(families)]
                numbers, question, image = problem(family, split, rng)
                answer, text = steps(family, numbers)[-1][3], solution(family, numbers)
                rows.append((question, answer, text, image))
                text_rows.append((in_text(question, numbers), answer, text, f"images/{split}-{i:06d}.png"))
            save_rows(folder, split, rows)
            save_rows(folder, f"text_{split}", text_rows)
    make_once(root, fill)


# ---- the base: what train_sft.py learns it from, and the random model that it starts from
# The base should have the skill and the wrong habit. Stage 1 learns to read and to calculate; stage 2 to solve step by step,
# and that a check finds slips; stage 3 mixes in short answers without steps. They are all true, but the model cannot do
# the sum in its head, so that its own short answers are mostly wrong.
BASE_STAGES = {"base_1_read": 8192, "base_2_solve": 8192, "base_3_habit": 4096}
HABIT = {family: 0.4 if family == "segment" else 0.8 for family in TRAIN_FAMILIES}  # share of short answers in stage 3
FACTS = ([equation(x, "+", y) for x in range(2, 28) for y in range(2, 10)]
         + [equation(x, "-", y) for x in range(4, 28) for y in range(2, 10) if x - y > 1]
         + [equation(x, "*", y) for x in range(4, 13) for y in range(2, 10)] * 3)  # products are harder, and fewer


def drill_row(rng):
    """Five facts to compute; there is nothing to read in the picture."""
    facts = rng.sample(FACTS, 5)
    question = f"Compute {', '.join(f'{x}{op}{y}' for x, op, y, _ in facts)}."
    return question, facts[-1][3], write(facts), "images/drill.png"


def read_row(rng):
    """Up to five numbers in any cells, to be read in order: reading that a new layout can use."""
    numbers = [rng.randint(2, 9) if rng.random() < .8 else rng.randint(2, 27) for _ in range(rng.randint(1, 5))]
    if split_of(numbers) != "train":
        return read_row(rng)
    lines, corners, cells, _ = layout("loose", len(numbers), rng)
    labels = [(str(n), cell) for n, cell in zip(numbers, cells)]
    image = picture(lines, list(zip(rng.choice(LETTERS), corners)), labels)
    return "Read the numbers.", numbers[-1], f"I read {', '.join(map(str, numbers))}.", image


def solve_row(rng, habit=None, check=0.2, slip=0.1, text=0.2):
    """A train problem with its solution: short with probability habit[family], else steps, some of them checked, some with
    a slip that is mended; some have the numbers in the text."""
    family = rng.choice(TRAIN_FAMILIES)
    numbers, question, image = problem(family, "train", rng)
    equations = steps(family, numbers)
    if rng.random() < text:
        question = in_text(question, numbers)
    if habit and rng.random() < habit[family]:
        return question, equations[-1][3], guess(equations[-1][3]), image
    kind = rng.random()
    where = (rng.randrange(len(equations)), rng.choice([-2, -1, 1, 2])) if kind < slip else None
    return question, equations[-1][3], solution(family, numbers, kind < slip + check, where), image


def make_base_data(root="data/toy_base"):
    """Writes the stages' jsonl under root, if root is not there yet."""
    def fill(folder):
        os.makedirs(f"{folder}/images")
        # not blank: white is 0, and on a picture of zeros alone the norms of the tower make gradients of 1e8
        picture([((6, 6), (78, 78)), ((6, 78), (78, 6))], [], []).save(f"{folder}/images/drill.png")
        for name, size in BASE_STAGES.items():
            rng = random.Random(f"toy {name}")
            if name == "base_1_read":
                rows = [drill_row(rng) if i % 2 else read_row(rng) for i in range(size)]
            else:
                rows = [solve_row(rng, HABIT if name == "base_3_habit" else None) for _ in range(size)]
            save_rows(folder, name, rows)
    make_once(root, fill)


def toy_tokenizer():
    """A byte-level BPE tokenizer of Qwen's kind, with its special tokens and 433 entries, trained on the toy's text."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    rng, texts = random.Random("toy tokenizer"), ["<|im_start|>system user assistant\n"]
    for family in TRAIN_FAMILIES * 200:  # words that only test has fall into pieces
        numbers, question, _ = problem(family, "train", rng)
        texts += [question + SUFFIX, in_text(question, numbers) + SUFFIX, "user\n", "assistant\n", "system\n",
                  solution(family, numbers, check=True), solution(family, numbers, slip=(0, 1))]
    texts += ["Read the numbers." + SUFFIX, "Compute 2+2, 3*3." + SUFFIX] * 200
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=440, min_frequency=50, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=8192,
        additional_special_tokens=[SPECIAL[1], *SPECIAL[3:]], chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False)


def build_base_model(model_dir, seed=0):
    """Writes a random Qwen2.5-VL of about 1.1M parameters to model_dir, with tokenizer and image processor."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    tokenizer = toy_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=8192, tie_word_embeddings=True, rms_norm_eps=1e-6,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6]),
            bos_token_id=None, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"]),
        vision_config=dict(
            depth=2, hidden_size=64, intermediate_size=192, num_heads=4, out_hidden_size=128, patch_size=14,
            spatial_merge_size=2, temporal_patch_size=2, window_size=112, fullatt_block_indexes=[0, 1], hidden_act="silu"),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"], tie_word_embeddings=True,
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"])
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():  # the usual std of 0.02 never learned to read at this width
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                p.normal_(0, 0.04 if "patch_embed" in name else 0.1 if "visual" in name else 0.08)
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    processor = dict(image_processor_type="Qwen2VLImageProcessor", patch_size=14, temporal_patch_size=2, merge_size=2,
                     do_resize=True, do_rescale=True, rescale_factor=1 / 255, do_normalize=True, do_convert_rgb=True,
                     resample=3, image_mean=[1.0] * 3, image_std=[0.25] * 3,  # white becomes 0
                     size=dict(shortest_edge=3136, longest_edge=1003520))
    with open(f"{model_dir}/preprocessor_config.json", "w", encoding="utf-8") as f:
        json.dump(processor, f, indent=2)


if __name__ == "__main__":
    if sys.argv[1:] == ["base"]:
        make_base_data()
        build_base_model("data/toy_base/init")
    elif sys.argv[1:]:
        sys.exit(f"usage: python toy.py, or python toy.py base; got {' '.join(sys.argv[1:])}")
    else:
        make_toy()
