"""TRL's GRPOTrainer on the problems and with the knobs of train_rl.py; it leaves a metrics.jsonl as well.

    python -m bench.trl_side ROWS config/toy.py [--key=value ...]      # pip install -r bench/requirements.txt

ROWS: per_device_train_batch_size. It is given what ours is: model, tower frozen; dtype; prompts, and pictures
at their final size; judge and score; responses a step and updates; AdamW, clipping, KL term; the length of
responses. What differs: it wants 2 responses to a prompt at least, so with samples_per_query=1 it has half as
many prompts; it makes features of the picture of each response, in each forward; it samples from the trained
model, so it has no sync and one copy of the model less. time/trajectory_s is its log-probabilities and judge.
"""
import json
import os
import sys
import time
from types import SimpleNamespace

import datasets
import torch
import trl
from transformers import AutoProcessor, TrainerCallback

import train_rl
from configurator import UserError, configure
from data import INSTRUCTION, Dataset, load_processor, order
from model import compute_dtype, local_folder, peak_gb
from reward import format_reward, judge_batch, language_reward


def make_table(train, chosen):
    """The problems of those rows as TRL has them; a message's text stands behind the picture."""
    rows = [{"prompt": [{"role": "user", "content": sample.question.replace("<image>", "") + INSTRUCTION}],
             "image": train.query(i).images[0], "answer": sample.answer}
            for i, sample in ((i, train.samples[i]) for i in chosen)]
    return datasets.Dataset.from_list(rows)


def check_prompt(train, processor, chosen):
    """Asserts that the processor makes our ids of a problem with a picture."""
    i = next(i for i in chosen if train.samples[i].question.startswith("<image>"))
    theirs = processor(text=[train.prompt(i)], images=train.query(i).images, return_tensors="pt")
    assert theirs["input_ids"][0].tolist() == train.ids(i), "TRL's prompt is not ours"


def settings(c, rows, updates, generations, device):
    """The GRPOConfig of a run with the knobs c."""
    responses = c.batch_size * c.samples_per_query
    if c.minibatch_size % rows or rows % generations:
        raise UserError(f"--trl_rows: {rows} must divide minibatch_size={c.minibatch_size} and be a "
                        f"multiple of {generations}, the responses to a prompt")
    return trl.GRPOConfig(
        output_dir=c.out_dir, report_to="none", save_strategy="no", logging_steps=10**6, disable_tqdm=True,
        use_cpu=device.type == "cpu", seed=c.seed, shuffle_dataset=False, dataloader_pin_memory=False,
        max_steps=c.max_steps * updates, num_generations=generations, num_iterations=c.ppo_epochs,
        per_device_train_batch_size=rows, gradient_checkpointing=c.activation_checkpointing,
        bf16=compute_dtype(c.dtype, device) == torch.bfloat16,
        gradient_accumulation_steps=c.minibatch_size // rows, steps_per_generation=responses // rows,
        max_completion_length=c.max_new_tokens, temperature=c.temperature, beta=c.kl_loss_coeff,
        epsilon=c.clip_low, epsilon_high=c.clip_high, loss_type="grpo", learning_rate=c.learning_rate,
        lr_scheduler_type="constant", adam_beta1=c.adam_beta1, adam_beta2=c.adam_beta2,
        adam_epsilon=c.adam_eps, weight_decay=c.weight_decay, max_grad_norm=c.clip_grad_norm,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"})


class Clock(TrainerCallback):
    """Writes an object to metrics.jsonl after a step's last update. counts: its tokens, by the reward."""

    def __init__(self, path, updates, counts, device):
        self.file, self.updates, self.counts, self.device = open(path, "w"), updates, counts, device

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, name, inner):
        """inner, which adds its seconds to self.spent[name]."""
        def outer(*args):
            begin = self.now()
            made = inner(*args)
            self.spent[name] = self.spent.get(name, 0.0) + self.now() - begin
            return made
        return outer

    def on_train_begin(self, *_, **__):
        self.done, self.spent, self.begin = 0, {}, self.now()

    def on_step_end(self, *_, **__):
        self.done += 1
        if self.done % self.updates:
            return
        step, rollout, both = self.now() - self.begin, self.spent["rollout"], self.spent["rollout+trajectory"]
        row = {"step": self.done // self.updates, "time/rollout_s": rollout,
               "time/trajectory_s": both - rollout, "time/update_s": step - both, "time/sync_s": 0.0,
               "time/step_s": step, "memory/peak_gb": peak_gb(self.device), **self.counts}
        print(json.dumps(row), file=self.file, flush=True)
        self.spent, self.begin = {}, self.now()


def main(rows, c):
    """Trains for max_steps steps of batch_size / minibatch_size updates on one generation each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if c.train_vit or c.train_connector:
        raise UserError("--against=trl has a frozen tower: train_vit and train_connector must be False")
    folder, generations = local_folder(c.model), max(2, c.samples_per_query)
    responses = c.batch_size * c.samples_per_query
    updates = responses // c.minibatch_size * c.ppo_epochs
    tokenizer, image_processor = load_processor(folder)
    train = Dataset(c.train_data, tokenizer, image_processor, c.min_pixels, c.max_pixels, c.max_prompt_tokens)
    chosen = order(len(train), c.seed, 0)[:c.max_steps * responses // generations]
    processor = AutoProcessor.from_pretrained(folder, padding_side="left",
                                              chat_template=tokenizer.chat_template)
    processor.image_processor.size = {"shortest_edge": c.min_pixels, "longest_edge": c.max_pixels}
    check_prompt(train, processor, chosen)
    counts = {}

    def reward(completions, completion_ids, answer, **_):
        texts = [x[0]["content"] if isinstance(x, list) else x for x in completions]
        counts["tokens/response"] = sum(map(len, completion_ids))
        return [c.no_eos_score if c.no_eos_score and len(ids) >= c.max_new_tokens else
                verdict.correct + c.language_reward_coeff * language_reward(text)
                + c.format_reward_coeff * format_reward(text)
                for text, verdict, ids in zip(texts, judge_batch(list(zip(texts, answer))), completion_ids)]

    os.makedirs(c.out_dir, exist_ok=True)
    clock = Clock(f"{c.out_dir}/metrics.jsonl", updates, counts, device)
    trainer = trl.GRPOTrainer(folder, reward, settings(c, rows, updates, generations, device),
                              make_table(train, chosen), processing_class=processor, callbacks=[clock])
    trainer.model.model.visual.requires_grad_(False)  # the optimizer is made later, from what is trained
    for name, method in (("rollout", "_generate"), ("rollout+trajectory", "_generate_and_score_completions")):
        setattr(trainer, method, clock.timed(name, getattr(trainer, method)))
    trainer.train()


if __name__ == "__main__":
    main(int(sys.argv[1]), SimpleNamespace(**configure(vars(train_rl), sys.argv[2:])))
