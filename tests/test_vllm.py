"""VLLMEngine against vLLM itself, its CPU build: a dozen engine starts in all, about 25 s each."""
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText

if os.environ.get("NANOMAYE_VLLM") != "required":  # CI says it must be there
    pytest.importorskip("vllm", reason="vLLM is not installed (requirements-vllm.txt)")
import vllm  # noqa: E402, F401

import data  # noqa: E402
import distributed  # noqa: E402
from evaluate import stored_weights  # noqa: E402
from rollout import Sampling, banned_token_ids, eos_token_ids, hub_name, running  # noqa: E402
from rollout_vllm import VLLMEngine  # noqa: E402
from test_failures import END_S, run  # noqa: E402
from test_resume import all_load, kept, same_files  # noqa: E402
from test_runs import metrics_of  # noqa: E402
from test_rollout import expected_logprobs, full_logits, seeds  # noqa: E402
from tiny import make_tiny  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
T1 = Sampling(1.0, 1.0, 24)
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A tied Qwen2.5-VL (vLLM's CPU attention wants heads of 32) with a generation_config that would spoil sampling."""
    folder = make_tiny(tmp_path_factory.mktemp("vllm") / "tied", "qwen2_5_vl", tied=True, hidden=64)
    path = pathlib.Path(folder) / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(repetition_penalty=5.0, temperature=0.1, top_k=1,
                                                                   top_p=0.1, do_sample=True)))
    return folder


@pytest.fixture(scope="module")
def dataset(model_dir, tiny_jsonl):
    return data.Dataset(tiny_jsonl, *data.load_processor(model_dir), 28 * 28, 200704, 512)


@pytest.fixture(scope="module")
def engine(model_dir, dataset):
    if dist.is_initialized():
        dist.destroy_process_group()
    before = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    engine = VLLMEngine(model_dir, torch.float32, distributed.start(), eos_token_ids(dataset.tokenizer, model_dir),
                        banned_token_ids(dataset.tokenizer), 1024, 0.8, 0)
    assert {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")} == before
    yield engine
    children = descendants(os.getpid())
    assert children
    engine.close()
    engine.close()
    assert gone(children)
    dist.destroy_process_group()


@pytest.fixture
def model(model_dir):
    return AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32)


def named(model, prefixes=("model.", "visual.", "lm_head.")):
    pairs = ((hub_name(name), p.detach()) for name, p in model.named_parameters(remove_duplicate=False))
    return [(name, p) for name, p in pairs if name.startswith(prefixes)]


def perturb(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


def largest_difference(model, dataset, indices, completions, banned, temperature=1.0):
    expected = [expected_logprobs(model, dataset.inputs(i), c.token_ids, banned, temperature)
                for i, c in zip(indices, completions)]
    return max((torch.tensor(c.logprobs) - e).abs().max().item() for c, e in zip(completions, expected))


def descendants(pid):
    """Pids of the engine's processes under pid: python ones, but for multiprocessing's own tracker."""
    pids, found = [int(p) for p in os.listdir("/proc") if p.isdigit()], {pid}
    for _ in range(4):
        for p in pids:
            try:
                parent = int(pathlib.Path(f"/proc/{p}/stat").read_text().rsplit(")", 1)[1].split()[1])
                if parent in found and "resource_tracker" not in pathlib.Path(f"/proc/{p}/cmdline").read_text():
                    found.add(p)
            except OSError:
                continue
    return found - {pid}


def gone(pids, seconds=20):
    deadline = time.time() + seconds
    while any(map(running, pids)) and time.time() < deadline:
        time.sleep(0.2)
    return not any(map(running, pids))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_hf_forward(engine, dataset, model, temperature):
    """Also: prompt ids equal (generate raises otherwise), and generation_config.json is not obeyed."""
    indices = list(range(12))
    completions = engine.generate(dataset, indices, seeds(12), T1._replace(temperature=temperature))
    assert largest_difference(model, dataset, indices, completions, engine.banned_ids, temperature) < 1e-4
    assert largest_difference(model, dataset, indices, completions, engine.banned_ids, 2 * temperature) > 0.1
    assert all(1 <= len(c.token_ids) <= 24 for c in completions)


def test_another_prompt_than_the_trainers_is_an_error(engine, dataset):
    class Other:
        def inputs(self, i, **kwargs):
            inputs = dataset.inputs(i, **kwargs)
            return inputs._replace(query_ids=inputs.query_ids + [65] * (i == 2))
    engine.generate(Other(), [0, 1], seeds(2), T1)
    with pytest.raises(ValueError, match="sample 2: vLLM's prompt is not the trainer's"):
        engine.generate(Other(), [1, 2], seeds(2), T1)


def test_tokens_depend_on_the_seed_alone(engine, dataset):
    indices = [0, 1, 1, 2, 5, 7, 11, 1]
    first = engine.generate(dataset, indices, seeds(8), T1)
    assert len({tuple(c.token_ids) for c in first}) == 8
    again = engine.generate(dataset, indices[::-1], seeds(8)[::-1], T1)[::-1]
    assert [c.token_ids for c in again] == [c.token_ids for c in first]
    alone = [engine.generate(dataset, [i], [s], T1)[0] for i, s in list(zip(indices, seeds(8)))[:3]]
    assert [c.token_ids for c in alone] == [c.token_ids for c in first[:3]]
    other = engine.generate(dataset, indices, seeds(8, step=1), T1)
    assert not any(a.token_ids == b.token_ids for a, b in zip(first, other))
    assert engine.generate(dataset, [], [], T1) == []


def test_more_prompts_than_fit_one_batch(engine, dataset):
    """Cutting a prompt to fill the batch would lose the CPU build's engine, with seeds."""
    indices, short = [i % 12 for i in range(256)], T1._replace(max_new_tokens=2)
    assert sum(len(dataset.inputs(i).query_ids) for i in indices) > 8192
    completions = engine.generate(dataset, indices, seeds(256), short)
    alone = [engine.generate(dataset, [i], [seeds(4)[i]], short)[0] for i in range(4)]
    assert [c.token_ids for c in completions[:4]] == [c.token_ids for c in alone]


def test_low_temperature_and_top_p_are_greedy(engine, dataset, model):
    for i, c in enumerate(engine.generate(dataset, range(4), seeds(4), Sampling(0.01, 0.001, 24))):
        logits = full_logits(model, dataset.inputs(i), c.token_ids)
        logits[:, engine.banned_ids] = -torch.inf
        top = logits.topk(2).values
        clear = top[:, 0] - top[:, 1] > 0.1
        assert clear.float().mean() > 0.5
        assert torch.equal(torch.tensor(c.token_ids)[clear], logits.argmax(-1)[clear])


def test_vision_tokens_are_never_sampled(engine, dataset, monkeypatch):
    def sampled():
        completions = engine.generate(dataset, [0] * 48, seeds(48), Sampling(2.0, 1.0, 48))
        return {t for c in completions for t in c.token_ids}
    banned = engine.banned_ids
    assert not sampled() & set(banned)
    monkeypatch.setattr(engine, "banned_ids", [])
    assert sampled() & set(banned)


def test_a_response_ends_with_its_first_eos(engine, dataset, monkeypatch):
    many = [100, 120, 140, 160, 180, 200, 220, 240]
    monkeypatch.setattr(engine, "eos_ids", many)
    completions = engine.generate(dataset, [i % 12 for i in range(24)], seeds(24), T1)
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for c in completions:
        assert not set(c.token_ids[:-1]) & set(many) and len(c.logprobs) == len(c.token_ids)
        assert (c.token_ids[-1] in many) == (c.finish_reason == "stop")


def test_refused_weights_change_nothing(engine, dataset, model):
    before = engine.generate(dataset, range(4), seeds(4), T1)
    perturb(model, 1)
    tensors, seen = named(model), []
    for bad, message in (([*tensors, ("model.layers.9.x", torch.zeros(1))], "no parameter 'model.layers.9.x'"),
                         ([t for t in tensors if t[0] != "model.layers.1.self_attn.k_proj.weight"], "missing, such as"),
                         ([*tensors[:-1], ("model.norm.weight", torch.zeros(1))], "model.norm.weight is")):
        with pytest.raises(ValueError, match=message):
            engine.load_weights(t for t in bad if not seen.append(t))
        assert seen == bad  # run to its end all the same: it is a collective
        seen.clear()
    assert engine.generate(dataset, range(4), seeds(4), T1) == before


def test_weights_that_do_not_arrive_are_an_error(engine, model, monkeypatch):
    rpc = engine.llm.collective_rpc
    monkeypatch.setattr(engine.llm, "collective_rpc", lambda *a, **k: [rpc(*a, **k)[0][:-1]])
    with pytest.raises(RuntimeError, match="not all weights arrived"):
        engine.load_weights(iter(named(model)))


@pytest.mark.parametrize("shard_bytes", [2**31, 20_000])
@pytest.mark.parametrize("prefixes", [("model.", "visual.", "lm_head."), ("model.",), ("visual.merger.",)])
def test_new_weights_reach_the_engine(engine, dataset, model, model_dir, monkeypatch, prefixes, shard_bytes):
    """All of the model, the language model alone (the tied head not by name), the connector; one file or many."""
    monkeypatch.setattr("weight_sync.BUCKET_BYTES", shard_bytes)
    indices = list(range(12))
    before = set(os.listdir("/dev/shm"))
    engine.load_weights(iter(named(AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32))))
    old = engine.generate(dataset, indices, seeds(12), T1)
    perturb(model, 2)
    fresh = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32)
    sent = dict(named(model, prefixes))
    with torch.no_grad():
        for name, p in named(fresh):
            if name in sent or name == "lm_head.weight" and "model.embed_tokens.weight" in sent:
                p.copy_(sent.get(name, model.lm_head.weight))
    engine.load_weights(iter(sent.items()))
    completions = engine.generate(dataset, indices, seeds(12), T1)
    assert [c.token_ids for c in completions] != [c.token_ids for c in old]
    assert largest_difference(fresh, dataset, indices, completions, engine.banned_ids) < 1e-4
    assert not [f for f in set(os.listdir("/dev/shm")) - before if f.startswith("nanomaye")]


def test_another_checkpoints_weights_are_all_taken(engine, dataset, tmp_path):
    """evaluate.py goes through checkpoints in one engine: language model and tower of a folder, as they are stored."""
    folder = make_tiny(tmp_path / "other", "qwen2_5_vl", tied=True, hidden=64, seed=1)
    engine.load_weights(stored_weights(folder))
    other = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    completions = engine.generate(dataset, range(12), seeds(12), T1)
    assert largest_difference(other, dataset, range(12), completions, engine.banned_ids) < 1e-4


def test_weights_by_vllms_own_transfer(engine, dataset, tmp_path, monkeypatch):
    """What a GPU takes for the weight sync, as far as a CPU can run it: all but the broadcasts (tcp_transfer.py)."""
    import tcp_transfer
    folder, llm = make_tiny(tmp_path / "untied", "qwen2_5_vl", tied=False, hidden=64), vllm.LLM
    monkeypatch.setattr(vllm, "LLM", lambda *a, **k: llm(*a, **k | dict(
        weight_transfer_config=dict(backend="tcp"), worker_extension_cls="tcp_transfer.Receiver")))
    monkeypatch.setattr("weight_sync.BUCKET_BYTES", 20_000)  # several buckets
    world = distributed.World(0, 1, 0, 1, engine.group, torch.device("cpu"))
    other = VLLMEngine(folder, torch.float32, world, engine.eos_ids, engine.banned_ids, 1024, 0.8, 0)
    try:
        other.nccl = tcp_transfer.TCPSync(other.llm, torch.float32, other.tied)
        monkeypatch.setattr(other, "open_sync", lambda: other.nccl)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        for prefixes in (("model.", "visual.", "lm_head."), ("model.", "lm_head.")):
            with torch.no_grad():
                for _, p in named(model, prefixes):
                    p.add_(0.1 * torch.randn_like(p) * (p.dim() > 1))
            sent, tensors = other.nccl.count, list(named(model, prefixes))
            other.load_weights(iter(tensors))
            assert other.nccl.count - sent == len(tensors)
            completions = other.generate(dataset, range(12), seeds(12), T1)
            assert largest_difference(model, dataset, range(12), completions, other.banned_ids) < 1e-4
    finally:
        other.close()


OWNER_SCRIPT = """
import sys, time, torch, data, distributed
from rollout import banned_token_ids, eos_token_ids
from rollout_vllm import VLLMEngine
if __name__ == "__main__":
    folder = sys.argv[1]
    tokenizer, _ = data.load_processor(folder)
    engine = VLLMEngine(folder, torch.float32, distributed.start(), eos_token_ids(tokenizer, folder),
                        banned_token_ids(tokenizer), 512, 0.8, 0)
    print("ready", flush=True)
    time.sleep(600)
"""


def environment():
    return os.environ | dict(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", OMP_NUM_THREADS="1")


def test_the_engine_dies_with_its_owner(model_dir, tmp_path):
    (tmp_path / "owner.py").write_text(OWNER_SCRIPT)
    owner = subprocess.Popen([sys.executable, tmp_path / "owner.py", model_dir], env=environment(),
                             stdout=subprocess.PIPE, text=True)
    try:
        assert any(line == "ready\n" for line in owner.stdout)
        engine = descendants(owner.pid)
        assert engine and all(map(running, engine))
    finally:
        os.kill(owner.pid, signal.SIGKILL)
    assert gone(engine)
    owner.wait()


TWO_RANKS_SCRIPT = """
import json, os, sys, torch, data, distributed
import torch.distributed as dist
from transformers import AutoModelForImageTextToText
from rollout import Sampling, banned_token_ids, eos_token_ids
from rollout_vllm import VLLMEngine
from test_rollout import seeds
from test_vllm import descendants, largest_difference, named, perturb
if __name__ == "__main__":
    folder, jsonl, out = sys.argv[1:]
    world = distributed.start()
    dataset = data.Dataset(jsonl, *data.load_processor(folder), 28 * 28, 200704, 512)
    banned = banned_token_ids(dataset.tokenizer)
    engine = VLLMEngine(folder, torch.float32, world, eos_token_ids(dataset.tokenizer, folder), banned, 1024,
                        0.8, 0)
    mine = range(world.rank, 11, 2)  # 6 rows and 5
    first = engine.generate(dataset, mine, [seeds(12)[i] for i in mine], Sampling(1.0, 1.0, 24))
    theirs = range(11 if world.rank else 0)
    whole = engine.generate(dataset, theirs, [seeds(11)[i] for i in theirs], Sampling(1.0, 1.0, 24))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    differences = [largest_difference(model, dataset, mine, first, banned)]
    perturb(model, 5)
    engine.load_weights(iter(named(model)))
    second = engine.generate(dataset, mine, [seeds(12)[i] for i in mine], Sampling(1.0, 1.0, 24))
    differences += [largest_difference(model, dataset, mine, second, banned)]
    errors = []
    try:
        engine.load_weights(iter([("nonsense", torch.zeros(1))]))
    except Exception as e:
        errors.append(f"{type(e).__name__}: {e}")
    report = dict(first=[c.token_ids for c in first], whole=[c.token_ids for c in whole], differences=differences,
                  errors=errors, engines=len(descendants(os.getpid())), rank=os.environ["RANK"])
    json.dump(report, open(f"{out}/{world.rank}.json", "w"))
    engine.close()
    dist.destroy_process_group()
"""


def test_two_ranks_share_one_engine(tiny_jsonl, tmp_path):
    """Under torchrun, with an untied Qwen2-VL."""
    folder = make_tiny(tmp_path / "untied", "qwen2_vl", tied=False, hidden=64)
    (tmp_path / "two.py").write_text(TWO_RANKS_SCRIPT)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                    tmp_path / "two.py", folder, tiny_jsonl, tmp_path], env=environment(), check=True, timeout=240)
    a, b = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (a["rank"], b["rank"]) == ("0", "1")
    assert a["engines"] > 0 and b["engines"] == 0
    assert max(a["differences"] + b["differences"]) < 1e-4
    assert [len(a["first"]), len(b["first"])] == [6, 5] and a["whole"] == []
    assert b["whole"] == [(a, b)[i % 2]["first"][i // 2] for i in range(11)]  # whichever rank asks, the same tokens
    assert "no parameter 'nonsense'" in a["errors"][0] and "no parameter 'nonsense'" in b["errors"][0]


KNOBS = ["--rollout=vllm", "--batch_size=8", "--minibatch_size=4", "--max_new_tokens=32", "--max_prompt_tokens=256",
         "--max_steps=3", "--learning_rate=1e-2", "--no_eos_score=0", "--language_reward_coeff=1", "--eval_every_epochs=3"]


@pytest.fixture(scope="module")
def unbroken(model_dir, tiny_jsonl, tmp_path_factory):
    """(command, out_dir) of a run of train_rl.py: two ranks, three steps, an evaluation before and one after."""
    out_dir = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_rl.py", *KNOBS,
               f"--model={model_dir}", f"--train_data={tiny_jsonl}", f"--val_data={tiny_jsonl}"]
    subprocess.run([*command, f"--out_dir={out_dir}"], cwd=ROOT, env=environment(), check=True, timeout=300)
    return command, out_dir


def test_a_run_of_two_ranks_keeps_engine_and_trainer_together(unbroken):
    """train_rl.py itself: sharded weights to vLLM after every step, and the same log-probabilities in both."""
    rows = [json.loads(line) for line in (unbroken[1] / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["rollout/logprob_diff"] < 1e-4 for row in rows)
    assert rows[2]["rollout/kl"] > 1e-3, "the weights have moved, and the engine's with them"
    assert len((unbroken[1] / "eval.jsonl").read_text().splitlines()) == 2 * 3


def test_a_run_whose_engine_dies_leaves_a_checkpoint_and_goes_on_as_if_it_never_had(unbroken, tmp_path):
    """Killed while it samples for step 2; then, as the run goes on, the run is stopped while vLLM samples for step 3."""
    command, theirs = unbroken
    patched = [word.replace("train_rl.py", "tests/patched_run.py") for word in command] + [f"--out_dir={tmp_path}"]
    # calls of sample: the parity check, three settings of the evaluation before step 1, steps 1 and 2
    died = run(patched, "kill_engine:6", **environment())
    assert died.status == 1 and died.seconds < END_S, died
    assert died.last == ("step 2: 2) Response Collection: the engine's process died (killed by signal 9); --init_from=resume "
                         "goes on"), died.output
    assert died.output.count("engine's process died") == 1
    assert kept(tmp_path) == ["step_000001"]
    all_load(tmp_path)
    stopped = run([*patched, "--init_from=resume"], "stop:3", **environment())  # the parity check, steps 2 and 3
    assert "stopped by signal 15; --init_from=resume goes on" in stopped.output and stopped.seconds < END_S, stopped
    assert kept(tmp_path) == ["step_000001", "step_000002"]
    subprocess.run([*command, f"--out_dir={tmp_path}", "--init_from=resume"], cwd=ROOT, env=environment(), check=True,
                   timeout=300)
    same_files(tmp_path, theirs)


def test_sampling_ahead_is_one_update_behind_and_goes_on_after_a_stop(model_dir, tiny_jsonl, tmp_path):
    """rollout_ahead=1: step 2 is sampled by the policy that step 1 was sampled by; a stop loses none of what was sampled."""
    knobs = [knob for knob in KNOBS if not knob.startswith(("--learning_rate", "--eval_every_epochs"))]
    command = [sys.executable, "train_rl.py", *knobs, f"--model={model_dir}", f"--train_data={tiny_jsonl}",
               "--rollout_ahead=1", "--eval_every_epochs=0"]
    rows, samples = {}, {}
    for name, rate in (("still", "0.0"), ("moving", "1e-2")):
        out_dir = tmp_path / name
        done = run([*command, f"--learning_rate={rate}", f"--out_dir={out_dir}"], **environment())
        assert done.status == 0, done.output
        rows[name] = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
        samples[name] = [json.loads(line) for line in (out_dir / "samples.jsonl").read_text().splitlines()]
    sampled = {name: [(row["step"], row["id"], row["response"]) for row in several] for name, several in samples.items()}
    assert [row for row in sampled["moving"] if row[0] < 3] == [row for row in sampled["still"] if row[0] < 3]
    assert [row for row in sampled["moving"] if row[0] == 3] != [row for row in sampled["still"] if row[0] == 3]
    assert all(row["rollout/logprob_diff"] < 1e-4 for row in rows["still"] + rows["moving"][:1])
    assert all(row["rollout/logprob_diff"] > 1e-3 for row in rows["moving"][1:]), "the trainer is one update further"
    assert all(0 <= row["time/wait_s"] <= row["time/rollout_s"] for row in rows["moving"])
    # stopped in step 2 (calls: the parity check, step 1, step 2), step 3 being sampled: nothing of that is lost
    command += ["--learning_rate=1e-2"]
    patched = [word.replace("train_rl.py", "tests/patched_run.py") for word in command]
    stopped = run([*patched, f"--out_dir={tmp_path / 'stopped'}"], "stop:3", **environment())
    assert "stopped by signal 15" in stopped.output and len(kept(tmp_path / "stopped")) == 1, stopped.output
    done = run([*command, f"--out_dir={tmp_path / 'stopped'}", "--init_from=resume"], **environment())
    assert done.status == 0, done.output
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "moving")
    assert (tmp_path / "stopped/samples.jsonl").read_bytes() == (tmp_path / "moving/samples.jsonl").read_bytes()
