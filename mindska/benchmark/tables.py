"""Measurements as Markdown."""

from __future__ import annotations

from typing import Any


def by_step(results: list[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    """The results by model, size, batch and step, "forward" or "train"."""
    groups: dict[tuple, list] = {}
    for result in results:
        step = "train" if result["what"] == "train" else "forward"
        size = f"{result['size']}x{result['width']}" if result.get("width") else result["size"]
        groups.setdefault((result["model"], size, result["batch"], step), []).append(result)
    return groups


def summary(results: list[dict[str, Any]]) -> str:
    """How many times as fast as PyTorch the variants are, as Markdown; "" without PyTorch."""
    names = list(dict.fromkeys(r["name"] for r in results if r["library"] != "pytorch"))
    lines = [f"| model | step | PyTorch | {' | '.join(names)} |", "|---|---" + "|---" * (len(names) + 1) + "|"]
    for (model, size, batch, step), group in by_step(results).items():
        medians = {r["name"]: r["median"] for r in group}
        if "PyTorch" not in medians:
            return ""
        ratios = [f"{medians['PyTorch'] / medians[name]:.2f}" if name in medians else "—" for name in names]
        lines.append(
            f"| `{model}`, {size}, batch {batch} | {step} | {medians['PyTorch']:.3f} s | {' | '.join(ratios)} |"
        )
    return "\n".join(lines) + "\n\n"


def table(results: list[dict[str, Any]], rate: float, costs: dict[str, int]) -> str:
    """All of the results as Markdown."""
    lines = [
        "| model | step | variant | seconds (fastest to slowest) | speed-up | memory | first step | of GEMM |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (model, size, batch, step), group in by_step(results).items():
        reference = next((r for r in group if r["library"] == "pytorch"), None)
        for r in group:
            cost = costs[model] * batch * (3 if step == "train" else 1)
            ratio = f"{reference['median'] / r['median']:.2f}" if reference else "—"
            memory = f"{r['memory'] / 2**30:.2f} GB"
            if reference and r is not reference and reference["memory"]:
                memory += f" ({r['memory'] / reference['memory']:.2f})"
            lines.append(
                f"| `{model}`, {size}, batch {batch} | {step} | {r['name']} | {r['median']:.3f} "
                f"({r['fastest']:.3f} to {r['slowest']:.3f}) | {ratio} | {memory} | {r['first']:.1f} s "
                f"| {100 * cost / r['median'] / rate:.0f} % |"
            )
    return "\n".join(lines)


def scaling_table(results: list[dict[str, Any]]) -> str:
    """The results of `scaling` as Markdown."""
    lines = [
        "| model | step | size | batch | ranks | library | seconds | images/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        rate = r["batch"] * r["ranks"] / r["median"]
        row = (f"`{r['model']}`", r["what"], r["size"], r["batch"], r["ranks"], r["name"])
        lines.append("| " + " | ".join(map(str, row)) + f" | {r['median']:.3f} | {rate:.1f} |")
    return "\n".join(lines)


def import_orders_table(results: list[dict[str, Any]]) -> str:
    """The results of `import_orders` as Markdown."""
    lines = [
        "| model | ranks | other processes | mindska first | mindspore first | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for first, second in zip(results[::2], results[1::2]):
        others = "one, on the first core" if first["busy"] else "none"
        seconds = " | ".join(f"{r['median']:.3f} s ({r['fastest']:.3f} to {r['slowest']:.3f})" for r in (first, second))
        ratio = second["median"] / first["median"]
        lines.append(f"| `{first['model']}` | {first['ranks']} | {others} | {seconds} | {ratio:.2f} |")
    return "\n".join(lines)


def starts_table(results: list[dict[str, Any]]) -> str:
    """The results of `starts` as Markdown."""
    lines = ["| model | step | variant | first start | second start |", "|---|---|---|---|---|"]
    for r in results:
        step = "train" if r["what"] == "train" else "forward"
        lines.append(f"| `{r['model']}` | {step} | {r['name']} | {r['first']:.1f} s | {r['second']:.1f} s |")
    return "\n".join(lines)
