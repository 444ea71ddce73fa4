"""What toy/base, the toy's base model, was made from: its stages' data, its tokenizer and its random weights.

    python -m toy.make_base     # data/toy_base: the jsonl of three stages, and init/, the random model

config/toy_base.py has the commands that train it. The base should have the skill and the wrong habit. Stage 1
learns to read and to calculate; stage 2 to solve step by step, and that a check finds slips; stage 3 mixes in
short answers without steps: true ones, but the model cannot do sums in its head, its own are mostly wrong.
"""
import os
import random
import shutil

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from toy.draw import (CONCLUSION, LETTERS, TRAIN_FAMILIES, calculate, comma_list, in_text, layout, picture,
                      problem, save_rows, solution, split_of, steps, write)

BASE = os.path.join(os.path.dirname(__file__), "base")  # config.json has the model's sizes
STAGES = {"base_1_read": 8192, "base_2_solve": 8192, "base_3_habit": 4096}  # rows
CHECKED, SLIPPED, IN_TEXT = 0.2, 0.1, 0.2  # shares of rows: with a check, a mended slip, numbers in the text
HABIT = {family: 0.4 if family == "segment" else 0.8 for family in TRAIN_FAMILIES}  # short answers in stage 3
FACTS = ([calculate(x, "+", y) for x in range(2, 28) for y in range(2, 10)]
         + [calculate(x, "-", y) for x in range(4, 28) for y in range(2, 10) if x - y > 1]
         + [calculate(x, "*", y) for x in range(4, 13) for y in range(2, 10)] * 3)  # harder, and fewer
INSTRUCTION = " Solve the problem step by step. Put the final answer in \\boxed{}."  # as in data.py
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
              r"\s*[\r\n]+|\s+(?!\S)|\s+")  # Qwen2's words; digits one by one


# ---- the stages' data
def drill_row(rng):
    """Five facts to compute; there is nothing to read in the picture."""
    facts = rng.sample(FACTS, 5)
    question = f"Compute {', '.join(f'{fact.x}{fact.op}{fact.y}' for fact in facts)}."
    return question, facts[-1].result, write(facts), "images/drill.png"


def read_row(rng):
    """Up to five numbers in any cells, to be read in order: reading that a new layout can use."""
    count = rng.randint(1, 5)
    numbers = [rng.randint(2, 9) if rng.random() < .8 else rng.randint(2, 27) for _ in range(count)]
    if split_of(numbers) != "train":
        return read_row(rng)
    lines, corners, cells, _ = layout("loose", len(numbers), rng)
    image = picture(lines, zip(rng.choice(LETTERS), corners), zip(map(str, numbers), cells))
    return "Read the numbers.", numbers[-1], f"I read {comma_list(numbers)}.", image


def checked_solution(family, numbers, slip=None):
    """The golden solution with a check before its end. slip = (which equation, error): one result is wrong,
    the later steps go on from it, and the check finds and mends it."""
    right = shown = steps(family, numbers)
    if slip:
        which, error = slip
        shown = right[:which] + [right[which]._replace(result=right[which].result + error)]
        for _, op, y, _ in right[which + 1:]:
            shown.append(calculate(shown[-1].result, op, y))
    verdict = "Wait, that was wrong." if slip else "It is correct."
    return (f"I read {comma_list(numbers)}. {write(shown)} Let me verify: {write(right)} {verdict} "
            f"{CONCLUSION.format(right[-1].result)}")


def solve_row(rng, habit=None):
    """A train problem with its solution: short with probability habit[family], else in steps."""
    family = rng.choice(TRAIN_FAMILIES)
    numbers, question, image = problem(family, "train", rng)
    answer = steps(family, numbers)[-1].result
    if rng.random() < IN_TEXT:
        question = in_text(question, numbers)
    if habit and rng.random() < habit[family]:
        return question, answer, CONCLUSION.format(answer), image
    kind = rng.random()
    if kind < SLIPPED:
        slip = rng.randrange(len(numbers) - 1), rng.choice([-2, -1, 1, 2])
        return question, answer, checked_solution(family, numbers, slip), image
    if kind < SLIPPED + CHECKED:
        return question, answer, checked_solution(family, numbers), image
    return question, answer, solution(family, numbers), image


def stage_rows(stage):
    """The rows of one stage, as save_rows takes them."""
    rng = random.Random(f"toy {stage}")
    if stage == "base_1_read":
        return [drill_row(rng) if i % 2 else read_row(rng) for i in range(STAGES[stage])]
    return [solve_row(rng, HABIT if stage == "base_3_habit" else None) for _ in range(STAGES[stage])]


# ---- the random model
def make_tokenizer():
    """A byte-level BPE tokenizer of Qwen's kind with 433 entries, trained on the toy's text."""
    rng, texts = random.Random("toy tokenizer"), ["<|im_start|>system user assistant\n"]
    for family in TRAIN_FAMILIES * 200:  # words that only test has fall into pieces
        numbers, question, _ = problem(family, "train", rng)
        texts += ["user\n", "assistant\n", "system\n", question + INSTRUCTION,
                  in_text(question, numbers) + INSTRUCTION,
                  checked_solution(family, numbers), checked_solution(family, numbers, slip=(0, 1))]
    texts += ["Read the numbers." + INSTRUCTION, "Compute 2+2, 3*3." + INSTRUCTION] * 200
    with open(f"{BASE}/chat_template.jinja", encoding="utf-8") as file:
        chat_template = file.read()  # Qwen's, without the default system message, a third of the prompt
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=440, min_frequency=50, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=8192,
        additional_special_tokens=[SPECIAL[1], *SPECIAL[3:]], chat_template=chat_template,
        clean_up_tokenization_spaces=False)


def make_model(folder):
    """Writes a model of random weights and its tokenizer; sizes and image processor are those of toy/base."""
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(BASE)).float()
    with torch.no_grad():  # the usual std of 0.02 never learned to read at this width
        for name, p in model.named_parameters():
            if p.ndim > 1:  # biases are 0 and norms 1 already
                p.normal_(0, 0.04 if "patch_embed" in name else 0.1 if "visual" in name else 0.08)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    for name in ("generation_config.json", "preprocessor_config.json"):
        shutil.copy(f"{BASE}/{name}", folder)


if __name__ == "__main__":
    os.makedirs("data/toy_base/images", exist_ok=True)
    # not blank: white is 0, and on a picture of zeros alone the norms of the tower make gradients of 1e8
    picture([((6, 6), (78, 78)), ((6, 78), (78, 6))], [], []).save("data/toy_base/images/drill.png")
    for stage in STAGES:
        save_rows("data/toy_base", stage, stage_rows(stage))
    make_model("data/toy_base/init")
