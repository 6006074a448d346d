"""Losses of score models: rewards that order answers, and costs whose sign is safety. Unreduced, (n,) in and out."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def reward_loss(
    chosen: Tensor, rejected: Tensor, *, regularization: float = 0.0, center_rewards_coefficient: float = 0.0
) -> Tensor:
    """Return -log σ(r_w - r_l) + μ(r_w² + r_l²) + c(r_w + r_l)².

    Sources: Safe RLHF (arXiv 2310.12773, equation 5) with the regularization of its code; the last term is that of
    TRL's `RewardTrainer` (Eisenstein et al., arXiv 2312.09244).

    Args:
        chosen: Rewards of the more helpful answers, (n,).
        rejected: Rewards of the less helpful ones, (n,).
        regularization: μ.
        center_rewards_coefficient: c.
    """
    loss = -logsigmoid(chosen - rejected) + regularization * (chosen**2 + rejected**2)
    return loss + center_rewards_coefficient * (chosen + rejected) ** 2


def cost_loss(costs: Tensor, signs: Tensor, order: Tensor, *, regularization: float = 0.0) -> Tensor:
    """Return -log σ(s_1 c_1) - log σ(s_2 c_2) - log σ(o (c_1 - c_2)) + μ(c_1² + c_2²).

    The third term is that of pairs of which it is known which answer is safer. Source: Safe RLHF (arXiv 2310.12773,
    equation 6).

    Args:
        costs: Costs of both answers, (n, 2).
        signs: 1 for an unsafe answer, -1 for a safe one, (n, 2). The loss of a pair with two zeros is 0.
        order: 1 if the first answer is less safe, -1 if the second is, 0 if that isn't known, (n,).
        regularization: μ.
    """
    is_known = (signs != 0).to(costs)
    loss = -(logsigmoid(signs * costs) * is_known).sum(-1) + regularization * (costs**2 * is_known).sum(-1)
    return loss - logsigmoid(order * (costs[:, 0] - costs[:, 1])) * (order != 0)
