"""Whole runs of the scripts on a tiny random model: same prompt, same policy, same gradient, same run; and users' errors."""
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
NOT_REPEATED = ("time/", "memory/")


def launch(command, **environment):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env=env | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment)


def finish(command, **environment):
    done = launch(command, **environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def read(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]


def metrics_of(out_dir):
    return [{k: v for k, v in row.items() if not k.startswith(NOT_REPEATED)} for row in read(out_dir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def knobs(tiny_model_dir, tiny_jsonl):
    return [f"--model={tiny_model_dir}", f"--train_data={tiny_jsonl}", "--rollout=hf", "--batch_size=8", "--minibatch_size=4",
            "--max_new_tokens=64", "--max_steps=3", "--eval_every_epochs=0", "--learning_rate=1e-3", "--kl_reward_coeff=0.01",
            "--activation_checkpointing=False", "--no_eos_score=0", "--language_reward_coeff=1"]


@pytest.fixture(scope="module")
def first_run(knobs, tmp_path_factory):
    """(out_dir, gradient file) of three steps in one process; the run that the others are held against."""
    folder = tmp_path_factory.mktemp("first")
    command = [sys.executable, "tests/patched_run.py", *knobs, f"--out_dir={folder / 'out'}"]
    finish(command, NANOMAYE_HOOK=f"record:{folder / 'grad'}")
    return folder / "out", folder / "grad"


def test_saved_config_repeats_the_run_bit_for_bit(first_run, tmp_path):
    finish([sys.executable, "train_rl.py", str(first_run[0] / "config.py"), f"--out_dir={tmp_path}"])
    assert metrics_of(tmp_path) == metrics_of(first_run[0])
    assert read(tmp_path / "samples.jsonl") == read(first_run[0] / "samples.jsonl")


@pytest.mark.parametrize("ranks, budget", [(2, 16384), (1, 150), (1, 700)])
def test_samples_metrics_and_gradient_do_not_depend_on_ranks_or_micro_batches(first_run, knobs, tmp_path, ranks, budget):
    launcher = TORCHRUN if ranks == 2 else [sys.executable]
    finish([*launcher, "tests/patched_run.py", *knobs, f"--out_dir={tmp_path}", f"--max_tokens_per_microbatch={budget}"],
           NANOMAYE_HOOK=f"record:{tmp_path / 'grad'}")
    assert read(tmp_path / "samples.jsonl") == read(first_run[0] / "samples.jsonl")
    close_metrics(tmp_path, first_run[0])
    assert [row.keys() for row in metrics_of(tmp_path)] == [row.keys() for row in metrics_of(first_run[0])]
    ours, theirs = load_file(tmp_path / "grad"), load_file(first_run[1])
    scale = max(t.abs().max() for t in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name] / scale, gradient / scale, atol=1e-5, rtol=0)
    assert scale > 0


def test_the_other_objective_on_three_ranks(knobs, tmp_path):
    """token_mean, two uses of a batch, no reference, a trained connector; shards of unlike size. The budget is such that in
    the first update two ranks need one micro-batch and the third needs two: the two run an empty one."""
    extra = ["--loss_agg=token_mean", "--ppo_epochs=2", "--kl_loss_coeff=0", "--kl_reward_coeff=0", "--train_connector=True",
             "--batch_size=12", "--minibatch_size=6", "--max_tokens_per_microbatch=350", "--max_steps=2"]
    rest = [k for k in knobs if k.split("=")[0] not in {e.split("=")[0] for e in extra}]
    launchers = {1: [sys.executable], 3: [*TORCHRUN[:-1], "--nproc_per_node=3"]}
    for ranks, launcher in launchers.items():
        finish([*launcher, "tests/patched_run.py", *rest, *extra, f"--out_dir={tmp_path / str(ranks)}"],
               NANOMAYE_HOOK=f"record:{tmp_path / f'grad{ranks}'}")
    assert read(tmp_path / "1" / "samples.jsonl") == read(tmp_path / "3" / "samples.jsonl")
    gradients = {ranks: load_file(tmp_path / f"grad{ranks}") for ranks in launchers}
    scale = max(t.abs().max() for t in gradients[1].values())
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[3][name] / scale, gradient / scale, atol=1e-5, rtol=0)
    row = metrics_of(tmp_path / "1")[0]
    assert row["policy/updates"] == 4 and row["policy/kl_loss"] is None and row["rollout/kl"] is None


def close_metrics(ours, theirs, leave_out=()):
    for a, b in zip(metrics_of(ours), metrics_of(theirs), strict=True):
        for key, value in b.items():
            if key not in leave_out:
                assert a[key] == value if value is None else a[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key


def test_a_single_update_needs_no_forward_for_the_old_log_probabilities(knobs, tmp_path):
    """The same run with a forward, which the faintest KL in the rewards asks for, and without."""
    rest = [k for k in knobs if not k.startswith(("--minibatch_size", "--kl_reward_coeff"))] + ["--minibatch_size=8"]
    for name, coefficient, forwards in (("with", "1e-30", 2), ("without", "0", 1)):
        command = [sys.executable, "tests/patched_run.py", *rest, f"--kl_reward_coeff={coefficient}"]
        done = finish([*command, f"--out_dir={tmp_path / name}"], NANOMAYE_HOOK="count:0")
        # one for the parity check; in each of 3 steps the reference's, and the policy's if it is not the update's own
        assert f"{1 + 3 * forwards} forwards without a gradient" in done.stdout
    close_metrics(tmp_path / "without", tmp_path / "with")
    assert all(row["policy/ratio"] == 1 and row["policy/entropy"] > 0 for row in metrics_of(tmp_path / "without"))
    assert read(tmp_path / "without/samples.jsonl") == read(tmp_path / "with/samples.jsonl")


@pytest.mark.parametrize("coefficient", ["0.01", "0"])
def test_the_engines_log_probabilities_can_stand_for_the_old_ones(first_run, knobs, tmp_path, coefficient):
    """And without a KL in the rewards the first update of each step compares its rows' with its own forward."""
    rest = [k for k in knobs if not k.startswith("--kl_reward_coeff")]
    done = finish([sys.executable, "tests/patched_run.py", *rest, "--old_logprobs=engine", f"--out_dir={tmp_path}",
                   f"--kl_reward_coeff={coefficient}"], NANOMAYE_HOOK="count:0")
    assert "4 forwards without a gradient" in done.stdout, "the parity check and the reference's"
    seen = metrics_of(tmp_path)
    if coefficient == "0":
        assert all(0 < row["rollout/logprob_diff"] < 1e-5 and row["policy/entropy"] > 1 for row in seen)
    else:
        close_metrics(tmp_path, first_run[0], leave_out=("policy/entropy", "rollout/logprob_diff"))
        assert all(row["policy/entropy"] is row["rollout/logprob_diff"] is None for row in seen)


def test_kept_features_and_the_first_updates_own_forward_change_no_number(knobs, tiny_jsonl, tmp_path):
    """Rounding differs, as other rows share a micro-batch."""
    changed = ("--kl_reward_coeff", "--max_steps", "--eval_every_epochs", "--max_new_tokens")
    rest = [k for k in knobs if not k.startswith(changed)] + ["--epochs=2", f"--val_data={tiny_jsonl}", "--max_new_tokens=16"]
    for name, flags in (("whole", ["--kl_reward_coeff=1e-30"]), ("saved", ["--kl_reward_coeff=0", "--keep_features=True"])):
        finish([sys.executable, "train_rl.py", *rest, *flags, f"--out_dir={tmp_path / name}"])
    close_metrics(tmp_path / "saved", tmp_path / "whole")
    assert read(tmp_path / "saved/samples.jsonl") == read(tmp_path / "whole/samples.jsonl")
    assert read(tmp_path / "saved/eval.jsonl") == read(tmp_path / "whole/eval.jsonl")


def test_bfloat16_compute_with_a_trained_tower_on_two_ranks(knobs, tmp_path):
    """what a GPU runs, on a CPU: float32 master weights, bfloat16 compute, checkpoint and engine."""
    rest = [k for k in knobs if not k.startswith("--activation_checkpointing")]  # on, as it is by default
    finish([*TORCHRUN, "train_rl.py", *rest, "--dtype=bfloat16", "--train_vit=True", "--train_connector=True",
            f"--out_dir={tmp_path}"])
    rows = metrics_of(tmp_path)
    assert all(1e-5 < row["rollout/logprob_diff"] < 0.02 for row in rows), "rounding, and no more than that"
    assert all(row["policy/updates"] == 2 for row in rows) and rows[2]["rollout/kl"] > 0
    weights = load_file(tmp_path / "checkpoints" / "latest" / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}


def test_metrics_have_the_promised_keys_and_finite_values(first_run):
    rows = read(first_run[0] / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    promised = """step epoch samples train/accuracy train/score reward/accuracy reward/language reward/format
        response/length response/clip_ratio reflection/reflection_ratio reflection/reflection_ratio_in_correct_answers
        reflection/reflection_ratio_in_incorrect_answers reflection/correct_ratio_in_reflection_texts
        reflection/correct_ratio_in_no_reflection_texts reflection_words/wait policy/loss policy/pg_loss policy/kl_loss
        policy/entropy policy/ratio policy/clipfrac policy/approx_kl policy/grad_norm policy/lr policy/updates
        rollout/logprob_diff rollout/kl judge/errors time/rollout_s time/trajectory_s time/update_s time/sync_s time/step_s
        tokens/prompt tokens/response memory/peak_gb""".split()
    for row in rows:
        assert set(promised) <= row.keys()
        assert all(v is None or abs(v) < float("inf") for v in row.values())
        assert row["rollout/logprob_diff"] < 1e-4, "trainer and engine, after weight syncs as well"
    assert len({row["policy/kl_loss"] for row in rows}) == 3, "the policy moves"
    sample = read(first_run[0] / "samples.jsonl")[0]
    assert {"step", "split", "id", "image", "question", "answer", "response", "correct", "rewards", "length",
            "finish_reason"} <= sample.keys()


def test_a_nan_loss_skips_that_update_and_no_other(first_run, knobs, tmp_path):
    done = finish([sys.executable, "tests/patched_run.py", *knobs, f"--out_dir={tmp_path}"], NANOMAYE_HOOK="nan:2")
    assert "SKIPPED" in done.stdout and "tiny-" in done.stdout, "the samples are named"
    ours, theirs = read(tmp_path / "metrics.jsonl"), read(first_run[0] / "metrics.jsonl")
    assert [row["policy/skipped"] for row in ours] == [1, 0, 0] and [row["policy/updates"] for row in ours] == [1, 2, 2]
    assert all(v is None or abs(v) < float("inf") for row in ours for v in row.values()), "NaN went into no metric"
    assert ours[0]["policy/ratio"] == pytest.approx(1), "metrics of the update that was made: the first, on policy"
    assert ours[1]["rollout/kl"] != theirs[1]["rollout/kl"], "but the second was not made"
    weights = load_file(tmp_path / "checkpoints" / "latest" / "model.safetensors")
    assert all(torch.isfinite(t).all() for t in weights.values())


def test_sft_evaluation_and_the_checkpoint_between_them(knobs, tiny_jsonl, tmp_path):
    """train_sft.py learns four rows by heart on two ranks; evaluate.py finds the same accuracy in its checkpoint."""
    rows = pathlib.Path(tiny_jsonl).read_text(encoding="utf-8").splitlines()[:4]
    (tmp_path / "images").symlink_to(pathlib.Path(tiny_jsonl).parent / "images")
    data = tmp_path / "four.jsonl"
    data.write_text("\n".join(rows) + "\n", encoding="utf-8")
    finish([*TORCHRUN, "train_sft.py", knobs[0], f"--train_data={data}", f"--val_data={data}", "--rollout=hf",
            f"--out_dir={tmp_path / 'sft'}", "--batch_size=4", "--epochs=60", "--eval_every_epochs=60",
            "--learning_rate=1e-2", "--warmup_ratio=0.02", "--max_new_tokens=24", "--train_vit=True",
            "--train_connector=True"])
    metrics, evals = read(tmp_path / "sft" / "metrics.jsonl"), read(tmp_path / "sft" / "eval.jsonl")
    assert len(metrics) == 60 and metrics[-1]["policy/loss"] < 0.1 * metrics[0]["policy/loss"]
    greedy = {row["epoch"]: row for row in evals if row["setting"].startswith("pass@1 T=0.01")}
    assert greedy[0]["accuracy"] == 0 and greedy[60]["accuracy"] == 1
    done = finish([sys.executable, "evaluate.py", f"--ckpt={tmp_path / 'sft/checkpoints/latest'}", f"--data={data}",
                   "--rollout=hf", f"--out_dir={tmp_path / 'eval'}", "--max_new_tokens=24"])
    again = read(tmp_path / "eval" / "eval.jsonl")
    for row, theirs in zip(again, [row for row in evals if row["epoch"] == 60]):
        assert row["accuracy"] == theirs["accuracy"] and row["response_length"] == theirs["response_length"]
        assert row["setting"] in done.stdout
    assert [(row["k"], row["temperature"], row["top_p"]) for row in again] == [(8, 1.0, 1.0), (1, 0.6, 1.0), (1, 0.01, 0.001)]
    assert len(read(tmp_path / "eval" / "samples.jsonl")) == 4 * (8 + 1 + 1)


def one_line(done, lines=1):
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert len(done.stderr.splitlines()) == lines, done.stderr
    return done.stderr.rstrip()


def test_user_errors_are_one_line_and_exit_2(knobs, tiny_jsonl, tmp_path):
    other = tmp_path / "llama"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    bad = tmp_path / "bad.jsonl"
    good = json.loads(pathlib.Path(tiny_jsonl).read_text(encoding="utf-8").splitlines()[0])
    image = pathlib.Path(tiny_jsonl).parent / good["image"]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(image.read_bytes())
    (tmp_path / "images" / "cut.png").write_bytes(image.read_bytes()[:60])
    rows = [good | {"id": "a", "image": "images/none.png"}, good | {"id": "b", "image": "images/cut.png"},
            good | {"id": "c", "answer": ""}, {k: v for k, v in good.items() if k != "answer"} | {"id": "d"},
            good | {"id": "e", "question": "no image here"}]
    bad.write_text("\n".join(json.dumps(row) for row in rows) + "\nnot json\n", encoding="utf-8")
    command = [sys.executable, "train_rl.py", *knobs, f"--out_dir={tmp_path / 'out'}"]
    for arguments, words in [
        (["--lerning_rate=1"], ["lerning_rate", "learning_rate"]),
        (["--train_data=nowhere.jsonl"], ["nowhere.jsonl"]),
        ([f"--train_data={bad}"], [f"bad.jsonl:{i}" for i in range(1, 7)]),
        ([f"--model={other}"], ["llama", "qwen2_5_vl"]),
        (["--batch_size=9"], ["batch_size=9", "minibatch_size=4"]),
        (["--loss_agg=mean"], ["loss_agg", "'mean'"]),
        (["--rollout=sglang"], ["rollout", "sglang"]),
        (["--minibatch_size=0"], ["minibatch_size", "at least 1"]),
        (["--train_llm=False"], ["nothing to train"]),
        *([] if importlib.util.find_spec("vllm") else [(["--rollout=vllm"], ["vLLM is not installed", "--rollout=hf"])]),
    ]:
        replaced = [a for a in command if a.split("=")[0] not in {b.split("=")[0] for b in arguments}]
        line = one_line(launch(replaced + arguments), 7 if str(bad) in arguments[0] else 1)  # a line for each bad row
        assert all(word in line for word in words), line
    assert not (tmp_path / "out" / "metrics.jsonl").exists(), "nothing was trained"


def test_ranks_that_do_not_divide_the_minibatch_are_an_error(knobs):
    line = one_line(launch([sys.executable, "train_rl.py", *knobs], WORLD_SIZE="3"))
    assert "world_size=3" in line and "minibatch_size=4" in line
