"""From scores and log-probabilities to a loss: the field's methods, next to each other, as pure functions.

A step calls estimate_kl, correct, compute_advantages, whose result it multiplies by correct's weights, and
loss_weights once; then policy_loss for each micro-batch, whose loss is

    (weights * (policy_loss(...)[0] + kl_loss_coeff * estimate_kl(new_logprobs, ref_logprobs))).sum()

The README's table says which knobs make which method; MAYE is arXiv 2504.02587. Matrices are (B, R): B
responses of this rank, R tokens in the longest; a mask is True on tokens that count. A query's
samples_per_query responses, its group, are consecutive rows. Other averages are over all ranks.
"""
import torch

from distributed import all_max, all_sum


# ---- scores -> advantages
def estimate_kl(logprobs, ref_logprobs, estimator="k3"):
    """Of any shape: estimates of KL(policy || reference) at tokens that the policy samples with probability p
    and the reference with q. k1: log p/q; k2: half its square; k3: q/p - 1 - log q/p. The means of k1 and k3
    are the KL; k2 and k3 are >= 0. Schulman, http://joschu.net/blog/kl-approx.html; MAYE, Eq. 1, has k3."""
    difference = ref_logprobs - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference ** 2 / 2
    return difference.expm1() - difference  # exp(x) - 1 - x would round to below 0 for small x


def baselined_scores(scores, advantage, samples_per_query):
    """(B,): scores (B,), for reinforce++ as they are; else less the mean of their group, or in rloo (arXiv
    2402.14740) of the rest of it. So dr_grpo (2503.20783) and reinforce++_baseline (2501.03262); grpo
    (2402.03300) also divides by the standard deviation (n - 1). A group of equal scores has exactly 0."""
    if advantage == "reinforce++":
        return scores
    n, groups = samples_per_query, scores.double().view(-1, samples_per_query)
    centred = groups - groups.sum(1, keepdim=True) / n  # float64 sums n equal float32 exactly, so 0 is 0
    if advantage == "rloo":
        centred = centred * n / (n - 1)  # x - mean of the others = n / (n - 1) * (x - mean)
    if advantage == "grpo":
        centred = centred / (groups.std(1, keepdim=True) + 1e-6)
    return centred.flatten().float()


def token_rewards(scores, kl, mask, kl_reward_coeff):
    """(B, R): -kl_reward_coeff * kl at each token, and the score (B,) at the last token that counts."""
    tokens_left = mask.flip(1).cumsum(1).flip(1)  # from each on, itself included
    return -kl_reward_coeff * kl * mask + scores[:, None] * (mask & (tokens_left == 1))


def discounted_returns(rewards, gamma):
    """(B, R): at each token the sum of its own and all later rewards, discounted by gamma per token."""
    returns, running = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        running = rewards[:, t] + gamma * running
        returns[:, t] = running
    return returns


def whiten(values, mask, shift_mean=True):
    """values at variance 1, and with shift_mean at mean 0, over the True entries of mask on all ranks; the
    others 0. A collective: every rank must call it. MAYE's code adds the mean back; we do not."""
    x = values.double() * mask
    count, total = all_sum(torch.stack([mask.sum().double(), x.sum()]))
    centred = (x - total / count.clamp(min=1)) * mask
    variance = all_sum((centred ** 2).sum()) / count.clamp(min=1)  # a difference of squares loses digits
    return ((centred if shift_mean else x) * (variance + 1e-8).rsqrt()).float()


def compute_advantages(scores, kl, mask, advantage, samples_per_query, gamma, kl_reward_coeff):
    """(B, R): the baselined scores and, from each token on, the KL penalties. No critic. A collective.
    reinforce++ whitens them over the step's tokens (MAYE; arXiv 2501.03262). Its _baseline only scales them:
    the source's shift by the step's mean would push groups of equal scores."""
    baselined = baselined_scores(scores, advantage, samples_per_query)
    returns = discounted_returns(token_rewards(baselined, kl, mask, kl_reward_coeff), gamma)
    if advantage.startswith("reinforce++"):
        returns = whiten(returns, mask, shift_mean=advantage == "reinforce++")
    return returns


# ---- trainer against sampler
def correct(old_logprobs, rollout_logprobs, mask, correction, cap):
    """(weights (B, R), metrics). The engine that sampled is not quite the policy: other kernels or precision,
    older weights. ratio: p(trainer) / p(engine) of a token; for correction "mask", of its whole response.
    "truncate": weights are that, at most cap (https://fengyao.notion.site/off-policy-rl); "mask": 0 where it
    is over cap, else 1; "none": 1. metrics: of that ratio, over the tokens of all ranks. A collective."""
    log_ratio = (old_logprobs - rollout_logprobs).double() * mask
    if correction == "mask":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    ratio, weights = log_ratio.exp(), torch.ones_like(log_ratio)
    if correction == "truncate":
        weights = ratio.clamp(max=cap)
    if correction == "mask":
        weights = (ratio <= cap).double()
    sums = mask.sum(), ratio[mask].sum(), (ratio[mask] ** 2).sum(), (weights == 0).all(1).sum()
    tokens, total, squares, masked = all_sum(torch.stack([x.double() for x in sums])).tolist()
    return weights.float(), {
        "correction/ratio": total / tokens, "correction/ratio_max": all_max(ratio[mask].max().item()),
        "correction/effective_sample_size": total ** 2 / (squares * tokens), "correction/masked": masked}


# ---- the loss
def policy_loss(new_logprobs, old_logprobs, advantages, mask, kind, clip_low, clip_high):
    """(B, R) each: the loss, to be minimised; the probability ratio; whether a bound acts. By kind:
    token: PPO's (arXiv 1707.06347), no gradient where the ratio left its bounds in the direction that pays;
    sequence: the same, the ratio being the geometric mean of its response's (GSPO, 2507.18071); cispo: log p
    times the bounded ratio, a constant, so that every token has a gradient (2506.13585)."""
    log_ratio = (new_logprobs - old_logprobs) * mask
    if kind == "sequence":
        mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = mean.expand_as(log_ratio)
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    if kind == "cispo":
        return -advantages * bounded.detach() * new_logprobs, ratio, bounded != ratio
    loss, clipped_loss = -advantages * ratio, -advantages * bounded
    return torch.maximum(loss, clipped_loss), ratio, clipped_loss > loss


def loss_weights(mask, loss_agg, minibatch_per_rank, max_new_tokens):
    """(B, R): losses times these, summed over a minibatch (minibatch_per_rank consecutive rows of each rank),
    are a mean. seq_mean: over a response's tokens, then over responses (MAYE, Eq. 1); token_mean: over all
    tokens (DAPO, arXiv 2503.14476); constant: a response's sum by max_new_tokens, then over responses
    (Dr.GRPO, 2503.20783). What mask leaves out is not counted. A collective."""
    minibatches = mask.unflatten(0, (-1, minibatch_per_rank))  # (minibatches, rows, R)
    counts = all_sum(torch.stack([minibatches.sum((1, 2)), minibatches.any(2).sum(1)])).clamp(min=1)
    n_tokens, n_responses = counts.repeat_interleave(minibatch_per_rank, 1)[..., None]  # (B, 1) each
    if loss_agg == "token_mean":
        return mask / n_tokens
    if loss_agg == "constant":
        return mask / (n_responses * max_new_tokens)
    return mask / (mask.sum(1, keepdim=True).clamp(min=1) * n_responses)
