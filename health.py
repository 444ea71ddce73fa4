"""What goes wrong in runs of reinforcement learning, seen in a step's metrics, and where to look then.

Each warning comes once in a run. The bounds are rules of thumb: a warning is a reason to look, not an error.
"""
import statistics

FIRST = 5  # steps that say what is usual in this run


class Health:
    """The metrics of a run so far; check() takes those of the next step."""

    def __init__(self, metrics, on_policy=True):
        """metrics: the rows of the steps before, when a run goes on; what they would have warned of is not said again.
        on_policy: whether trainer and engine should agree (with rollout_ahead=1 the engine is a step behind)."""
        self.rows, self.said, self.on_policy = [], set(), on_policy
        for row in metrics:
            self.check(row)

    def check(self, metrics):
        """[lines] for what this step is the first to show. metrics: a row of metrics.jsonl; null is never a reason."""
        self.rows.append(metrics)
        found = [(name, text) for name, text in self.findings() if name not in self.said]
        self.said |= {name for name, _ in found}
        return [f"health, step {metrics['step']}: {text}" for _, text in found]

    def series(self, key):
        return [row[key] for row in self.rows if row.get(key) is not None]

    def findings(self):
        now = self.rows[-1]
        clipped, accuracy, entropy = now.get("response/clip_ratio"), now.get("train/accuracy"), now.get("policy/entropy")
        difference, grad_norm = now.get("rollout/logprob_diff"), now.get("policy/grad_norm")
        if clipped is not None and clipped > 0.5:
            yield "clipped", (f"{clipped:.0%} of the responses were cut at max_new_tokens; read some in samples.jsonl: "
                              "do they ramble or repeat, or do they need a larger max_new_tokens?")
        if accuracy == 0:
            yield "none right", ("no response was right, so accuracy gives no signal; read some in samples.jsonl: is there a "
                                 "\\boxed{} with an answer, is judge/errors high, is the data too hard for the model?")
        if accuracy == 1:
            yield "all right", ("every response was right, so accuracy gives no signal; look at eval.jsonl: end the run, or "
                                "give it harder problems")
        differences = self.series("rollout/logprob_diff")
        if self.on_policy and difference is not None and len(differences) > FIRST and difference > 0.01:
            usual = statistics.median(differences[:FIRST])
            if statistics.median(differences[-3:]) > 3 * usual:
                yield "engine", (f"rollout/logprob_diff rose from {usual:.1e} to {difference:.1e}: the engine drifts away "
                                 "from the policy; are all trained weights in the sync, is the engine's dtype the trainer's?")
        entropies = self.series("policy/entropy")
        if entropy is not None and len(entropies) > FIRST and entropy < 0.1 * statistics.median(entropies[:FIRST]):
            yield "entropy", (f"policy/entropy fell to {entropy:.3f}, under a tenth of the first steps': the policy hardly "
                              "explores any more; compare reward and accuracy in eval.jsonl, lower learning_rate, raise "
                              "clip_high or kl_loss_coeff")
        norms = self.series("policy/grad_norm")
        if grad_norm is not None and len(norms) > FIRST and grad_norm > 10 * statistics.median(norms[:-1]):
            yield "gradient", (f"policy/grad_norm is {grad_norm:.3g}, over ten times its median "
                               f"{statistics.median(norms[:-1]):.3g}; look at this step's samples.jsonl, policy/approx_kl "
                               "and policy/clipfrac; clip_grad_norm bounds the update, a lower learning_rate makes it rarer")
