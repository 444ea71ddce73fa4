"""The objective of train_rl.py, against numbers worked by hand and slow loops."""
import math

import pytest
import torch
import torch.distributed as dist

from model import learning_rate_at
from train_rl import discounted_returns, importance_weights, k3, loss_weights, policy_loss, token_rewards, whiten

MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()  # three tokens, EOS first, all padding


@pytest.fixture(scope="module", autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_k3_by_hand():
    new, ref = torch.tensor([0.0, -1.0, -2.0]), torch.tensor([0.0, -2.0, -1.0])
    torch.testing.assert_close(k3(new, ref), torch.tensor([0.0, math.exp(-1) + 1 - 1, math.exp(1) - 1 - 1]))


def test_k3_estimates_the_kl_divergence():
    torch.manual_seed(0)
    p, q = torch.randn(7).log_softmax(-1), torch.randn(7).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    torch.testing.assert_close((p.exp() * k3(p, q)).sum(), exact)  # the expectation over p, summed exactly


def test_score_stands_at_the_last_token_that_counts():
    kl = torch.tensor([[0.1, 0.2, 0.3], [0.4, 9.0, 9.0]])
    rewards = token_rewards(torch.tensor([1.0, -1.0]), kl, MASK[:2], 0.5)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, -0.1, 1 - 0.15], [-1 - 0.2, 0.0, 0.0]]))


def test_returns_accumulate_backwards():
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    torch.testing.assert_close(discounted_returns(rewards, 1.0), torch.tensor([[7.0, 6.0, 4.0]]))
    torch.testing.assert_close(discounted_returns(rewards, 0.5), torch.tensor([[1 + 1 + 1.0, 2 + 2.0, 4.0]]))


def test_whitened_values_have_mean_0_and_variance_1_over_the_mask():
    values = torch.tensor([[1.0, 2.0, 3.0], [10.0, 99.0, 99.0], [99.0, 99.0, 99.0]])
    white = whiten(values, MASK)
    counted = white[MASK]
    assert counted.mean().abs() < 1e-6 and abs(counted.var(unbiased=False) - 1) < 1e-5
    torch.testing.assert_close(counted, (values[MASK] - 4) / values[MASK].std(unbiased=False))


def test_advantages_ignore_padding():
    values = torch.tensor([[1.0, 2.0, 3.0], [10.0, 5.0, 5.0], [5.0, 5.0, 5.0]])
    other = torch.where(MASK, values, torch.full_like(values, 1e6))
    assert torch.equal(whiten(values, MASK), whiten(other, MASK))
    assert (whiten(other, MASK)[~MASK] == 0).all()


def test_whitening_equal_scores_gives_no_gradient():
    assert whiten(torch.full((2, 3), -0.1), MASK[:2]).abs().max() < 1e-3


def test_loss_weights_sum_to_one_over_a_minibatch():
    mask = MASK[:2]
    torch.testing.assert_close(loss_weights(mask, "token_mean", 2, 4), torch.tensor([[1, 1, 1], [1, 0, 0]]) / 4)
    expected = torch.tensor([[1 / 6, 1 / 6, 1 / 6], [1 / 2, 0, 0]])  # Eq. 1: each response weighs the same
    torch.testing.assert_close(loss_weights(mask, "seq_mean", 2, 4), expected)
    parts = [loss_weights(mask[i:i + 1], "seq_mean", 2, 4) for i in range(2)]  # cut in two micro-batches: the same
    torch.testing.assert_close(torch.cat(parts), expected)


def test_loss_weights_of_a_row_without_tokens_are_zero():
    assert (loss_weights(MASK, "seq_mean", 3, 4)[2] == 0).all()


@pytest.mark.parametrize("ratio, advantage, loss, moves", [
    (1.0, 2.0, -2.0, True),
    (1.1, 2.0, -2.2, True),
    (1.5, 2.0, -2.6, False),  # clipped at 1.3 from above
    (1.5, -2.0, 3.0, True),  # getting more of what is bad is not clipped
    (0.5, -2.0, 1.6, False),  # clipped at 0.8 from below
    (0.5, 2.0, -1.0, True),
])
def test_clipped_loss_by_hand(ratio, advantage, loss, moves):
    new = torch.tensor([math.log(ratio)], requires_grad=True)
    zero = torch.zeros(1)
    pg_loss, kl, got_ratio, clipped = policy_loss(new, zero, zero, torch.tensor([advantage]), 0.2, 0.3)
    assert pg_loss.item() == pytest.approx(loss) and got_ratio.item() == pytest.approx(ratio)
    assert clipped.item() is (not moves)
    assert kl.item() == pytest.approx(1 / ratio - math.log(1 / ratio) - 1)
    pg_loss.backward()
    assert (new.grad.abs().item() > 0) == moves


def test_on_policy_gradient_is_reinforce():
    """at ratio 1 the gradient with respect to a token's log-probability is minus its advantage."""
    new = torch.zeros(3, requires_grad=True)
    advantages = torch.tensor([0.5, -1.0, 2.0])
    policy_loss(new, torch.zeros(3), torch.zeros(3), advantages, 0.2, 0.2)[0].sum().backward()
    torch.testing.assert_close(new.grad, -advantages)


def test_learning_rate_rises_then_follows_a_cosine():
    rates = [learning_rate_at(i, 100, 2.0, 0.1) for i in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0) and rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.01
    assert learning_rate_at(0, 1, 2.0, 0.0) == 2.0


def test_importance_weights_by_hand():
    """The policy has doubled, halved and quintupled what the sampler gave; the last column is padding."""
    rollout = torch.tensor([[-1.0, -2.0, -3.0, 0.0]])
    logprobs = rollout + torch.tensor([[math.log(2), -math.log(2), math.log(5), 0.0]])
    torch.testing.assert_close(importance_weights(logprobs, rollout, 3.0), torch.tensor([[2.0, 0.5, 3.0, 1.0]]))


def test_importance_weights_mend_the_expectation_of_an_older_sampler():
    torch.manual_seed(0)
    sampler, policy = torch.randn(7).log_softmax(-1), torch.randn(7).log_softmax(-1)
    advantages = torch.randn(7)
    mended = (sampler.exp() * importance_weights(policy, sampler, 1e9) * advantages).sum()
    torch.testing.assert_close(mended, (policy.exp() * advantages).sum())
