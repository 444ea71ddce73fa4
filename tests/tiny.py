"""A tiny random Qwen2-VL, Qwen2.5-VL or Qwen3-VL with tokenizer and image processor, in the hub's format."""
import json
import pathlib

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedTokenizerFast
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data import special_token_ids

SPECIAL = [f"<|{name}|>" for name in ("endoftext", "im_start", "im_end", "vision_start", "vision_end",
                                      "vision_pad", "image_pad", "video_pad")]
CHAT_TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                 "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def make_tokenizer():
    """A byte-level tokenizer: 256 bytes and Qwen's special tokens, no merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(
        vocab_size=256 + len(SPECIAL), special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0],
                                   additional_special_tokens=SPECIAL, chat_template=CHAT_TEMPLATE)


def tiny_config(kind, tied, tokenizer, hidden):
    """The config for a tokenizer; vocab_size: one more than its own, 265, which neither 2 nor 3 divide."""
    eot, _, eos, start, end, _, image, video = tokenizer.convert_tokens_to_ids(SPECIAL)
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, hidden // 4 - 5])
    text = dict(vocab_size=len(tokenizer) + 1, hidden_size=hidden, intermediate_size=2 * hidden,
                num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, rope_parameters=rope,
                max_position_embeddings=8192, tie_word_embeddings=tied, bos_token_id=eot, eos_token_id=eos,
                pad_token_id=eot)
    vision = dict(depth=2, num_heads=2, patch_size=14, spatial_merge_size=2, temporal_patch_size=2)
    common = dict(image_token_id=image, video_token_id=video, vision_start_token_id=start,
                  vision_end_token_id=end, tie_word_embeddings=tied)
    if kind == "qwen2_5_vl":
        vision |= dict(hidden_size=32, intermediate_size=64, out_hidden_size=hidden)
        vision |= dict(window_size=56, fullatt_block_indexes=[1])
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **common)
    if kind == "qwen3_vl":  # heads of 32, whatever hidden is; to the third layer comes no deepstack feature
        text |= dict(head_dim=32, num_hidden_layers=3)
        text["rope_parameters"] = rope | dict(mrope_section=[6, 5, 5], mrope_interleaved=True)
        vision |= dict(hidden_size=32, intermediate_size=64, out_hidden_size=hidden, patch_size=16)
        vision |= dict(depth=3, deepstack_visual_indexes=[0, 2], num_position_embeddings=16)
        return Qwen3VLConfig(text_config=text, vision_config=vision, **common)
    vision |= dict(embed_dim=32, hidden_size=hidden, mlp_ratio=2)
    return Qwen2VLConfig(text_config=text, vision_config=vision, **common)


def flatten(path):
    """Writes a config.json as the hub's Qwen2-VL and Qwen2.5-VL have it: the text model's keys at the top."""
    config = json.loads(path.read_text(encoding="utf-8"))
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    del text["model_type"], text["layer_types"]
    path.write_text(json.dumps(text | config), encoding="utf-8")


def make_tiny(folder, kind, tied, hidden=32):
    """The folder's path as str; weights and biases normal with std 0.2 so that no distribution is flat."""
    folder, tokenizer = pathlib.Path(folder), make_tokenizer()
    config = tiny_config(kind, tied, tokenizer, hidden)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 or name.endswith("bias"):
                p.normal_(0, 0.2)
    eos, pad = config.text_config.eos_token_id, config.text_config.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=[eos, pad], pad_token_id=pad)
    model.save_pretrained(folder)
    if kind != "qwen3_vl":
        flatten(folder / "config.json")
    tokenizer.save_pretrained(folder)
    patch = config.vision_config.patch_size
    Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, temporal_patch_size=2, size=dict(
        shortest_edge=28 * 28, longest_edge=1280 * 28 * 28)).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def transformers_logprobs(hf, dataset, row, response, temperature=1.0):
    """(n, V) of n response tokens by transformers alone: its positions, its tower over pixels, no packing."""
    query = dataset.query(row)
    ids, pictures = torch.tensor([query.ids + response]), {}
    if query.images:
        pictures = dataset.image_processor(images=query.images, do_resize=False, return_tensors="pt")
    types = (ids == hf.config.image_token_id).int()
    logits = hf(input_ids=ids, mm_token_type_ids=types, **pictures).logits[0, len(query.ids) - 1:-1]
    logits[:, special_token_ids(dataset.tokenizer, "")[1]] = -torch.inf
    return (logits / temperature).log_softmax(-1)
