"""Show the effect of the shift alpha on one prompt with four answers, without training.

    python examples/four_actions.py [--out FILE.svg]

Answer y1 is always more helpful than y2, y2 than y3, y3 than y4; y2 and y3 are safe, y1 and y4 aren't. The
reference is uniform and beta is 0.5. Expected results:

* IPO uses helpfulness only and gives y1, which is unsafe, the highest probability.
* BFPO without the shift (alpha = 0) prefers safe answers and keeps the order of helpfulness among the safe and
  among the unsafe answers. It is close to the optimum of the bilinear objective but not equal to it, because the
  covariance of winning with the opponent's safety differs between answers; bfpo_soft is equal to it.
* alpha = 0.5, the released recipe, reverses the order of the two unsafe answers: y4 above y1.
* alpha = 1 gives the two safe answers the same probability.

Takes a second or two. All printed numbers are exact up to rounding. Needs matplotlib: pip install 'bfpo[dev]'.
"""

import argparse

import numpy as np

from bfpo.losses.labeling import LabelingFunction
from bfpo.losses.theory import TabularProblem, bilinear_reward, rl_optimum, soft_minimizer, supervised_minimizer

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ModuleNotFoundError as error:
    raise SystemExit(f"examples/four_actions.py needs {error.name}; pip install 'bfpo[dev]'") from None

BETA = 0.5
ANSWERS = ("y1", "y2", "y3", "y4")
# Okabe-Ito blue and vermilion; unsafe bars are also hatched, for grayscale prints.
SAFE, UNSAFE = {"color": "#0072B2"}, {"color": "#D55E00", "hatch": "///", "edgecolor": "white"}


def four_answers() -> TabularProblem:
    """Return the problem: of two answers the first always wins; against itself an answer wins with 1/2."""
    uniform = np.full(4, 0.25)
    return TabularProblem(uniform, uniform, np.triu(np.ones((4, 4)), 1) + 0.5 * np.eye(4), np.array([0, 1, 1, 0]))


def policies(problem: TabularProblem) -> dict[str, np.ndarray]:
    """Return the policies to compare, by name."""
    ipo = LabelingFunction(ss=0.5, su=0.5, us=0.5, uu=0.5)
    reward = bilinear_reward(problem)
    by_name = {
        "reference": problem.reference,
        "IPO": supervised_minimizer(problem, ipo, beta=BETA),
        "bilinear optimum": rl_optimum(problem, reward, beta=BETA),
    }
    for alpha in (0.0, 0.5, 1.0):
        labeling = LabelingFunction.from_parameters(alpha=alpha)
        by_name[f"BFPO alpha={alpha:g}"] = supervised_minimizer(problem, labeling, beta=BETA)
    return by_name | {"bfpo_soft": soft_minimizer(problem, reward, beta=BETA)}


def table(problem: TabularProblem, by_name: dict[str, np.ndarray]) -> str:
    """Return a table with the probabilities, the share of safe answers and the mean win rate of each policy."""
    lines = [f"{'policy':18}" + "".join(f"{name:>8}" for name in (*ANSWERS, "P(safe)", "E[win]"))]
    for name, policy in by_name.items():
        numbers = (*policy, policy @ problem.safe, policy @ problem.win_rates)
        lines.append(f"{name:18}" + "".join(f"{number:8.3f}" for number in numbers))
    return "\n".join(lines)


def draw(problem: TabularProblem, by_name: dict[str, np.ndarray], out: str) -> None:
    """Draw a panel of four bars for each policy but bfpo_soft, which is equal to the bilinear optimum."""
    figure, axes = plt.subplots(2, 3, figsize=(9, 5.4), sharex=True, sharey=True, layout="constrained")
    titles = {"bilinear optimum": "bilinear optimum = bfpo_soft"}
    drawn = {name: policy for name, policy in by_name.items() if name != "bfpo_soft"}
    for axis, (name, policy) in zip(axes.flat, drawn.items(), strict=True):
        for index, (probability, safe) in enumerate(zip(policy, problem.safe, strict=True)):
            label = None if axis is not axes[0, 0] or index > 1 else ("safe" if safe else "unsafe")
            axis.bar(index, probability, width=0.72, label=label, **(SAFE if safe else UNSAFE))
            axis.text(index, probability + 0.012, f"{probability:.2f}", ha="center", va="bottom", fontsize=9)
        axis.set_title(titles.get(name, name.replace("alpha=", "$\\alpha$ = ")), fontsize=11)
        axis.set_xticks(range(4), ANSWERS)
        axis.tick_params(length=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylim(0, 0.75)
    figure.supylabel("probability under the policy", fontsize=10)
    figure.supxlabel("answers, the most helpful one on the left", fontsize=10)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Four answers, seven policies, one figure.")
    parser.add_argument("--out", default="four_actions.svg", help="figure file; its suffix sets the format")
    options = parser.parse_args()
    four = four_answers()
    compared = policies(four)
    print(table(four, compared))
    draw(four, compared, options.out)
    print(f"wrote {options.out}")
