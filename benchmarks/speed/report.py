"""Tables and plot of docs/performance.md, made from the results file only."""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from bfpo.core.files import write_text

NAMES = {
    "hh": "HH-RLHF",
    "xstest": "XSTest",
    "alpaca": "AlpacaEval",
    "ultrafeedback": "UltraFeedback profile",
    "pku": "PKU-SafeRLHF profile",
}
# FLOP/s of bf16 matrix products without sparsity, from the vendors' data sheets.
BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}

SYSTEM_MALLOC = ", system malloc"
HH, XSTEST = "hh, 9M, 4 pairs", "xstest, 9M, 4 pairs"
HH_8, HH_25M = "hh, 9M, 8 pairs", "hh, 25M, 4 pairs"


class Target(NamedTuple):
    """Minimum ratio of TRL's time to ours."""

    group: str
    baseline: str
    ours: str
    min_ratio: float


SPEED_TARGETS = (
    Target(HH, "TRL", "bfpo", 3.8),
    Target(HH_25M, "TRL", "bfpo", 3.0),
    Target(HH_8, "TRL", "bfpo", 4.0),
    Target(XSTEST, "TRL", "bfpo", 1.7),
    Target(HH, "TRL, completion-only head", "bfpo", 2.3),
    Target(HH_25M, "TRL, completion-only head", "bfpo", 2.3),
    Target(HH_8, "TRL, completion-only head", "bfpo", 2.3),
    Target(XSTEST, "TRL, completion-only head", "bfpo", 1.4),
    Target(HH, "TRL, selective bf16", "bfpo, selective bf16", 4.5),
    Target(XSTEST, "TRL, selective bf16", "bfpo, selective bf16", 2.0),
)
MEMORY_TARGETS = {HH: 4.0, XSTEST: 2.0}
FLOOR_TARGET, FLOOR_GROUPS = 0.70, (HH, HH_8, HH_25M, XSTEST)


def ratios(result: dict[str, Any], baseline: str, variant: str) -> list[float]:
    """Return the ratio of the baseline's time to the variant's in each round."""
    seconds = result["seconds"]
    rounds = zip(seconds[baseline], seconds[variant], strict=True)
    return [baseline_seconds / variant_seconds for baseline_seconds, variant_seconds in rounds]


def floor_shares(result: dict[str, Any], name: str) -> list[float]:
    """Return the share of a step's time that its useful matrix products take at the measured rate, by round."""
    rates = result["matmul_flops_per_second"][result["matmul_dtype"][name]]
    rounds = zip(result["useful_flops"][name], rates, result["seconds"][name], strict=True)
    return [flops / rate / seconds for flops, rate, seconds in rounds]


def format_range(values: Sequence[float]) -> str:
    """Return the median and the range as text."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with all columns but the first aligned to the right."""
    alignment = ("---", *["---:"] * (len(columns) - 1))
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, alignment, *rows))


def speed_table(result: dict[str, Any]) -> str:
    """Return a group's table of variants, with ratios to the first of TRL's."""
    first, rows = next(iter(result["seconds"])), []
    for name, seconds in result["seconds"].items():
        tokens = [count / second for count, second in zip(result["num_tokens"], seconds, strict=True)]
        rows.append(
            (
                name,
                f"{1000 * median(seconds):,.0f}",
                "1" if name == first else format_range(ratios(result, first, name)),
                f"{median(tokens):,.0f}",
                f"{median(floor_shares(result, name)):.0%}",
            )
        )
    return markdown_table(
        ("variant", "ms a step", f"times as fast as {first}", "useful tokens/s", "share of the floor"), rows
    )


def utilization(result: dict[str, Any], name: str, device: str) -> float | None:
    """Return the share of useful operations in the peak of the GPU's data sheet; None if it isn't in `BF16_PEAK`."""
    peak = next((peak for key, peak in BF16_PEAK.items() if key in device), None)
    if peak is None:
        return None
    rounds = zip(result["useful_flops"][name], result["seconds"][name], strict=True)
    return median(flops / seconds for flops, seconds in rounds) / peak


def title(group: str) -> str:
    """Return a group's name in the docs."""
    data, rest = group.split(", ", 1)
    return f"{NAMES[data]}, {rest}"


def targets_table(results: dict[str, Any]) -> str:
    """Return the table of targets with the measured values, and by how much a target is missed."""
    groups, rows = results["groups"], []
    for group, baseline, ours, min_ratio in SPEED_TARGETS:
        values = ratios(groups[group], baseline, ours)
        system = groups.get(group + SYSTEM_MALLOC)
        default = format_range(ratios(system, baseline, ours)) if system and baseline in system["seconds"] else ""
        measured = f"{format_range(values)}, n = {len(values)}"
        label = f"{title(group)}: {baseline} / {ours}"
        rows.append((label, f"≥ {min_ratio}", measured, verdict(median(values), min_ratio), default))
    for group, min_ratio in MEMORY_TARGETS.items():
        peaks = {name: memory["peak_mib"] for name, memory in results["memory"][group].items()}
        ratio = peaks["TRL"] / peaks["bfpo"]
        label = f"{title(group)}: peak memory, TRL / bfpo"
        rows.append((label, f"≥ {min_ratio}", f"{ratio:.2f}, n = 1", verdict(ratio, min_ratio), ""))
    for group in FLOOR_GROUPS:
        shares = floor_shares(groups[group], "bfpo")
        system = groups.get(group + SYSTEM_MALLOC)
        default = _share_range(floor_shares(system, "bfpo")) if system and "bfpo" in system["seconds"] else ""
        measured = f"{_share_range(shares)}, n = {len(shares)}"
        label = f"{title(group)}: share of the floor, bfpo"
        rows.append((label, f"≥ {FLOOR_TARGET:.0%}", measured, verdict(median(shares), FLOOR_TARGET), default))
    return markdown_table(("work", "demanded", "measured", "", "with malloc's defaults"), rows)


def _share_range(shares: Sequence[float]) -> str:
    return f"{median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})"


def verdict(value: float, target: float) -> str:
    """Return whether a target is met, or by how much it is missed."""
    return "met" if value >= target else f"missed by {1 - value / target:.0%}"


def speed_section(results: dict[str, Any]) -> str:
    """Return a section with one table per group."""
    parts = []
    for name, result in results["groups"].items():
        if name.endswith(SYSTEM_MALLOC):
            continue
        prompt, chosen, rejected = result["mean_lengths"]
        waste = sum(result["padded_slots"]) / sum(result["num_tokens"])
        rates = {key: median(values) / 1e9 for key, values in result["matmul_flops_per_second"].items()}
        parts.append(
            f"**{title(name)}** (n = {len(result['num_tokens'])}; mean lengths {prompt:.0f} / {chosen:.0f} / "
            f"{rejected:.0f}; {waste:.2f} padded places a useful token; matrix products at "
            + ", ".join(f"{rate:.0f} GFLOP/s in {key}" for key, rate in sorted(rates.items(), reverse=True))
            + f")\n\n{speed_table(result)}"
        )
    return "\n\n".join(parts)


def memory_table(results: dict[str, Any]) -> str:
    """Return the table of peak and static memory by group and variant."""
    rows = [
        (title(group), name, f"{memory['peak_mib']:,.0f}", f"{memory['static_mib']:,.0f}")
        for group, variants in results["memory"].items()
        for name, memory in variants.items()
    ]
    return markdown_table(("data", "variant", "peak, MiB", "static, MiB"), rows)


def exactness_table(results: dict[str, Any]) -> str:
    """Return the table of the largest errors of float32 log-probabilities."""
    layouts = ("TRL", "bfpo, padded", "bfpo")
    rows = [
        (
            title(group).split(",")[0],
            str(errors["pairs"]),
            f"{errors['median_logp']:,.0f}",
            *(f"{errors[layout]:.1e}" for layout in layouts),
        )
        for group, errors in results["exactness"].items()
    ]
    return markdown_table(("data", "pairs", "median log-probability", *layouts), rows)


def made_on(results: dict[str, Any]) -> str:
    """Return a sentence on the machine, the versions and the command of the measurements."""
    versions, hardware = results["versions"], results["hardware"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "trl"))
    return (
        f"Measured on one thread of a {hardware['cores']}-core {hardware['processor']} machine, with {packages} and "
        f"`src` at commit `{results['source'][:12]}`, seed {results['seed']}, by `{results['command']}`."
    )


SECTIONS = {
    "made-on": made_on,
    "targets": targets_table,
    "speed": speed_section,
    "memory": memory_table,
    "exactness": exactness_table,
}


def with_results(text: str, results: dict[str, Any]) -> str:
    """Return the text of the docs with every section between markers replaced."""
    for name, make_section in SECTIONS.items():
        text = with_section(text, name, make_section(results))
    return text


def with_section(text: str, name: str, section: str) -> str:
    """Return the text of the docs with the section between the markers of a name replaced."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    if not re.search(pattern, text, flags=re.DOTALL):
        raise SystemExit(f"docs/performance.md has no markers for '{name}'")
    return re.sub(pattern, lambda match: f"{match[1]}\n{section}\n\n{match[2]}", text, flags=re.DOTALL)


def update_docs(results: dict[str, Any], page: Path) -> None:
    """Write the page's sections that come from the results, and the plot next to it."""
    write_text(page, with_results(page.read_text(encoding="utf-8"), results))
    plot(results, page.with_suffix(".svg"))
    print(f"{page.name} and {page.with_suffix('.svg').name} written")


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the speed-up of our step by group, with the range over rounds."""
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "bfpo", "svg.fonttype": "none"}
    groups = [name for name in results["groups"] if not name.endswith(SYSTEM_MALLOC)]
    figure, axes = plt.subplots(figsize=(8, 0.6 * len(groups) + 1.5), layout="constrained")
    for offset, baseline, color in ((0.2, "TRL", "#4c72b0"), (-0.2, "TRL, completion-only head", "#dd8452")):
        values = [ratios(results["groups"][group], baseline, "bfpo") for group in groups]
        medians = [median(group_ratios) for group_ratios in values]
        heights = [len(groups) - index + offset for index in range(len(groups))]
        spread = [
            [center - min(group_ratios) for center, group_ratios in zip(medians, values, strict=True)],
            [max(group_ratios) - center for center, group_ratios in zip(medians, values, strict=True)],
        ]
        axes.barh(heights, medians, height=0.36, color=color, label=f"against {baseline}")
        axes.errorbar(medians, heights, xerr=spread, fmt="none", ecolor="#333333", capsize=3, linewidth=1)
        targets = {target.group: target.min_ratio for target in SPEED_TARGETS if target[1:3] == (baseline, "bfpo")}
        marks = [(targets[group], height) for group, height in zip(groups, heights, strict=True) if group in targets]
        axes.plot(*zip(*marks, strict=True), "k|", markersize=14, markeredgewidth=2, label=None)
    axes.plot([], [], "k|", markersize=12, markeredgewidth=2, label="demanded")
    axes.axvline(1, color="#999999", linewidth=1)
    axes.set_yticks([len(groups) - index for index in range(len(groups))], [title(group) for group in groups])
    axes.set_xlabel("times as fast: median over rounds, and range")
    figure.legend(frameon=False, loc="outside upper center", ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
