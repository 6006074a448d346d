"""Tables and the plot of docs/performance.md, made from results alone."""

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
# bf16 matrix products without sparsity, from the makers' data sheets.
BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}

SYSTEM_MALLOC = ", system malloc"
HH, XSTEST = "hh, 9M, 4 pairs", "xstest, 9M, 4 pairs"
HH_8, HH_25M = "hh, 9M, 8 pairs", "hh, 25M, 4 pairs"


class Target(NamedTuple):
    """A ratio that is demanded: TRL's time to ours."""

    group: str
    theirs: str
    ours: str
    at_least: float


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


def ratios(result: dict[str, Any], theirs: str, ours: str) -> list[float]:
    """Return how many times as long one variant took as the other, round by round."""
    return [t / o for t, o in zip(result["seconds"][theirs], result["seconds"][ours], strict=True)]


def floor_shares(result: dict[str, Any], name: str) -> list[float]:
    """Return which share of a step's time its useful matrix products need at the measured rate, round by round."""
    rates = result["matmul_flops_per_second"][result["matmul_dtype"][name]]
    measured = zip(result["useful_flops"][name], rates, result["seconds"][name], strict=True)
    return [flops / rate / seconds for flops, rate, seconds in measured]


def show_interval(values: Sequence[float]) -> str:
    """Return the median, and the range, as text."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; all columns but the first are aligned to the right."""
    head = ("---", *["---:"] * (len(columns) - 1))
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, head, *rows))


def speed_table(result: dict[str, Any]) -> str:
    """Return a group's table: variant by variant, against the first of TRL's."""
    first, rows = next(iter(result["seconds"])), []
    for name, seconds in result["seconds"].items():
        tokens = [count / second for count, second in zip(result["num_tokens"], seconds, strict=True)]
        rows.append(
            (
                name,
                f"{1000 * median(seconds):,.0f}",
                "1" if name == first else show_interval(ratios(result, first, name)),
                f"{median(tokens):,.0f}",
                f"{median(floor_shares(result, name)):.0%}",
            )
        )
    return markdown(
        ("variant", "ms a step", f"times as fast as {first}", "useful tokens/s", "share of the floor"), rows
    )


def utilization(result: dict[str, Any], name: str, device: str) -> str:
    """Return useful operations over what a GPU's data sheet promises, as text; for GPUs of `BF16_PEAK`."""
    peak = next((peak for key, peak in BF16_PEAK.items() if key in device), None)
    if peak is None:
        return "an unknown share"
    measured = zip(result["useful_flops"][name], result["seconds"][name], strict=True)
    return f"{median(flops / seconds for flops, seconds in measured) / peak:.0%}"


def title(group: str) -> str:
    """Return a group's name as the docs say it."""
    data, rest = group.split(", ", 1)
    return f"{NAMES[data]}, {rest}"


def targets_table(results: dict[str, Any]) -> str:
    """Return the targets with what was measured, and by how much one is missed."""
    groups, rows = results["groups"], []
    for group, theirs, ours, demanded in SPEED_TARGETS:
        values = ratios(groups[group], theirs, ours)
        system = groups.get(group + SYSTEM_MALLOC)
        default = show_interval(ratios(system, theirs, ours)) if system and theirs in system["seconds"] else ""
        text = f"{show_interval(values)}, n = {len(values)}"
        what = f"{title(group)}: {theirs} / {ours}"
        rows.append((what, f"≥ {demanded}", text, verdict(median(values), demanded), default))
    for group, demanded in MEMORY_TARGETS.items():
        peaks = {name: memory["peak_mib"] for name, memory in results["memory"][group].items()}
        found = peaks["TRL"] / peaks["bfpo"]
        what = f"{title(group)}: peak memory, TRL / bfpo"
        rows.append((what, f"≥ {demanded}", f"{found:.2f}, n = 1", verdict(found, demanded), ""))
    for group in FLOOR_GROUPS:
        shares = floor_shares(groups[group], "bfpo")
        text = f"{median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%}), n = {len(shares)}"
        what = f"{title(group)}: share of the floor, bfpo"
        rows.append((what, f"≥ {FLOOR_TARGET:.0%}", text, verdict(median(shares), FLOOR_TARGET), ""))
    return markdown(("work", "demanded", "measured", "", "with malloc's defaults"), rows)


def verdict(found: float, demanded: float) -> str:
    """Return whether a target is met, or by how much it is missed."""
    return "met" if found >= demanded else f"missed by {1 - found / demanded:.0%}"


def speed_section(results: dict[str, Any]) -> str:
    """Return one table per group."""
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
    """Return peak and static memory of each variant, group by group."""
    rows = [
        (title(group), name, f"{memory['peak_mib']:,.0f}", f"{memory['static_mib']:,.0f}")
        for group, measured in results["memory"].items()
        for name, memory in measured.items()
    ]
    return markdown(("data", "variant", "peak, MiB", "static, MiB"), rows)


def exactness_table(results: dict[str, Any]) -> str:
    """Return the largest errors of float32 log-probabilities."""
    ways = ("TRL", "bfpo, padded", "bfpo")
    rows = [
        (
            title(group).split(",")[0],
            str(found["pairs"]),
            f"{found['median_logp']:,.0f}",
            *(f"{found[w]:.1e}" for w in ways),
        )
        for group, found in results["exactness"].items()
    ]
    return markdown(("data", "pairs", "median log-probability", *ways), rows)


def made_on(results: dict[str, Any]) -> str:
    """Return what the numbers were measured on."""
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
    """Return the text of the docs with every section between markers made anew."""
    for name, make in SECTIONS.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        if not re.search(pattern, text, flags=re.DOTALL):
            raise SystemExit(f"docs/performance.md has no markers for '{name}'")
        made = f"\n{make(results)}\n\n"
        text = re.sub(pattern, lambda found, made=made: found[1] + made + found[2], text, flags=re.DOTALL)
    return text


def update_docs(results: dict[str, Any], page: Path) -> None:
    """Write the sections of the page that come from results, and the plot beside it."""
    write_text(page, with_results(page.read_text(encoding="utf-8"), results))
    plot(results, page.with_suffix(".svg"))
    print(f"{page.name} and {page.with_suffix('.svg').name} written")


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw how many times as fast our step is, group by group, with the range over rounds."""
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "bfpo", "svg.fonttype": "none"}
    groups = [name for name in results["groups"] if not name.endswith(SYSTEM_MALLOC)]
    figure, axes = plt.subplots(figsize=(8, 0.6 * len(groups) + 1.5), layout="constrained")
    for offset, theirs, color in ((0.2, "TRL", "#4c72b0"), (-0.2, "TRL, completion-only head", "#dd8452")):
        values = [ratios(results["groups"][group], theirs, "bfpo") for group in groups]
        middles = [median(found) for found in values]
        places = [len(groups) - index + offset for index in range(len(groups))]
        spread = [
            [middle - min(found) for middle, found in zip(middles, values, strict=True)],
            [max(found) - middle for middle, found in zip(middles, values, strict=True)],
        ]
        axes.barh(places, middles, height=0.36, color=color, label=f"against {theirs}")
        axes.errorbar(middles, places, xerr=spread, fmt="none", ecolor="#333333", capsize=3, linewidth=1)
        demanded = {target.group: target.at_least for target in SPEED_TARGETS if target[1:3] == (theirs, "bfpo")}
        marks = [(demanded[group], place) for group, place in zip(groups, places, strict=True) if group in demanded]
        axes.plot(*zip(*marks, strict=True), "k|", markersize=14, markeredgewidth=2, label=None)
    axes.plot([], [], "k|", markersize=12, markeredgewidth=2, label="demanded")
    axes.axvline(1, color="#999999", linewidth=1)
    axes.set_yticks([len(groups) - index for index in range(len(groups))], [title(group) for group in groups])
    axes.set_xlabel("times as fast: median over rounds, and range")
    figure.legend(frameon=False, loc="outside upper center", ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
