"""VLLMEngine against vLLM itself, its CPU build: four engine starts in all, 15 s each."""
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForImageTextToText

import rollout_vllm
from configurator import UserError
from data import Dataset, Sampling, load_processor, request_seed, special_token_ids
from distributed import World
from rollout_vllm import VLLMEngine, engine_environment
from tiny import make_tiny, transformers_logprobs

ROOT = pathlib.Path(__file__).resolve().parent.parent
T1 = Sampling(1.0, 1.0, 24)
LANGUAGE = ("model.language_model.", "lm_head.")  # what names begin with
ALL = (*LANGUAGE, "model.visual.")
pytestmark = pytest.mark.skipif(  # CI says that it must be there: then all fail without it
    importlib.util.find_spec("vllm") is None and os.environ.get("NANOMAYE_VLLM") != "required",
    reason="vLLM is not installed (requirements-vllm.txt)")
# vLLM's NCCL group needs GPUs: this one, in its place at both ends, does the same over TCP
GROUP = """
import numpy, torch

class Group:
    device = torch.device("cpu")

    def __init__(self, meeting, rank=0):
        torch.cuda.current_stream = lambda: None
        self.rank, self.count = rank, 0
        self.store = torch.distributed.TCPStore(meeting["master_address"], meeting["master_port"],
                                                meeting["world_size"], is_master=rank == 0)

    def broadcast(self, tensor, src, stream):
        self.count += 1
        data = tensor.view(-1).view(torch.uint8).numpy()
        if self.rank == src:
            self.store.set(str(self.count), data.tobytes())
        else:
            data[:] = numpy.frombuffer(self.store.get(str(self.count)), "uint8")

    destroy = lambda self: None

trainer_init = Group
"""
NCCL_COMMON = "vllm.distributed.weight_transfer.nccl_common"
SERVER = f"""
import runpy, sys, vllm
sys.path[:0] = [{str(ROOT)!r}]
import group
sys.modules[{NCCL_COMMON!r}] = group


def noted(method):
    def call(*args, **kwargs):
        words = [method.__name__, *(str(x) for x in kwargs.values() if isinstance(x, (int, list)))]
        print(*words, file=open(__file__ + ".calls", "a"))
        return method(*args, **kwargs)
    return call


for name in "sleep", "wake_up", "collective_rpc", "generate":
    setattr(vllm.LLM, name, noted(getattr(vllm.LLM, name)))
runpy.run_path({rollout_vllm.__file__!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A tied Qwen2.5-VL (the CPU build wants heads of 32); its generation_config would spoil sampling."""
    folder = make_tiny(tmp_path_factory.mktemp("vllm") / "tied", "qwen2_5_vl", tied=True, hidden=64)
    path = pathlib.Path(folder) / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(
        repetition_penalty=5.0, temperature=0.1, top_k=1, top_p=0.1, do_sample=True)))
    return folder


def open_vllm(folder, world, dataset, max_model_len=1024):
    return VLLMEngine(folder, torch.float32, world,
                      *special_token_ids(dataset.tokenizer, folder), max_model_len, 0.8)


@pytest.fixture(scope="module")
def dataset(mixed_jsonl, model_dir):
    return Dataset(mixed_jsonl, *load_processor(model_dir), 28 * 28, 200704, 512)


@pytest.fixture(scope="module")
def engine(model_dir, dataset, world, tmp_path_factory):
    """As on a GPU that trains too: it sleeps between requests. The CPU build frees nothing then, but samples
    nothing either until all is awake."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "group.py").write_text(GROUP)
    (folder / "server.py").write_text(SERVER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout_vllm, "__file__", str(folder / "server.py"))
        patch.setattr(rollout_vllm, "shares_gpu", lambda world: True)
        engine = open_vllm(model_dir, world, dataset)
    yield engine
    engine.close()
    engine.close()
    assert engine.server.returncode is not None


@pytest.fixture
def model(model_dir):
    return AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32)


def seeds(n):
    return [request_seed(0, 0, "x", k) for k in range(n)]


def named(model, prefixes=ALL):
    """[(name, tensor)], a tied head by its own name too."""
    pairs = model.named_parameters(remove_duplicate=False)
    return [(name, p.detach()) for name, p in pairs if name.startswith(prefixes)]


def perturb(model, seed, prefixes=ALL):
    torch.manual_seed(seed)
    different = {p.data_ptr(): p for _, p in named(model, prefixes)}
    for p in different.values():
        p.add_(0.1 * torch.randn_like(p))


def largest_difference(model, dataset, rows, completions, temperature=1.0):
    """Of the engine's log-probabilities from those of transformers' own forward over the pixels; nats."""
    differences = []
    for row, (ids, logprobs, _) in zip(rows, completions):
        expected = transformers_logprobs(model, dataset, row, ids, temperature)[range(len(ids)), ids]
        differences.append((torch.tensor(logprobs) - expected).abs().max())
    return torch.stack(differences).max().item()  # unlike Python's max, it lets no NaN pass


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_transformers(engine, dataset, model, temperature):
    """With 0, 1 and 3 pictures. Prompt ids too: collect compares them. generation_config is not obeyed."""
    assert {len(sample.images) for sample in dataset.samples} == {0, 1, 3}
    rows = list(range(8))
    completions = engine.generate(dataset, rows, seeds(8), T1._replace(temperature=temperature))
    assert largest_difference(model, dataset, rows, completions, temperature) < 1e-4
    assert largest_difference(model, dataset, rows, completions, 2 * temperature) > 0.1


def test_another_prompt_than_the_trainers_is_an_error(engine, dataset, monkeypatch):
    ids = dataset.ids
    monkeypatch.setattr(dataset, "ids", lambda row: ids(row) + [65] * (row == 2))
    with pytest.raises(ValueError, match="sample tiny-2: vLLM's prompt is not the trainer's"):
        engine.generate(dataset, [1, 2], seeds(2), T1)


def test_tokens_depend_on_the_seed_alone(engine, dataset):
    rows = [0, 1, 1, 2, 5, 7, 3, 1]
    first = engine.generate(dataset, rows, seeds(8), T1)
    assert len({tuple(c.token_ids) for c in first}) == 8
    again = engine.generate(dataset, rows[::-1], seeds(8)[::-1], T1)[::-1]
    assert [c.token_ids for c in again] == [c.token_ids for c in first]
    alone = [engine.generate(dataset, [row], [seed], T1)[0] for row, seed in list(zip(rows, seeds(8)))[:3]]
    assert [c.token_ids for c in alone] == [c.token_ids for c in first[:3]]
    assert engine.generate(dataset, [], [], T1) == []


def test_more_prompts_than_fit_one_batch(engine, dataset):
    """Cutting a prompt to fill the batch would end the CPU build, with seeds."""
    rows, short = [i % 8 for i in range(256)], T1._replace(max_new_tokens=2)
    assert sum(len(dataset.ids(row)) for row in rows) > 8192
    assert len(engine.generate(dataset, rows, seeds(256), short)) == 256


def test_a_tiny_nucleus_is_greedy(engine, dataset):
    completions = engine.generate(dataset, [1] * 4, seeds(4), Sampling(1.0, 1e-6, 8))
    assert len({tuple(c.token_ids) for c in completions}) == 1


def test_no_vision_token_is_sampled_and_the_first_eos_ends_a_response(engine, dataset, model_dir):
    """At temperature 2 about each of the 265 tokens is sampled."""
    completions = engine.generate(dataset, [1] * 48, seeds(48), Sampling(2.0, 1.0, 48))
    sampled = {token for c in completions for token in c.token_ids}
    eos_ids, banned_ids = map(set, special_token_ids(dataset.tokenizer, model_dir))
    assert len(eos_ids) == 2 and eos_ids <= sampled and len(sampled) > 200
    assert not sampled & banned_ids
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for c in completions:
        assert not set(c.token_ids[:-1]) & eos_ids and len(c.logprobs) == len(c.token_ids)
        assert (c.token_ids[-1] in eos_ids) == (c.finish_reason == "stop")


@pytest.mark.parametrize("prefixes", [ALL, LANGUAGE, ("model.visual.merger.",)])
def test_new_weights_reach_the_engine(engine, dataset, model, prefixes):
    """Of all of the model, of the language model, of the connector."""
    rows = [0, 1, 2, 3]
    engine.load_weights(iter(named(model)))
    old = engine.generate(dataset, rows, seeds(4), T1)
    perturb(model, 1, prefixes)
    engine.load_weights(iter(named(model, prefixes)))
    new = engine.generate(dataset, rows, seeds(4), T1)
    assert [c.token_ids for c in new] != [c.token_ids for c in old]
    assert largest_difference(model, dataset, rows, new) < 1e-4


def test_an_engine_that_shares_its_gpu_sleeps_until_it_is_needed(engine, dataset, model, monkeypatch):
    calls = pathlib.Path(engine.server.args[1] + ".calls")
    calls.unlink()
    engine.load_weights(iter(named(model)))
    engine.generate(dataset, [0], seeds(1), T1)
    with monkeypatch.context() as patch:  # a step that fails: the request after it wakes what it needs
        patch.setattr(dataset, "ids", lambda row: [])
        with pytest.raises(ValueError):
            engine.generate(dataset, [0], seeds(1), T1)
    engine.load_weights(iter(named(model)))
    engine.load_weights(iter(named(model)))
    assert calls.read_text().splitlines() == [
        "wake_up ['weights']", "collective_rpc", "wake_up ['kv_cache']", "generate False", "sleep 1",
        "wake_up ['weights', 'kv_cache']", "generate False", "sleep 1",
        "wake_up ['weights']", "collective_rpc", "collective_rpc"]


def test_missing_tensors_are_refused_a_tied_head_too(engine, model):
    left_out = "lm_head.weight", "model.language_model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(ValueError, match="2 tensors are missing, such as lm_head.weight"):
        engine.load_weights((name, tensor) for name, tensor in named(model) if name not in left_out)


def test_new_weights_go_the_way_that_a_gpu_takes(engine, dataset, model):
    """All but NCCL itself. From here on, this server takes weights in no other way."""
    sys.path.insert(0, str(pathlib.Path(engine.server.args[1]).parent))
    import group
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, NCCL_COMMON, group)
        patch.setattr(torch.cuda, "current_stream", None)
        engine.nccl = engine.meet()
        perturb(model, 2)
        engine.load_weights(iter(named(model)))
    assert engine.nccl.count == len(named(model))
    completions = engine.generate(dataset, [0, 1, 2], seeds(3), T1)
    assert largest_difference(model, dataset, [0, 1, 2], completions) < 1e-4


def test_a_killed_server_is_an_error_that_says_so(engine, dataset, model):
    """The last test of this engine."""
    assert os.getsid(engine.server.pid) == engine.server.pid, "Ctrl-C would end it"
    engine.start(dataset, [0], seeds(1), T1._replace(max_new_tokens=900))
    os.kill(engine.server.pid, signal.SIGKILL)
    died = r"process died \(killed by signal 9\); go on from the last checkpoint by --init_from=resume"
    with pytest.raises(RuntimeError, match=died):
        engine.collect()
    with pytest.raises(RuntimeError, match=died):
        engine.load_weights(iter(named(model)))


def test_a_failed_start_shows_its_cause_at_the_first_use(model_dir, dataset, world):
    engine = open_vllm(model_dir, world, dataset, max_model_len=10**6)
    with pytest.raises(RuntimeError, match=r"died \(exit code 1\)(.|\n)*max_model_len"):
        engine.generate(dataset, [0], seeds(1), T1)


PARENT = """
import sys, time, torch
from distributed import World
from rollout_vllm import VLLMEngine
world = World(0, 1, 0, 1, None, torch.device("cpu"))
engine = VLLMEngine(sys.argv[1], torch.float32, world, [0], [], 1024, 0.8)
print(engine.server.pid, flush=True)
time.sleep(600)
"""


def test_the_server_dies_with_its_parent(model_dir):
    """By kill -9 too, and while it starts."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, model_dir], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        server = pathlib.Path("/proc", parent.stdout.readline().decode().strip())
        time.sleep(1)
        assert server.exists()
    finally:
        parent.kill()
        parent.wait()
    until = time.monotonic() + 8
    while server.exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not server.exists()


def test_only_the_first_rank_of_a_node_has_a_server(model_dir, dataset):
    assert not hasattr(open_vllm(model_dir, World(1, 2, 1, 2, None, torch.device("cpu")), dataset), "server")


def test_the_engine_takes_the_gpu_behind_those_that_train(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    monkeypatch.setenv("LOCAL_RANK", "0")

    def gpu(processes, gpus, trains):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        values = engine_environment(World(0, 1, 0, processes, None, torch.device("cuda", 0)), trains)
        assert "LOCAL_RANK" not in values
        return values["CUDA_VISIBLE_DEVICES"]
    assert (gpu(2, 3, True), gpu(1, 3, False), gpu(1, 1, False), gpu(1, 1, True)) == ("6", "5", "4", "4")
    with pytest.raises(UserError, match="needs a GPU for vLLM after the 3 that train, but 3"):
        gpu(3, 3, True)


def test_new_weights_reach_an_untied_qwen2(mixed_jsonl, world, tmp_path):
    folder = make_tiny(tmp_path / "untied", "qwen2_vl", tied=False, hidden=64)
    compare_with_transformers(folder, mixed_jsonl, world, change=1)


def compare_with_transformers(folder, jsonl, world, change=0):
    """Of a model that vLLM opens, with a change of its weights that it is given: the log-probabilities."""
    dataset = Dataset(jsonl, *load_processor(folder), 32 * 32, 200704, 512)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    engine = open_vllm(folder, world, dataset)
    if change:
        perturb(model, change)
        engine.load_weights(iter(named(model)))
    completions = engine.generate(dataset, [0, 1, 2, 3], seeds(4), T1)
    engine.close()
    assert largest_difference(model, dataset, [0, 1, 2, 3], completions) < 1e-4


def test_runs_keep_engine_and_trainer_together(mixed_jsonl, world, tmp_path):
    """train_rl.py with an untied Qwen3-VL, all of which is trained: two ranks with their one engine, then one
    that samples ahead; vLLM opens the checkpoint."""
    folder = make_tiny(tmp_path / "untied", "qwen3_vl", tied=False, hidden=64)
    knobs = f"""--model={folder} --train_data={mixed_jsonl} --val_data={mixed_jsonl} --rollout=vllm
        --batch_size=8 --minibatch_size=4 --max_new_tokens=32 --max_prompt_tokens=512 --min_pixels=1024
        --max_pixels=200704 --max_steps=3 --learning_rate=1e-2 --no_eos_score=0 --train_vit=True
        --train_connector=True
        --language_reward_coeff=1""".split()
    runs = {"two": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_rl.py",
                    "--eval_every_epochs=3"],
            "ahead": ["train_rl.py", "--eval_every_epochs=0", "--rollout_ahead=1", "--correction=truncate"]}
    for name, command in runs.items():
        command += [*knobs, f"--out_dir={tmp_path / name}"]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    two, ahead, evaluations, of_two, of_ahead = (
        [json.loads(line) for line in (tmp_path / f"{file}.jsonl").read_text().splitlines()]
        for file in ("two/metrics", "ahead/metrics", "two/eval", "two/samples", "ahead/samples"))
    assert [row["step"] for row in two] == [row["step"] for row in ahead] == [1, 2, 3]
    assert all(row["rollout/logprob_diff"] < 1e-4 for row in two) and len(evaluations) == 2 * 3
    assert two[2]["rollout/kl"] > 1e-3, "the weights have moved, and the engine's with them"
    # ahead: step 2 is sampled by the weights of step 1
    assert ahead[0]["rollout/logprob_diff"] < 1e-4
    assert all(row["rollout/logprob_diff"] > 1e-3 for row in ahead[1:])
    first = [{row["id"]: row["response"] for row in rows if (row["step"], row["split"]) == (1, "train")}
             for rows in (of_two, of_ahead)]
    assert len(first[0]) == 8 and first[0] == first[1], "the same tokens, whichever rank asks for them"
    compare_with_transformers(str(tmp_path / "two/checkpoints/step_000003"), mixed_jsonl, world)
