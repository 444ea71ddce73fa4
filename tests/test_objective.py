"""The objective against slow loops and finite differences; train_rl.py's metrics worked by hand."""
import itertools
import math
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from data import order, request_seed, step_requests
from objective import (compute_advantages, correct, estimate_kl, loss_weights, policy_loss, token_rewards,
                       whiten)
from train_rl import response_metrics, update_metrics

pytestmark = pytest.mark.usefixtures("world")
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()  # three tokens, EOS first, all left out
LOSS_AGGS = "seq_mean", "token_mean", "constant"
ADVANTAGES = "reinforce++", "reinforce++_baseline", "grpo", "dr_grpo", "rloo"


def ragged(seed, n=8):
    """Lengths, a mask, scores, and three (n, 7) log-probabilities with anything at all on padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (n,), generator=generator).tolist()
    scores = torch.randint(-1, 3, (n,), generator=generator) / 10
    logprobs = -3 * torch.rand(3, n, 7, generator=generator, dtype=torch.float64)
    return lengths, torch.arange(7) < torch.tensor(lengths)[:, None], scores, *logprobs


def slow_advantages(scores, kl, lengths, advantage, n, gamma, coeff):
    found = []
    for i, length in enumerate(lengths):
        group = [float(s) for s in scores[i // n * n:i // n * n + n]]
        score = float(scores[i])
        if advantage == "rloo":
            score -= (sum(group) - score) / (n - 1)
        elif advantage != "reinforce++":
            score -= statistics.fmean(group)
        if advantage == "grpo":
            score /= statistics.stdev(group) + 1e-6
        rewards = [-coeff * float(kl[i, t]) + (score if t == length - 1 else 0) for t in range(length)]
        found.append([sum(gamma ** (k - t) * rewards[k] for k in range(t, length)) for t in range(length)])
    tokens = [x for row in found for x in row]
    if advantage.startswith("reinforce++"):
        mean, deviation = statistics.fmean(tokens), math.sqrt(statistics.pvariance(tokens) + 1e-8)
        shift = mean if advantage == "reinforce++" else 0
        found = [[(x - shift) / deviation for x in row] for row in found]
    return found


def slow_loss(new, old, advantages, lengths, kind, low, high):
    """[(loss, ratio, clipped) of each token] of each response."""
    found = []
    for i, length in enumerate(lengths):
        logs = (new[i] - old[i])[:length].tolist()
        row = []
        for t in range(length):
            ratio = math.exp(sum(logs) / length if kind == "sequence" else logs[t])
            bounded, a = min(max(ratio, 1 - low), 1 + high), float(advantages[i, t])
            if kind == "cispo":
                row.append((-bounded * a * new[i, t].item(), ratio, bounded != ratio))
            else:
                row.append((-min(ratio * a, bounded * a), ratio, bounded * a < ratio * a))
        found.append(row)
    return found


def flat(rows):
    return [x for row in rows for x in row]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates_against_slow_ones_of_which_k3_is_the_default_and_never_negative(estimator):
    _, _, _, p, q, _ = ragged(0)
    for got, a, b in zip(estimate_kl(p, q, estimator).flatten(), p.flatten().tolist(), q.flatten().tolist()):
        slow = {"k1": a - b, "k2": (a - b) ** 2 / 2, "k3": math.exp(b - a) - (b - a) - 1}
        assert got.item() == pytest.approx(slow[estimator], abs=1e-6)
    assert (estimate_kl(torch.tensor([0.0, -1, -2]), torch.tensor([1e-6, -1 + 1e-6, -2])) >= 0).all()
    assert estimate_kl(torch.ones(1), torch.zeros(1)).item() == pytest.approx(math.exp(-1))


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("gamma, coeff", [(1.0, 0.0), (1.0, 0.3), (0.9, 0.0), (0.9, 0.3)])
def test_advantages_against_a_slow_version(advantage, gamma, coeff):
    lengths, mask, scores, old, _, ref = ragged(int(100 * (gamma + coeff)), n=12)
    kl, n = estimate_kl(old, ref), 4
    got = compute_advantages(scores, kl, mask, advantage, n, gamma, coeff)
    expected = slow_advantages(scores, kl, lengths, advantage, n, gamma, coeff)
    assert got[mask].tolist() == pytest.approx(flat(expected), abs=2e-6) and not got[~mask].any()


@pytest.mark.parametrize("advantage", ADVANTAGES[1:])
def test_a_group_of_equal_scores_gives_exactly_zero(advantage):
    generator = torch.Generator().manual_seed(0)
    for n in (2, 3, 5, 7, 8, 11):
        scores = (torch.rand(40, generator=generator) - 0.3).repeat_interleave(n)
        scores[:n] = torch.arange(n)  # one group has a signal
        mask = torch.arange(5) < torch.randint(1, 6, (40 * n, 1), generator=generator)
        got = compute_advantages(scores, torch.zeros(mask.shape), mask, advantage, n, 1.0, 0.0)
        assert got[:n].any() and torch.equal(got[n:], torch.zeros(39 * n, 5))


def test_a_score_stands_at_the_last_token_that_counts():
    holes = torch.tensor([[1, 0, 0, 1, 0], [0] * 5]).bool()  # as truncation to a weight of 0 leaves
    assert token_rewards(torch.ones(2), holes, holes, 0.5).tolist() == [[-0.5, 0, 0, 0.5, 0], [0] * 5]


def test_whitening_leaves_no_gradient_where_there_is_no_signal():
    assert whiten(torch.full((3, 3), -0.1), MASK).abs().max() < 1e-3, "equal scores"
    assert not whiten(torch.ones(3, 3), MASK & False).any(), "nothing is left in the loss"


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_two_ranks_have_the_advantages_weights_and_corrections_of_one(monkeypatch, advantage):
    """8 rows in minibatches of 4; all that counts on the second rank is one token."""
    _, mask, scores, old, new, ref = ragged(3)
    mask[4:] = False
    mask[5, 0] = True

    def all_of(rows):
        corrected, metrics = correct(old[rows], new[rows], mask[rows], "mask", 2.0)
        weights = [loss_weights(mask[rows], agg, len(rows) // 2, 9) for agg in LOSS_AGGS]
        advantages = compute_advantages(scores[rows], ref[rows], mask[rows], advantage, 2, 1.0, 0.1)
        return [advantages, corrected, *weights], metrics

    # the k-th minibatch of one process is the k-th of each of two, together
    order_of_one = [0, 1, 4, 5, 2, 3, 6, 7]
    whole, metrics = all_of(order_of_one)
    meeting, tensors = threading.Barrier(2, timeout=60), {}

    def all_reduce(tensor, op=dist.ReduceOp.SUM):
        tensors[threading.get_ident()] = tensor.clone()
        meeting.wait()
        both = torch.stack(list(tensors.values()))
        meeting.wait()
        tensor.copy_(both.sum(0) if op == dist.ReduceOp.SUM else both.amax(0))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with ThreadPoolExecutor(2) as ranks:
        parts = list(ranks.map(all_of, ([0, 1, 2, 3], [4, 5, 6, 7])))
    for name, value in metrics.items():
        assert parts[0][1][name] == parts[1][1][name] == pytest.approx(value), name
    for one, first, second in zip(whole, parts[0][0], parts[1][0]):
        torch.testing.assert_close(torch.cat([first, second])[order_of_one], one)


@pytest.mark.parametrize("correction", ["none", "truncate", "mask"])
def test_corrections_against_a_slow_version(correction):
    lengths, mask, _, old, rollout, _ = ragged(5)
    weights, metrics = correct(old, rollout, mask, correction, 1.5)
    expected, ratios, masked = [], [], 0
    for i, length in enumerate(lengths):
        logs = [float(old[i, t] - rollout[i, t]) for t in range(length)]
        of_tokens = [math.exp(sum(logs) if correction == "mask" else x) for x in logs]
        ratios += of_tokens
        masked += correction == "mask" and of_tokens[0] > 1.5
        expected += {"none": [1] * length, "truncate": [min(x, 1.5) for x in of_tokens],
                     "mask": [float(x <= 1.5) for x in of_tokens]}[correction]
    assert weights[mask].tolist() == pytest.approx(expected, abs=1e-6)
    assert metrics == pytest.approx({
        "correction/ratio": statistics.fmean(ratios), "correction/ratio_max": max(ratios),
        "correction/effective_sample_size": sum(ratios) ** 2 / sum(x * x for x in ratios) / len(ratios),
        "correction/masked": masked}, rel=1e-6)
    assert correction != "mask" or 0 < masked < 8


def test_a_response_at_the_cap_is_not_masked_and_no_ratio_is_that_of_padding():
    old = torch.zeros(3, 3)
    assert correct(old, old, MASK, "mask", 1)[0][MASK].tolist() == [1] * 4
    _, metrics = correct(old - 1, old, MASK, "none", 1)
    assert metrics["correction/ratio_max"] == pytest.approx(math.exp(-1)), "padding's ratio is 1"


def test_loss_weights_by_hand_and_for_every_minibatch_by_itself():
    mask = torch.cat([MASK, MASK[:2], torch.tensor([[1, 1, 0]]).bool()])  # 4 and 6 tokens, 2 and 3 responses
    firsts = {"token_mean": (1 / 4, 1 / 6), "constant": (1 / 20, 1 / 30), "seq_mean": (1 / 6, 1 / 9)}
    for loss_agg, (first, fourth) in firsts.items():
        weights = loss_weights(mask, loss_agg, 3, 10)[:, 0]
        assert weights[[0, 2, 3]].tolist() == pytest.approx([first, 0, fourth])
        assert not loss_weights(MASK & False, loss_agg, 3, 10).any(), "all left out: 0, not nan"


@pytest.mark.parametrize("kind", ["token", "sequence", "cispo"])
@pytest.mark.parametrize("loss_agg", LOSS_AGGS)
def test_losses_against_a_slow_version_and_their_gradients_against_finite_differences(kind, loss_agg):
    lengths, mask, _, old, new, ref = ragged(7)
    advantages = ref + 1.5  # of both signs
    new = new.requires_grad_()
    parts = policy_loss(new, old, advantages, mask, kind, 0.2, 0.3)
    expected = slow_loss(new, old, advantages, lengths, kind, 0.2, 0.3)
    for part, slow in zip(parts, zip(*flat(expected))):
        assert part[mask].tolist() == pytest.approx(list(slow), abs=1e-6)
    assert 0 < parts[2][mask].sum() < mask.sum(), "some are clipped"
    weights = loss_weights(mask, loss_agg, 8, 7).double()
    losses = [[loss for loss, *_ in row] for row in expected]
    mean = {"seq_mean": statistics.fmean(map(statistics.fmean, losses)),
            "token_mean": statistics.fmean(flat(losses)), "constant": statistics.fmean(map(sum, losses)) / 7}
    frozen = parts[1].detach().clamp(0.8, 1.3)  # of cispo, whose ratio is a constant to the gradient

    def whole(x, pg_loss):
        return (weights * (pg_loss + 0.1 * estimate_kl(x, ref))).sum()

    def moved(x):
        pg_loss, *_ = policy_loss(x, old, advantages, mask, kind, 0.2, 0.3)
        return whole(x, -frozen * advantages * x if kind == "cispo" else pg_loss)

    assert (weights * parts[0]).sum().item() == pytest.approx(mean[loss_agg], abs=1e-6)
    whole(new, parts[0]).backward()
    for i, t in itertools.product(range(8), range(7)):
        nudge = torch.zeros_like(old)
        nudge[i, t] = 1e-6
        with torch.no_grad():
            slope = (moved(new + nudge) - moved(new - nudge)) / 2e-6
        assert new.grad[i, t].item() == pytest.approx(slope.item(), abs=1e-6)


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
    names = "id", "correct", "score", "length", "finish_reason", "error", "response", "rewards"
    records = [dict(zip(names, values), query_length=10) for values in (
        ("a", True, 0.9, 4, "stop", "", "wait, wait: re-check", dict(accuracy=1.0, tidy=0.5)),
        ("b", False, -0.1, 8, "length", "timeout", "", dict(accuracy=0.0, tidy=0.0)),
        ("c", False, 0.0, 3, "stop", "unreadable", "so", dict(accuracy=0.0, tidy=0.1)))]
    got = response_metrics(records)
    assert math.isnan(got["train/groups_without_signal"]), "one response to each query: null"
    groups = [r | dict(score=r["id"] == "b", id=r["id"].replace("b", "a")) for r in 2 * records]
    assert response_metrics(groups)["train/groups_without_signal"] == 1, "of a: 0, 1, 0, 1; of c: 0, 0"
    expected = {
        "train/accuracy": 1 / 3, "train/score": 0.8 / 3, "reward/accuracy": 1 / 3, "reward/tidy": 0.2,
        "response/length": 5, "response/clip_ratio": 1 / 3, "judge/errors": 2, "judge/timeouts": 1,
        "tokens/prompt": 30, "tokens/response": 15, "reflection/reflection_ratio": 1 / 3,
        "reflection_words/wait": 2, "reflection_words/re-check": 1, "reflection_words/yet": 0}
    assert {key: got[key] for key in expected} == pytest.approx(expected)


def test_update_metrics_are_means_over_tokens_and_updates_without_those_left_out():
    names = "tokens grad_norm lr logprob_diff loss pg_loss kl_loss kl entropy ratio clipfrac approx_kl"
    names = names.split()
    first = dict(zip(names, (10, 2.0, 1e-3, 1, 2.0, 0.5, 3.0, 6, 5, 10, 0, 0)))
    left_out = dict(zip(names, (99, math.inf, 2e-3, 9, *[math.nan] * 8)))
    last = dict(zip(names, (30, 4.0, 3e-3, 9, 0.6, 0.1, 1.0, 2, 35, 50, 4, 2)))
    got = update_metrics([first, left_out, last], "a reference")
    expected = dict(loss=1.3, pg_loss=0.3, kl_loss=2.0, entropy=1.0, ratio=1.5, clipfrac=0.1,
                    approx_kl=0.05, grad_norm=3.0, lr=3e-3, updates=2, skipped=1)
    expected = {f"policy/{key}": value for key, value in expected.items()} | {"rollout/kl": 0.2}
    assert got == pytest.approx(expected | {"rollout/logprob_diff": 0.1})  # of the first update alone
    assert math.isnan(update_metrics([left_out], "a reference")["policy/ratio"])
    assert math.isnan(update_metrics([first], None)["policy/kl_loss"]), "without a reference: null"
