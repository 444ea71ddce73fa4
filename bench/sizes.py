"""A model folder with random weights, in the shape of a config's model but for some sizes.

    python -m bench.sizes FOLDER "vocab_size=4096 vision.depth=4" config/toy.py [--key=value ...]
"""
import shutil
import sys

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import train_rl
from configurator import UserError, configure
from model import local_folder


def make_model(source, folder, sizes, seed):
    """Writes folder: the source's tokenizer and processor, its config with the sizes, random weights. What
    follows from the sizes (mrope_section, head_dim, layer_types, the tower's output) is set here."""
    config = AutoConfig.from_pretrained(source)
    text, vision = config.text_config, config.vision_config
    for word in sizes.replace(",", " ").split():
        name, _, value = word.partition("=")
        part, name = (vision, name.removeprefix("vision.")) if name.startswith("vision.") else (text, name)
        if not hasattr(part, name) or not value.isdecimal():
            raise UserError(f"--sizes: {word!r} is no name=number of the model's config")
        setattr(part, name, int(value))
    text.head_dim = text.hidden_size // text.num_attention_heads
    frames = text.head_dim // 2 // 4
    rows = (text.head_dim // 2 - frames) // 2
    text.rope_parameters["mrope_section"] = [frames, rows, text.head_dim // 2 - frames - rows]
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    output = "out_hidden_size" if hasattr(vision, "out_hidden_size") else "hidden_size"
    setattr(vision, output, text.hidden_size)
    torch.manual_seed(seed)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    left_out = shutil.ignore_patterns("config.json", "*.safetensors*", "trainer", "adapter")
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=left_out)


if __name__ == "__main__":
    knobs = configure(vars(train_rl), sys.argv[3:])
    make_model(local_folder(knobs["model"]), sys.argv[1], sys.argv[2], knobs["seed"])
