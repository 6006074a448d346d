"""What the shift alpha does, on one prompt with four answers and no training at all.

    python examples/four_actions.py [--out FILE.svg]

Answer y1 is always more helpful than y2, y2 than y3, y3 than y4; y2 and y3 are safe, y1 and y4 aren't. The
reference is uniform and beta is 0.5. What to expect:

* IPO sees helpfulness only and puts most on y1, which is unsafe.
* BFPO without the shift (alpha = 0) prefers safe answers and keeps the order of helpfulness within safe and
  within unsafe answers. It is close to the optimum of the bilinear objective but not equal to it, since winning
  goes with the opponent's safety more for some answers than for others; bfpo_soft is equal to it.
* alpha = 0.5, the released recipe, turns the order of the two unsafe answers round: y4 above y1.
* alpha = 1 leaves no order between the two safe ones.

Takes a second or two. Everything printed is exact, up to rounding.
"""

import argparse

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from bfpo.losses.labeling import LabelingFunction
from bfpo.losses.theory import TabularProblem, bilinear_reward, rl_optimum, soft_minimizer, supervised_minimizer

BETA = 0.5
ANSWERS = ("y1", "y2", "y3", "y4")
# Okabe-Ito blue and vermilion; unsafe bars are hatched too, so that the figure survives a gray printer.
SAFE, UNSAFE = {"color": "#0072B2"}, {"color": "#D55E00", "hatch": "///", "edgecolor": "white"}


def four_answers() -> TabularProblem:
    """Return the problem: the first of two answers always wins, a tie with itself is 1/2."""
    uniform = np.full(4, 0.25)
    return TabularProblem(uniform, uniform, np.triu(np.ones((4, 4)), 1) + 0.5 * np.eye(4), np.array([0, 1, 1, 0]))


def policies(problem: TabularProblem) -> dict[str, np.ndarray]:
    """Return the policies to compare, by name."""
    ipo = LabelingFunction(ss=0.5, su=0.5, us=0.5, uu=0.5)
    reward = bilinear_reward(problem)
    found = {
        "reference": problem.reference,
        "IPO": supervised_minimizer(problem, ipo, beta=BETA),
        "bilinear optimum": rl_optimum(problem, reward, beta=BETA),
    }
    for alpha in (0.0, 0.5, 1.0):
        labeling = LabelingFunction.from_parameters(alpha=alpha)
        found[f"BFPO alpha={alpha:g}"] = supervised_minimizer(problem, labeling, beta=BETA)
    return found | {"bfpo_soft": soft_minimizer(problem, reward, beta=BETA)}


def table(problem: TabularProblem, found: dict[str, np.ndarray]) -> str:
    """Return probabilities, share of safe answers and mean win rate, one policy a line."""
    lines = [f"{'policy':18}" + "".join(f"{name:>8}" for name in (*ANSWERS, "P(safe)", "E[win]"))]
    for name, policy in found.items():
        numbers = (*policy, policy @ problem.safe, policy @ problem.win_rates)
        lines.append(f"{name:18}" + "".join(f"{number:8.3f}" for number in numbers))
    return "\n".join(lines)


def draw(problem: TabularProblem, found: dict[str, np.ndarray], out: str) -> None:
    """Draw one panel of four bars for each policy but bfpo_soft, which coincides with the bilinear optimum."""
    figure, axes = plt.subplots(2, 3, figsize=(9, 5.4), sharex=True, sharey=True, layout="constrained")
    titles = {"bilinear optimum": "bilinear optimum = bfpo_soft"}
    shown = {name: policy for name, policy in found.items() if name != "bfpo_soft"}
    for axis, (name, policy) in zip(axes.flat, shown.items(), strict=True):
        for place, (probability, safe) in enumerate(zip(policy, problem.safe, strict=True)):
            label = None if axis is not axes[0, 0] or place > 1 else ("safe" if safe else "unsafe")
            axis.bar(place, probability, width=0.72, label=label, **(SAFE if safe else UNSAFE))
            axis.text(place, probability + 0.012, f"{probability:.2f}", ha="center", va="bottom", fontsize=9)
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
    parser.add_argument("--out", default="four_actions.svg", help="figure file; the suffix picks the format")
    options = parser.parse_args()
    setting = four_answers()
    results = policies(setting)
    print(table(setting, results))
    draw(setting, results, options.out)
    print(f"wrote {options.out}")
