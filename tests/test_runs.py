"""The promises, by whole runs of the scripts on a tiny model, two processes at a time."""
import json
import math
import os
import random
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import distributed
import model
import reflection
from checkpoint import load_trainer
from configurator import UserError
from conftest import ROOT
from data import Sampling, special_token_ids, step_requests
from evaluate import evaluate
from test_evaluate import read
from test_rollout import open_hf
from tiny import transformers_logprobs

KILLS = int(os.environ.get("NANOMAYE_KILLS", 1))  # of the run that is killed at random moments
# keys in the first cells of the README's tables: what metrics.jsonl holds is what is defined there
CELLS = re.findall(r"^\| (`.*?`) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
METRICS = {key for cell in CELLS for key in re.findall(r"`([\w/]+)`", cell)}
METRICS |= {f"reflection_words/{word}" for word in reflection.WORDS}
EVAL = """step epoch split setting k temperature top_p accuracy n samples_per_problem ci95 response_length
    clip_ratio""".split()
SAMPLES = "step split id image question answer response correct rewards length finish_reason".split()


def command(script, *files, ranks=1, hook="", nodes=(), **knobs):
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"] * (ranks > 1 or bool(nodes))
    launcher += ["--nnodes=2", "--master_addr=127.0.0.1", *nodes] if nodes else ["--standalone"] * (ranks > 1)
    flags = [f"--{name}={value}" for name, value in knobs.items()]
    script = ["tests/patched_run.py", script] if hook else [ROOT / script]
    return [sys.executable, *launcher, *map(str, script), *map(str, files), *flags]


def launch(*words, hook="", status=0, **knobs):
    done = subprocess.run(command(*words, hook=hook, **knobs), cwd=ROOT, capture_output=True, text=True,
                          timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1", "NANOMAYE_HOOK": hook})
    assert done.returncode == status, (done.returncode, done.stdout[-2000:], done.stderr[-4000:])
    return done


def agents(base, ranks, *words, **knobs):
    """torchrun on two nodes, which share no disk: each runs in a folder of its own, where its out_dir is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port, started = probe.getsockname()[1], []
    for node in (0, 1):
        (base / f"node{node}").mkdir(parents=True, exist_ok=True)
        argv = command(*words, ranks=ranks, nodes=(f"--node_rank={node}", f"--master_port={port}"), **knobs)
        with open(base / f"node{node}.log", "w") as log:
            started.append(subprocess.Popen(argv, cwd=base / f"node{node}", stdout=log, stderr=log,
                                            env=os.environ | {"OMP_NUM_THREADS": "1"}))
    return started


def logged(out_dir, name="metrics"):
    """The rows of a log, times and memory aside."""
    return [{key: value for key, value in row.items() if not key.startswith(("time/", "memory/"))}
            for row in read(out_dir / f"{name}.jsonl")]


def same(ours, theirs):
    """The logs and the last weights are equal, bit for bit, times and memory aside."""
    assert logged(ours) == logged(theirs)
    for name in ("eval.jsonl", "samples.jsonl", "checkpoints/latest/model.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def close(ours, theirs):
    """Metrics and evaluations to 1e-3, and the same samples."""
    for name in ("metrics", "eval"):
        for a, b in zip(logged(ours, name), logged(theirs, name), strict=True):
            numbers = {key: value for key, value in b.items() if isinstance(value, float)}
            assert a == b | {key: pytest.approx(x, rel=1e-3, abs=1e-6) for key, x in numbers.items()}
    assert logged(ours, "samples") == logged(theirs, "samples")


def all_load(out_dir):
    """Every folder that is a checkpoint by its name is whole, and so is the one that `latest` names."""
    folders = sorted(out_dir.glob("checkpoints/step_" + "[0-9]" * 6))
    assert not folders or (out_dir / "checkpoints/latest").resolve() in folders
    for folder in folders:
        assert json.loads((folder / "trainer/state.json").read_text())["step"] == int(folder.name[-6:])
        for path in [*folder.glob("*.safetensors"), *folder.glob("trainer/*.safetensors")]:
            with safe_open(path, "pt") as file:
                assert all(file.get_tensor(name).isfinite().all() for name in file.keys())


def as_if_killed_after(step, out_dir, copy):
    """A copy of out_dir as a SIGKILL leaves it: its newest checkpoint is the step's, the logs go on."""
    shutil.copytree(out_dir, copy, symlinks=True)
    (copy / "checkpoints/latest").unlink()
    (copy / "checkpoints/latest").symlink_to(f"step_{step:06d}")
    with open(copy / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 7, "half of')
    return copy


@pytest.fixture(scope="module")
def common(tiny_model_dir):
    """The random model is never right, and ends some of its responses: that is what its scores tell apart."""
    return dict(model=tiny_model_dir, rollout="hf", max_pixels=28224, learning_rate=1e-3, max_new_tokens=24,
                eval_every_epochs=0, no_eos_score=-1.0)


@pytest.fixture(scope="module")
def runs(common, mixed_jsonl, tiny_jsonl, tmp_path_factory):
    """runs(name): what the function of that name returns; all are run, two at a time, while tests wait."""
    base = tmp_path_factory.mktemp("runs")
    # GRPO, groups of 8; all is trained; rows with no, one and three pictures; 2 uses of a step's responses
    all_trained = common | dict(
        train_data=mixed_jsonl, batch_size=6, samples_per_query=8, advantage="grpo", minibatch_size=48,
        ppo_epochs=2, max_steps=5, train_vit=True, train_connector=True, language_reward_coeff=1,
        kl_reward_coeff=0.01, save_samples=48)
    evaluated = all_trained | dict(val_data=mixed_jsonl, eval_every_epochs=2, save_every_steps=2)
    # 4 responses to each of 4 queries, 2 updates a step
    sampled_ahead = common | dict(
        train_data=mixed_jsonl, batch_size=4, samples_per_query=4, minibatch_size=8, rollout_ahead=1,
        correction="truncate", max_steps=5, save_every_steps=2)
    adapters = common | dict(
        train_data=mixed_jsonl, batch_size=4, samples_per_query=4, minibatch_size=8, max_steps=3,
        save_every_steps=2, lora_rank=4, lora_alpha=8, learning_rate=1e-2, kl_loss_coeff=0.01)
    sft_knobs = {key: value for key, value in common.items() if key != "no_eos_score"} | dict(
        train_data=tiny_jsonl, val_data=mixed_jsonl, batch_size=4, max_steps=12, save_every_steps=6,
        max_new_tokens=8, eval_every_epochs=1.33, train_connector=True, learning_rate=1e-2)

    def whole():
        launch("train_rl.py", **evaluated, out_dir=base / "whole", logger="tensorboard",
               hook=f"record:{base}/grad1")
        return base / "whole", base / "grad1"

    def two_ranks():
        launch("train_rl.py", **evaluated, out_dir=base / "two", max_tokens_per_microbatch=300, ranks=2,
               hook=f"record:{base}/grad2")
        return base / "two", base / "grad2"

    def three_ranks():
        launch("train_rl.py", **all_trained | dict(max_steps=1), out_dir=base / "three",
               max_tokens_per_microbatch=1, ranks=3, hook=f"record:{base}/grad3")
        return base / "three", base / "grad3"

    def stopped_and_killed():
        """whole's config.py run again: SIGTERM in update 5, the first of step 3, then SIGKILLs."""
        words, out_dir = ("train_rl.py", base / "whole/config.py"), base / "killed0"
        launch(*words, out_dir=out_dir, init_from="resume", hook="terminate:5", status=143)
        stopped = (out_dir / "checkpoints/latest").resolve().name
        for kill in range(1, KILLS + 1):
            log = out_dir / "metrics.jsonl"
            before = log.read_bytes() if log.exists() else b""
            process = subprocess.Popen(command(*words, out_dir=out_dir, init_from="resume"), cwd=ROOT,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while process.poll() is None and (not log.exists() or log.read_bytes() == before):
                time.sleep(0.01)
            time.sleep(random.random() * 0.5)
            process.kill()
            finished = process.wait() == 0
            all_load(out_dir)
            if finished:  # nothing is left to kill: once more from the start
                same(out_dir, base / "whole")
                out_dir = base / f"killed{kill}"
        launch(*words, out_dir=out_dir, init_from="resume")
        return out_dir, stopped

    def lora():
        launch("train_rl.py", **adapters, out_dir=base / "lora")
        return base / "lora"

    def lora_resumed():
        copy = as_if_killed_after(2, base / "lora", base / "lora2")
        launch("train_rl.py", **adapters, out_dir=copy, init_from="resume")
        return copy

    def lora_on_two_ranks():
        launch("train_rl.py", **adapters, out_dir=base / "lora3", ranks=2)
        return base / "lora3"

    def one_node_refuses():
        """Its out_dir holds a run."""
        (base / "half/node1/out").mkdir(parents=True)
        (base / "half/node1/out/metrics.jsonl").touch()
        both = agents(base / "half", 1, "train_sft.py", **sft_knobs, out_dir="out")
        return [agent.wait(100) for agent in both]

    def ahead():
        launch("train_rl.py", **sampled_ahead, out_dir=base / "ahead")
        return base / "ahead"

    def ahead_resumed_by_two_ranks():
        copy = as_if_killed_after(2, base / "ahead", base / "ahead2")
        launch("train_rl.py", **sampled_ahead, out_dir=copy, init_from="resume", ranks=2)
        return copy

    def not_finite():
        return base / "not_finite", launch(
            "train_rl.py", **common, train_data=tiny_jsonl, batch_size=8, minibatch_size=4, max_steps=4,
            out_dir=base / "not_finite", hook="not_finite:")

    def objectives():
        """{name: the metrics of one update with these knobs}; gamma: the tokens' advantages differ."""
        ways = dict(none={}, truncate=dict(correction="truncate", correction_cap=0.5), mask=dict(
            correction="mask", correction_cap=0.5), unfinished=dict(mask_unfinished=True, max_new_tokens=1),
            cispo=dict(ratio="cispo"), sequence=dict(ratio="sequence"), constant=dict(loss_agg="constant"))
        for name, knobs in ways.items():
            knobs = dict(train_data=tiny_jsonl, gamma=0.9, kl_loss_coeff=0, max_steps=1) | knobs
            launch("train_rl.py", **common | knobs, batch_size=8, minibatch_size=8, out_dir=base / name)
        return {name: read(base / name / "metrics.jsonl")[0] for name in ways}

    def disagreement():
        return launch("train_rl.py", **common, train_data=mixed_jsonl, batch_size=8, minibatch_size=4,
                      out_dir=base / "flat", hook="flat:", status=2)

    def sft():
        launch("train_sft.py", **sft_knobs, out_dir=base / "sft")
        return base / "sft"

    def sft_on_two_nodes():
        """Of two processes each."""
        for agent in agents(base / "sft2", 2, "train_sft.py", **sft_knobs, out_dir="out"):
            assert agent.wait(300) == 0, (base / "sft2/node0.log").read_text()[-4000:]
        return base / "sft2/node0/out"

    def sft_resumed_on_one_node():
        copy = as_if_killed_after(6, base / "sft2/node0/out", base / "sft3")
        launch("train_sft.py", **sft_knobs, out_dir=copy, init_from="resume")
        return copy

    def agent_killed():
        """(how the other ended, what it said)."""
        killed, other = agents(base / "killed", 1, "train_sft.py", **sft_knobs | dict(max_steps=1000),
                               out_dir="out")
        while not (log := base / "killed/node0/out/metrics.jsonl").exists() or len(read(log)) < 3:
            assert other.poll() is killed.poll() is None
            time.sleep(0.1)
        killed.kill()
        return other.wait(60), (base / "killed/node1.log").read_text()

    def sft_finished():
        copy = shutil.copytree(base / "sft", base / "sft4", symlinks=True)
        launch("train_sft.py", **sft_knobs, out_dir=copy, init_from="resume")
        return copy

    with ThreadPoolExecutor(2) as pool:
        acts = (whole, ahead, sft, lora, stopped_and_killed, two_ranks, ahead_resumed_by_two_ranks,
                sft_on_two_nodes, three_ranks, sft_resumed_on_one_node, agent_killed, not_finite, objectives,
                lora_resumed, lora_on_two_ranks, one_node_refuses, disagreement, sft_finished)
        futures = {act.__name__: pool.submit(act) for act in acts}
        yield lambda name: futures[name].result()
        pool.shutdown(cancel_futures=True)


def test_metrics_eval_and_samples_have_the_promised_names_and_null_for_what_is_missing(runs):
    out_dir, _ = runs("whole")
    rows = read(out_dir / "metrics.jsonl")
    assert [(row["step"], row["epoch"]) for row in rows] == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4)]
    for row in rows:
        assert row.keys() == METRICS
        assert all(value is None or math.isfinite(value) for value in row.values())
        assert row["train/accuracy"] == 0 and row["reflection/reflection_ratio_in_correct_answers"] is None
        assert row["rollout/logprob_diff"] < 1e-4, "engine and trainer, after each sync, tower included"
        assert row["policy/updates"] == 2 and row["samples"] == 48 * row["step"]
    assert len({row["policy/kl_loss"] for row in rows}) == 5 and rows[4]["rollout/kl"] > 0, "the policy moves"
    evals = read(out_dir / "eval.jsonl")
    assert all(set(EVAL) <= row.keys() for row in evals)
    assert [(row["step"], row["epoch"], row["k"]) for row in evals] == [
        (step, step, k) for step in (0, 2, 4, 5) for k in (8, 1, 1)]
    samples = read(out_dir / "samples.jsonl")
    assert all(set(SAMPLES) <= row.keys() for row in samples)
    splits = [row["split"] for row in samples]
    assert splits.count("train") == 5 * 48
    assert splits.count("validation") == 4 * (48 + 8 + 8), "save_samples=48 of each setting's 64, 8 and 8"
    pictures = {row["id"]: len(row["images"]) for row in samples}
    assert pictures == {f"tiny-{i}": (1, 0, 3, 1)[i % 4] for i in range(8)}
    folders = {path.name for path in (out_dir / "checkpoints").iterdir()}
    assert folders == {"latest", "step_000002", "step_000004", "step_000005"}


def test_tensorboard_has_the_scalars(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    out_dir, _ = runs("whole")
    events = EventAccumulator(str(out_dir / "tensorboard"))
    events.Reload()
    losses = [row["policy/loss"] for row in read(out_dir / "metrics.jsonl")]
    assert [event.value for event in events.Scalars("policy/loss")] == pytest.approx(losses)
    assert [e.step for e in events.Scalars("eval/validation/pass@8 T=1 top_p=1")] == [0, 2, 4, 5]


def test_a_checkpoint_opens_in_transformers_and_gives_the_trainers_logits(runs, common, mixed, world):
    """The trainer's own float32 weights, from its shards; the folder in the hub's format, over pixels."""
    out_dir, _ = runs("whole")
    stored = load_file(out_dir / "checkpoints/latest/model.safetensors")
    assert stored.keys() == load_file(f"{common['model']}/model.safetensors").keys(), "the hub's older names"
    assert "visual.patch_embed.proj.weight" in stored
    hf = AutoModelForImageTextToText.from_pretrained((out_dir / "checkpoints/latest").resolve())
    banned, response = special_token_ids(mixed.tokenizer, "")[1], [40, 41, 42, 2]
    policy, _ = model.load_policy(common["model"], world, torch.float32, banned, True, True, True)
    untrained = [p.detach().full_tensor().clone() for p in policy.parameters()]
    assert load_trainer(out_dir, policy, torch.optim.AdamW(policy.parameters())) == 5
    assert not any(torch.equal(p.full_tensor(), old) for p, old in zip(policy.parameters(), untrained))
    for row, query in model.encode(None, mixed, range(4)).items():
        logprobs, _ = policy([model.make_sequence(query, response)], 1.0)
        expected = transformers_logprobs(hf, mixed, row, response)[range(4), response]
        torch.testing.assert_close(logprobs[0], expected, atol=1e-5, rtol=0)


def test_a_repeated_run_stopped_by_sigterm_and_killed_equals_the_unbroken_one(runs):
    out_dir, stopped = runs("stopped_and_killed")
    assert stopped == "step_000003", "a checkpoint of the step within which the signal came"
    same(out_dir, runs("whole")[0])


def test_one_and_two_ranks_are_the_same_run(runs):
    close(runs("two_ranks")[0], runs("whole")[0])


@pytest.mark.parametrize("name", ["two_ranks", "three_ranks"])
def test_the_gradient_depends_neither_on_ranks_nor_on_micro_batches(runs, name):
    """1 rank with all tokens at once, 2 with 300, 3 with a sequence, which may have no picture."""
    ours, theirs = load_file(runs(name)[1]), load_file(runs("whole")[1])
    scale = max(gradient.abs().max() for gradient in theirs.values())
    assert len(theirs) == 56 and all(gradient.any() for gradient in theirs.values())
    for key, gradient in theirs.items():
        assert (ours[key] - gradient).abs().max() / scale < 1e-5


def test_sampling_ahead_uses_weights_a_step_old_and_resumes_on_two_ranks(runs, common, mixed, world):
    """Step 2 is sampled by step 1's first weights, step 4 by step 3's: those of the checkpoint of step 2."""
    out_dir = runs("ahead")
    second = str(out_dir / "checkpoints/step_000002")
    for step, folder in ((1, common["model"]), (2, common["model"]), (3, second), (4, second)):
        rows, seeds = step_requests(step, mixed, 0, 4, 4, world)
        completions = open_hf(folder, mixed).generate(mixed, rows, seeds, Sampling(1.0, 1.0, 24))
        expected = sorted((mixed.samples[row].id, mixed.tokenizer.decode(c.token_ids, True))
                          for row, c in zip(rows, completions))
        samples = [row for row in logged(out_dir, "samples") if row["step"] == step]
        assert expected == sorted((row["id"], row["response"]) for row in samples)
        assert len(set(expected)) == 16, "four different responses to each query"
    close(runs("ahead_resumed_by_two_ranks"), out_dir)
    stale = [row["rollout/logprob_diff"] > 1e-4 for row in logged(out_dir)]
    assert stale == [False, True, False, True, False], "none is in flight over a checkpoint"


def test_lora_resumes_and_is_the_same_on_two_ranks(runs):
    same(runs("lora_resumed"), runs("lora"))
    close(runs("lora_on_two_ranks"), runs("lora"))
    rows = logged(runs("lora"))
    assert all(row["rollout/logprob_diff"] < 1e-4 for row in rows), "the engine gets merged weights"
    assert rows[0]["rollout/kl"] == 0 < 1e-4 < rows[2]["rollout/kl"], "of the policy without its adapters"


def test_a_checkpoint_of_another_rank_or_of_the_first_node_alone_is_refused(runs, common, world, monkeypatch):
    policy, _ = model.load_policy(common["model"], world, torch.float32, [], lora_rank=8, lora_alpha=8)
    with pytest.raises(UserError, match=r"rank and alpha of LoRA are \(8, 8\), but \[4, 8\]"):
        load_trainer(runs("lora"), policy, None)
    newest_and_oldest = iter([3, 0])
    monkeypatch.setattr("checkpoint.all_max", lambda step: next(newest_and_oldest))
    with pytest.raises(UserError, match="nodes have checkpoints of steps 0 to 3"):
        load_trainer(runs("lora"), policy, None)


def test_peft_opens_the_adapters_and_gives_the_merged_models_logits(runs, tiny_model_dir):
    checkpoint = (runs("lora") / "checkpoints/latest").resolve()
    base, merged = map(AutoModelForImageTextToText.from_pretrained, (tiny_model_dir, checkpoint))
    ids = torch.arange(8, 40)[None]
    plain, expected = base(input_ids=ids).logits, merged(input_ids=ids).logits
    adapted = peft.PeftModel.from_pretrained(base, checkpoint / "adapter")(input_ids=ids).logits
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(adapted, expected, atol=1e-5, rtol=0)


def test_updates_that_are_not_finite_are_left_out_and_counted(runs):
    """Update 3 has a NaN loss, update 4 an infinite gradient: both of step 2."""
    out_dir, done = runs("not_finite")
    moved = re.findall(r"^HOOK (\d) (\w+)", done.stdout, re.M)[1:]
    assert moved == [(str(i), str(i not in (3, 4))) for i in range(1, 8)], "of 8 updates, before the next"
    rows = read(out_dir / "metrics.jsonl")
    assert [row["policy/updates"] for row in rows] == [2, 0, 2, 2]
    assert [row["policy/skipped"] for row in rows] == [0, 2, 0, 0]
    assert "NaN" not in (out_dir / "metrics.jsonl").read_text()
    assert rows[1]["policy/loss"] is rows[1]["policy/entropy"] is rows[1]["rollout/logprob_diff"] is None
    assert all(row[key] is not None for row in rows[2:] for key in ("policy/loss", "rollout/logprob_diff"))
    all_load(out_dir)


def test_the_knobs_of_the_objective_reach_the_gradient(runs):
    """The first update's ratios are 1, and of the trainer to the engine: truncated and masked at 0.5."""
    loss, norm = ({name: m[f"policy/{key}"] for name, m in runs("objectives").items()}
                  for key in ("pg_loss", "grad_norm"))
    assert norm["truncate"] == pytest.approx(norm["none"] / 2, rel=1e-4) and norm["none"] > 0
    assert norm["mask"] == norm["unfinished"] == 0 and runs("objectives")["mask"]["correction/masked"] == 8
    assert loss["cispo"] != pytest.approx(loss["none"]) and norm["cispo"] == pytest.approx(norm["none"])
    assert all(norm[name] != pytest.approx(norm["none"], rel=1e-2) for name in ("sequence", "constant"))


def test_disagreement_of_trainer_and_engine_stops_the_run_with_one_line(runs):
    done = runs("disagreement")
    lines = [line for line in done.stderr.splitlines() if line and "Loading weights" not in line]
    assert len(lines) == 1 and lines[0].startswith("trainer and engine disagree by over 0.1 nats a token: ")


def run_main(monkeypatch, script, **knobs):
    """The script in this process, up to where it would start."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # configure() sets it
    monkeypatch.setattr(sys, "argv", command(script, **knobs)[1:])
    size = int(os.environ.get("WORLD_SIZE", 1))
    monkeypatch.setattr("distributed.start", lambda: distributed.World(0, size, 0, size, None, None))
    monkeypatch.setattr("checkpoint.Stop", lambda: pytest.fail("went on to load the model"))
    runpy.run_path(str(ROOT / script), run_name="__main__")


def test_wrong_knobs_are_errors_before_any_model(common, tiny_jsonl, tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text("")
    sound = {key: value for key, value in common.items() if key != "no_eos_score"} | dict(
        train_data=tiny_jsonl, batch_size=8, out_dir=tmp_path / "out")
    for wrong, said in [
            (dict(train_data="nowhere.jsonl"), "nowhere.jsonl: no such file"), (dict(model=""), "is empty"),
            (dict(model="./none"), "'./none' is no folder here"),
            (dict(model=tmp_path), "no tokenizer and image processor"),
            (dict(out_dir=tmp_path), "holds a run; go on with it by --init_from=resume"),
            (dict(init_from="scratch"), "init_from must be one of 'pretrained', 'resume', got 'scratch'"),
            (dict(logger="paper"), "logger must be one of 'none', 'tensorboard', 'wandb', got 'paper'"),
            (dict(epochs=0), "epochs must be at least 1, got 0"), (dict(train_llm=False), "nothing to train"),
            (dict(lora_rank=8, train_vit=True), "lora_rank trains the language model alone"),
            (dict(batch_size=24), "12 rows do not fill one batch, batch_size=24")]:
        for script, knobs in (("train_rl.py", dict(minibatch_size=4)), ("train_sft.py", {})):
            with pytest.raises(UserError, match=re.escape(said)):
                run_main(monkeypatch, script, **sound | knobs | wrong)
    for wrong, said in [
            (dict(batch_size=9), "minibatch_size=4 must divide batch_size * samples_per_query, 9, and be a"),
            (dict(samples_per_query=8), "multiple of samples_per_query=8 * world_size=1"),
            (dict(minibatch_size=0), "minibatch_size must be at least 1, got 0"),
            (dict(temperature=0.0), "temperature must be at least 0.01, got 0"),
            (dict(loss_agg="mean"), "one of 'seq_mean', 'token_mean', 'constant', got 'mean'"),
            (dict(ratio="step"), "ratio must be one of 'token', 'sequence', 'cispo', got 'step'"),
            (dict(advantage="grpo"), "advantage='grpo' compares a query's responses, so set samples_per"),
            (dict(rollout_ahead=1), "rollout_ahead=1 are an older policy's, so set correction='truncate'"),
            (dict(correction="mask", old_logprobs_from="engine"), "correction='mask' does nothing with old")]:
        with pytest.raises(UserError, match=re.escape(said)):
            run_main(monkeypatch, "train_rl.py", **sound | dict(minibatch_size=4) | wrong)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for script, said in (("train_rl.py", "world_size=3"), ("train_sft.py", "multiple of 3 processes, got 8")):
        with pytest.raises(UserError, match=said):
            run_main(monkeypatch, script, **sound)
    assert not (tmp_path / "out").exists(), "nothing was written"


def test_sft_learns_evaluates_and_is_the_same_on_two_nodes_and_resumed_on_one(runs, mixed, world):
    out_dir = runs("sft")
    rows, evals = logged(out_dir), logged(out_dir, "eval")
    assert rows[-1]["policy/loss"] < 0.5 * rows[0]["policy/loss"] and len(rows) == 12
    assert [(row["step"], row["epoch"], row["k"]) for row in evals] == [
        (step, step / 3, k) for step in (0, 4, 8, 12) for k in (8, 1, 1)], "1.33 of 3 steps an epoch"
    close(runs("sft_on_two_nodes"), out_dir)
    close(runs("sft_resumed_on_one_node"), out_dir)
    again, _ = evaluate(open_hf(f"{out_dir}/checkpoints/latest", mixed), mixed, 8, 0, world)
    last = [row for row in evals if row["step"] == 12]
    assert [{**row, "step": 12, "epoch": 4, "split": "validation"} for row in again] == last


def test_a_node_whose_agent_is_killed_or_that_refuses_to_start_ends_the_other(runs):
    status, said = runs("agent_killed")
    assert status == 1 and ("closed by peer" in said or "reset by peer" in said)
    assert runs("one_node_refuses") == [1, 1]


def test_a_finished_run_has_nothing_left_to_do(runs):
    same(runs("sft_finished"), runs("sft"))


def test_three_steps_on_real_pictures(real_data, common, tmp_path):
    launch("train_rl.py", **common, train_data=real_data / "mathvision/mathvision_rl.jsonl", batch_size=4,
           minibatch_size=2, max_steps=3, out_dir=tmp_path)
    rows = read(tmp_path / "metrics.jsonl")
    assert len(rows) == 3 and all(row["rollout/logprob_diff"] < 1e-4 for row in rows)
    assert all(row["policy/updates"] == 2 and math.isfinite(row["policy/loss"]) for row in rows)
