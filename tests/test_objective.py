"""The objective and the metrics of train_rl.py, on numbers worked by hand and against slow loops."""
import ast
import datetime
import math
import pathlib
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import distributed
from data import order, request_seed
from train_rl import (discounted_returns, k3, loss_weights, policy_loss, response_metrics, step_requests,
                      token_rewards, update_metrics, whiten)

ROOT = pathlib.Path(__file__).resolve().parent.parent
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()  # three tokens, EOS first, all padding


@pytest.fixture(scope="module")
def one_process():
    distributed.start()
    yield
    dist.destroy_process_group()


def test_k3_by_hand_and_its_mean_is_the_kl_divergence():
    new, ref = torch.tensor([0.0, -1.0, -2.0]), torch.tensor([0.0, -2.0, -1.0])
    torch.testing.assert_close(k3(new, ref), torch.tensor([0.0, math.exp(-1), math.e - 2]))
    assert (k3(new, new + 1e-6) >= 0).all(), "1e-6 is not rounded away"
    p, q = torch.randn(7).log_softmax(-1), torch.randn(7).log_softmax(-1)
    torch.testing.assert_close((p.exp() * k3(p, q)).sum(), (p.exp() * (p - q)).sum())


def test_a_score_stands_at_the_last_token_that_counts():
    kl = torch.tensor([[0.1, 0.2, 0.3], [0.4, 9.0, 9.0], [9.0, 9.0, 9.0]])
    rewards = token_rewards(torch.tensor([1.0, -1.0, 7.0]), kl, MASK, 0.5)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, -0.1, 0.85], [-1.2, 0, 0], [0, 0, 0]]))


def test_returns_accumulate_backwards():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [-1.0, 0.0, 0.0]])  # the second: EOS first, then padding
    torch.testing.assert_close(discounted_returns(rewards, 1.0), torch.tensor([[7.0, 6, 4], [-1, 0, 0]]))
    torch.testing.assert_close(discounted_returns(rewards, 0.5), torch.tensor([[3.0, 4, 4], [-1, 0, 0]]))


def test_whitened_values_have_mean_0_and_variance_1_over_the_mask_and_ignore_padding(one_process):
    values = torch.tensor([[1.0, 2.0, 3.0], [10.0, 99.0, 99.0], [99.0, 99.0, 99.0]])
    white = whiten(values, MASK)
    torch.testing.assert_close(white[MASK], (values[MASK] - 4) / values[MASK].std(unbiased=False))
    assert torch.equal(white, whiten(values.where(MASK, torch.tensor(-1e6)), MASK)) and not white[~MASK].any()
    assert whiten(torch.full((3, 3), -0.1), MASK).abs().max() < 1e-3, "equal scores give no gradient"


def test_whitening_is_over_all_ranks(monkeypatch):  # two, by gloo; one has no token that counts
    values, mask = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.ones(4, 3).bool()
    mask[1, 1:] = mask[2:] = False
    store, here = dist.HashStore(), threading.local()
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: here.group.allreduce([tensor]).wait())

    def rank(i):
        here.group = dist.ProcessGroupGloo(store, i, 2, datetime.timedelta(seconds=60))
        return whiten(values[2 * i:2 * i + 2], mask[2 * i:2 * i + 2])

    with ThreadPoolExecutor(2) as pool:
        white = torch.cat(list(pool.map(rank, range(2))))
    expected = (values - values[mask].mean()) / values[mask].std(unbiased=False)
    torch.testing.assert_close(white, expected * mask)


def test_loss_weights_sum_to_one_over_a_minibatch_however_it_is_cut():
    torch.testing.assert_close(loss_weights(MASK, "token_mean", 3, 4), MASK / 4)
    expected = MASK[:2] / torch.tensor([[6], [2]])  # Eq. 1: each response weighs the same
    torch.testing.assert_close(loss_weights(MASK[:2], "seq_mean", 2, 4), expected)
    torch.testing.assert_close(loss_weights(MASK[1:2], "seq_mean", 2, 4), expected[1:])  # a micro-batch
    assert (loss_weights(MASK, "seq_mean", 3, 4)[2] == 0).all(), "a row without a token of weight"


@pytest.mark.parametrize("ratio, advantage, loss, moves", [
    (1.0, 2.0, -2.0, True), (1.1, 2.0, -2.2, True),
    (1.5, 2.0, -2.6, False),  # clipped at 1.3 from above
    (1.5, -2.0, 3.0, True),  # getting more of what is bad is not clipped
    (0.5, -2.0, 1.6, False),  # clipped at 0.8 from below
    (0.5, 2.0, -1.0, True)])
def test_the_clipped_loss_by_hand(ratio, advantage, loss, moves):
    new = torch.tensor([math.log(ratio)], requires_grad=True)
    pg_loss, got, clipped = policy_loss(new, torch.zeros(1), torch.tensor([advantage]), 0.2, 0.3)
    assert (pg_loss.item(), got.item()) == pytest.approx((loss, ratio)) and clipped.item() is not moves
    pg_loss.backward()
    assert new.grad.item() == pytest.approx(-advantage * ratio if moves else 0)  # at ratio 1: REINFORCE


class Train(list):
    samples = property(lambda self: [SimpleNamespace(id=f"q{i}") for i in self])


def test_a_step_asks_for_the_same_whatever_the_number_of_ranks():
    train = Train(range(13))  # 13 // 4 = 3 steps an epoch
    for step, epoch, batch in ((1, 0, 0), (3, 0, 2), (4, 1, 0), (8, 2, 1)):
        rows = order(13, 5, epoch)[4 * batch:4 * batch + 4]
        expected = [(row, request_seed(5, step, f"q{row}", k)) for row in rows for k in range(3)]
        assert len({seed for _, seed in expected}) == 12, "three different responses to each query"
        for ranks in (1, 2, 4):
            parts = [step_requests(step, train, 5, 4, 3, SimpleNamespace(rank=r, world_size=ranks))
                     for r in range(ranks)]
            pairs = [list(zip(*part)) for part in parts]  # query p, all its samples, is of rank p % ranks
            assert [pair for p in range(4) for pair in pairs[p % ranks][p // ranks * 3:][:3]] == expected


def test_response_metrics_by_hand():
    names = "correct", "score", "length", "finish_reason", "error", "response", "rewards"
    got = response_metrics([dict(zip(names, values), query_length=10) for values in (
        (True, 0.9, 4, "stop", "", "wait, wait: re-check", dict(accuracy=1.0, tidy=0.5)),
        (False, -0.1, 8, "length", "timeout", "", dict(accuracy=0.0, tidy=0.0)),
        (False, 0.0, 3, "stop", "unreadable", "so", dict(accuracy=0.0, tidy=0.1)))])
    expected = {
        "train/accuracy": 1 / 3, "train/score": 0.8 / 3, "reward/accuracy": 1 / 3, "reward/tidy": 0.2,
        "response/length": 5, "response/clip_ratio": 1 / 3, "judge/errors": 2, "judge/timeouts": 1,
        "tokens/prompt": 30, "tokens/response": 15, "reflection/reflection_ratio": 1 / 3,
        "reflection_words/wait": 2, "reflection_words/re-check": 1, "reflection_words/yet": 0}
    assert {key: got[key] for key in expected} == pytest.approx(expected)


def test_update_metrics_are_means_over_tokens_and_updates_without_those_left_out():
    names = "tokens grad_norm lr logprob_diff pg_loss kl_loss kl entropy ratio clipfrac approx_kl".split()
    first = dict(zip(names, (10, 2.0, 1e-3, 1, 0.5, 3.0, 6, 5, 10, 0, 0)))
    left_out = dict(zip(names, (99, math.inf, 2e-3, 9, *[math.nan] * 7)))
    last = dict(zip(names, (30, 4.0, 3e-3, 9, 0.1, 1.0, 2, 35, 50, 4, 2)))
    got = update_metrics([first, left_out, last], 0.5, "a reference")
    expected = dict(loss=0.3 + 0.5 * 2, pg_loss=0.3, kl_loss=2.0, entropy=1.0, ratio=1.5, clipfrac=0.1,
                    approx_kl=0.05, grad_norm=3.0, lr=3e-3, updates=2, skipped=1)
    expected = {f"policy/{key}": value for key, value in expected.items()} | {"rollout/kl": 0.2}
    assert got == pytest.approx(expected | {"rollout/logprob_diff": 0.1})  # of the first update alone
    assert math.isnan(update_metrics([left_out], 0.5, "a reference")["policy/ratio"])
    assert math.isnan(update_metrics([first], 0.0, None)["policy/kl_loss"]), "without a reference: null"


@pytest.mark.parametrize("script", ["train_rl", "train_sft", "evaluate"])
def test_every_knob_is_read_somewhere(script):
    """By its name outside of the block, or as config["name"] in checkpoint.py, to which the dict goes."""
    _, block, rest = (ROOT / f"{script}.py").read_text(encoding="utf-8").split("\n# ---", 2)
    knobs = {node.targets[0].id for node in ast.parse("#" + block).body}
    names = [node for node in ast.walk(ast.parse("#" + rest)) if isinstance(node, ast.Name)]
    read = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    read |= set(re.findall(r'config\["(\w+)"\]', (ROOT / "checkpoint.py").read_text(encoding="utf-8")))
    assert len(knobs) > 10 and not knobs - read
