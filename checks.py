"""The knobs of the two trainers that would go wrong, each refused in one line before anything slow."""
import os

from configurator import UserError, check_at_least


def check_trainer(config, script):
    """What both trainers need. script: its name and a config to start from, for the message."""
    for knob in ("model", "train_data"):
        if not config[knob]:
            raise UserError(f"command line: {knob} is empty; start from a config: python {script}")
    check_at_least(config, 1, "batch_size", "epochs", "max_new_tokens", "max_prompt_tokens", "max_tokens_per_microbatch")
    check_at_least(config, 0, "max_steps", "eval_every_epochs", "save_every_steps", "save_every_minutes",
                   "keep_checkpoints", "save_samples", "learning_rate", "max_skipped_updates", "clip_grad_norm")
    check_at_least(config, 0.01, "timeout_minutes")
    if not (config["train_llm"] or config["train_connector"] or config["train_vit"]):
        raise UserError("config: nothing to train; set train_llm, train_connector or train_vit to True")


def one_of(config, knob, *values):
    if config[knob] not in values:
        raise UserError(f"config: {knob} must be {' or '.join(map(repr, values))}, got {config[knob]!r}")


def check_rl(config):
    check_trainer(config, "train_rl.py config/toy.py")
    check_at_least(config, 1, "minibatch_size", "ppo_epochs", "tis_clip")
    check_at_least(config, 0.01, "temperature")
    check_at_least(config, 0, "clip_low", "clip_high", "gamma")
    one_of(config, "loss_agg", "seq_mean", "token_mean")
    one_of(config, "old_logprobs", "trainer", "engine")
    one_of(config, "rollout_ahead", 0, 1)
    if config["rollout_ahead"] and (config["rollout"] != "vllm" or config["old_logprobs"] != "trainer"):
        raise UserError("config: rollout_ahead=1 needs rollout='vllm', as the other engine samples in the process that "
                        "trains, and old_logprobs='trainer', since the engine's are of an older policy; pass --rollout=vllm "
                        "--old_logprobs=trainer")
    batch_size, minibatch_size = config["batch_size"], config["minibatch_size"]
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if batch_size % minibatch_size or minibatch_size % world_size:
        raise UserError("config: batch_size must be a multiple of minibatch_size, and that of the number of processes; "
                        f"got {batch_size=} {minibatch_size=} {world_size=}")


def check_sft(config):
    check_trainer(config, "train_sft.py config/toy_sft.py")
    check_at_least(config, 1, "log_every")
    batch_size, world_size = config["batch_size"], int(os.environ.get("WORLD_SIZE", 1))
    if batch_size % world_size:
        raise UserError(f"config: batch_size must be a multiple of the number of processes, got {batch_size=} {world_size=}")
