"""train_rl.py as it stands, with another forward in the place of model.py's.

    python -m bench.ways padded config/toy.py ...     # rows of one length, padded on the right
    python -m bench.ways plain config/toy.py ...      # the textbook's way

plain: transformers' own model, whole on its device, as policy and as reference; the tower in every forward,
over each row's pixels; micro-batches of as many rows as max_tokens_per_microbatch allows at their padded
width; all logits, and log_softmax of them. What is around it, objective and AdamW included, is train_rl.py's,
so all sides draw the same responses and must come to the same metrics.
"""
import runpy
import sys

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText

import model


def padded(sequences, device):
    """ids (B, L), positions (3, B, L), and masks (B, L) of B Sequence: real, on tokens that are no padding;
    in_query; and before, on tokens whose state predicts a response's token."""
    ids = pad_sequence([s.ids for s in sequences], batch_first=True)
    positions = pad_sequence([s.positions.T for s in sequences], batch_first=True).permute(2, 0, 1)
    column = torch.arange(ids.shape[1])
    begins = torch.tensor([[s.query_length] for s in sequences])
    ends = torch.tensor([[len(s.ids)] for s in sequences])
    masks = column < ends, column < begins, (column >= begins - 1) & (column < ends - 1)
    return [x.to(device) for x in (ids, positions, *masks)]


def in_rows(sequences, *values):
    """(B, R) of each of values (N,), which stand row after row for the response tokens; 0 on padding."""
    mask = model.mask_responses(sequences).to(values[0].device)
    return [torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, value) for value in values]


# ------------------------------------------------------------------------------------------------------------
# our own forward, but padded

def padded_forward(policy, sequences, temperature):
    """What Policy.forward returns. Attention is model.packed_attention's, of rows that hold one sequence of
    all their length: causal, so it needs no mask, since what counts in a row is before its padding."""
    text = policy.language_model
    head = text.embed_tokens if policy.lm_head is None else policy.lm_head
    ids, positions, _, in_query, before = padded(sequences, head.weight.device)
    embeds, slots = text.embed_tokens(ids), (ids == policy.image_token_id) & in_query
    embeds, deepstack = policy.embed_pictures(embeds, slots, sequences)
    extra = dict(visual_pos_masks=slots, deepstack_visual_embeds=deepstack) if deepstack else {}
    hidden = text(inputs_embeds=embeds, position_ids=positions, use_cache=False, lengths=[ids.shape[1]],
                  **extra).last_hidden_state
    targets, banned_ids = ids.roll(-1, 1)[before], policy.banned_ids.to(ids.device)
    return in_rows(sequences, *model.chunked_logprobs(hidden[before], head.weight, targets, temperature,
                                                      banned_ids))


# ------------------------------------------------------------------------------------------------------------
# the textbook's way

class PlainPolicy(model.Policy):
    """A transformers model as it comes. dtype: of its compute, by autocast where the weights are float32."""

    def __init__(self, hf, banned_ids, dtype):
        super().__init__(hf, banned_ids, with_visual=True)
        self.whole, self.dtype = [hf], dtype  # in a list: its parameters are registered already

    def reshard(self):
        """Nothing is sharded."""

    def forward(self, sequences, temperature):
        ids, positions, real, _, before = padded(sequences, self.banned_ids.device)
        pixels = [picture for s in sequences for picture in s.pixels]
        pictures = {} if not pixels else dict(
            pixel_values=torch.cat(pixels).to(ids.device),
            image_grid_thw=torch.cat([s.grids for s in sequences]).to(ids.device))
        with torch.autocast(ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.whole[0](input_ids=ids, attention_mask=real.long(), position_ids=positions,
                                   use_cache=False, **pictures).logits
        logits = logits.float() / temperature  # (B, L, V)
        logits = logits.index_fill(-1, self.banned_ids, torch.finfo(torch.float32).min)
        logprobs = logits.log_softmax(-1)
        entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(-1)
        logprobs = logprobs.gather(-1, ids.roll(-1, 1)[..., None])[..., 0]
        return in_rows(sequences, logprobs[before], entropy[before])


def plain_load_policy(folder, world, dtype, banned_ids, train_llm=True, train_connector=False,
                      train_vit=False, master=True, activation_checkpointing=False, lora_rank=0,
                      lora_alpha=0):
    """(policy, None), as model.load_policy has it: None, so that every forward is given pixels."""
    assert not lora_rank, "the plain way has no LoRA"
    hf = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32 if master else dtype,
                                                     attn_implementation="sdpa")
    policy = PlainPolicy(hf, banned_ids, dtype).to(world.device)
    policy.banned_ids = policy.banned_ids.to(world.device)
    model.set_trained(policy, policy.visual, train_llm, train_connector, train_vit)
    if not master:
        return policy.eval().requires_grad_(False), None
    policy.train()
    if activation_checkpointing:
        policy.language_model.gradient_checkpointing_enable(dict(use_reentrant=False))
    return policy, None


def padded_microbatches(sequences, rows, max_tokens):
    """rows as lists of at most max_tokens tokens, padding among them."""
    longest = max(len(sequences[row].ids) for row in rows)
    return [[rows[i] for i in batch] for batch in model.cut([longest] * len(rows), max_tokens)]


if __name__ == "__main__":
    way, sys.argv = sys.argv[1], ["train_rl.py", *sys.argv[2:]]
    if way == "padded":
        model.Policy.forward = padded_forward
    else:
        model.load_policy, model.microbatches = plain_load_policy, padded_microbatches
        torch.Tensor.full_tensor = lambda tensor: tensor  # what a DTensor is asked for
    runpy.run_path("train_rl.py", run_name="__main__")
