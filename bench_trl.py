"""The side of bench.py that is TRL's GRPOTrainer, timed by a callback. pip install -r requirements-bench.txt

What it is given as ours: the model folder, with the tower frozen; float32 or bfloat16; prompts, and images at their final
size; our judge and score; responses a step and updates; AdamW, clipping, KL term; the length of responses; whether language
layers are recomputed in backward. What differs: it wants 2 responses to a prompt at least, so it has half as many prompts;
it makes features of the image of each response, in each forward; it samples from the trained model, so there is no weight
sync and one copy of the model less. Each of trl_rows is run, and the fastest counts. 'default' among them leaves to TRL's own
defaults how it computes: 8 rows a batch, autocast to bfloat16, language layers recomputed in backward.
"""
import os

import datasets
import torch
import trl
from transformers import AutoProcessor, TrainerCallback

from bench_sides import Meter, now, open_data, report, rewards_of, turns
from configurator import UserError, version
from data import INSTRUCTION, order
from model import compute_dtype, local_folder


def trl_steps(c, rows, fixed_length, total_steps):
    """TRL's GRPOTrainer: a turn is batch_size / minibatch_size optimizer steps on one generation of batch_size responses."""
    folder, updates = local_folder(c.model), c.batch_size // c.minibatch_size * c.ppo_epochs
    tokenizer, train, _ = open_data(c, folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    how = dict(per_device_train_batch_size=rows, bf16=compute_dtype(c.dtype, device) == torch.bfloat16,
               gradient_checkpointing=c.activation_checkpointing)
    if not rows:
        how, rows = {}, trl.GRPOConfig.per_device_train_batch_size
        if c.minibatch_size % rows:
            raise UserError(f"trl_rows: 'default' is {rows} rows, which do not divide minibatch_size={c.minibatch_size}")
    chosen = order(len(train), c.seed, 0)[:max(c.batch_size // 2, min(len(train), total_steps * c.batch_size // 2))]
    inputs = [train.inputs(i)._replace(pixel_values=None) for i in chosen]
    table = datasets.Dataset.from_list([
        {"prompt": [{"role": "user", "content": train.samples[i].question.replace("<image>", "") + INSTRUCTION}],
         "image": x.image, "answer": train.samples[i].answer} for i, x in zip(chosen, inputs)],
        features=datasets.Features({"prompt": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
                                    "image": datasets.Image(), "answer": datasets.Value("string")}))
    processor = AutoProcessor.from_pretrained(folder, padding_side="left", chat_template=tokenizer.chat_template)
    processor.image_processor.size = {"shortest_edge": c.min_pixels, "longest_edge": c.max_pixels}
    where = next(i for i, k in enumerate(chosen) if train.samples[k].question.startswith("<image>"))
    theirs = processor(text=[inputs[where].prompt], images=[inputs[where].image], return_tensors="pt")
    assert theirs["input_ids"][0].tolist() == inputs[where].query_ids, "TRL's prompt is not ours"
    del inputs, theirs  # what only this check needs shall not count as TRL's memory
    counts = {}

    def reward(completions, completion_ids, answer, **_):
        responses = [x[0]["content"] if isinstance(x, list) else x for x in completions]
        counts.update(tokens=sum(map(len, completion_ids)), longest=max(map(len, completion_ids)))
        return rewards_of(c, responses, answer, [len(ids) < c.max_new_tokens for ids in completion_ids])

    settings = trl.GRPOConfig(
        output_dir=c.out_dir, report_to="none", save_strategy="no", logging_steps=10**6, disable_tqdm=True,
        use_cpu=device.type == "cpu", seed=c.seed, shuffle_dataset=False,
        max_steps=total_steps * updates, num_generations=2,
        gradient_accumulation_steps=c.minibatch_size // rows,
        steps_per_generation=c.batch_size // rows, num_iterations=c.ppo_epochs, max_completion_length=c.max_new_tokens,
        generation_kwargs={"min_new_tokens": c.max_new_tokens} if fixed_length else None, temperature=c.temperature,
        beta=c.kl_loss_coeff, epsilon=c.clip_low, epsilon_high=c.clip_high, loss_type="grpo", learning_rate=c.learning_rate,
        lr_scheduler_type="constant", adam_beta1=c.adam_beta1, adam_beta2=c.adam_beta2, adam_epsilon=c.adam_eps,
        weight_decay=c.weight_decay, max_grad_norm=c.clip_grad_norm, **how,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"}, dataloader_pin_memory=False)

    class Turns(TrainerCallback):
        """Waits for a turn before the first of a step's updates, reports after the last."""

        def on_train_begin(self, *_, **__):
            self.turns, self.updates = turns({"versions": {p: version(p) for p in ("torch", "transformers", "trl")}}), 0
            self.begin()

        def begin(self):
            if next(self.turns, None) is None:
                os._exit(0)  # the parent is done: trainers have no other way out of here
            self.meter, self.spent = Meter(device), {}
            self.meter.reset()
            self.t = now()

        def timed(self, name, inner):
            def outer(*args):
                begin = now()
                made = inner(*args)
                self.spent[name] = self.spent.get(name, 0) + now() - begin
                return made
            return outer

        def on_step_end(self, *_, **__):
            self.updates += 1
            if self.updates % updates == 0:
                peak, whole = self.meter.peak(), now() - self.t
                made = self.spent["generate_and_score"]
                parts = {"rollout": self.spent["rollout"], "reward": self.spent["reward"],
                         "logprobs": made - self.spent["rollout"] - self.spent["reward"], "update": whole - made}
                report({"parts": {name: {"s": s, "cpu_s": cpu, "peak_gb": peak} for name, (s, cpu) in
                                  ((name, times.tolist()) for name, times in parts.items())},
                        "response_tokens": counts["tokens"], "longest": counts["longest"]})
                self.begin()

    clock = Turns()
    trainer = trl.GRPOTrainer(folder, reward, settings, table, processing_class=processor, callbacks=[clock])
    trainer.model.model.visual.requires_grad_(False)  # as ours; the optimizer is made later, from what is trained
    for name, method in (("rollout", "_generate"), ("reward", "_calculate_rewards"),
                         ("generate_and_score", "_generate_and_score_completions")):
        setattr(trainer, method, clock.timed(name, getattr(trainer, method)))
    trainer.train()
