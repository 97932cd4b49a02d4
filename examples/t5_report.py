"""Tables and plots of what `train_t5_bias.py` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

OURS, OTHER, MUTED = "#1864ab", "#e8590c", "#868e96"
SHOWN_DISTANCE = 20  # most messages are no longer


def print_results(results: dict[str, Any], console: Console) -> None:
    """All tables."""
    catalogs = ", ".join(
        f"{name} {part['pairs']} ({part['licence']}, Debian package {part['package']})"
        for name, part in results["catalogs"].items()
    )
    counts = results["pairs"]
    console.print(
        f"English to German from gettext catalogs: {catalogs}\n{counts['train']} pairs to train "
        f"on, {counts['valid']} for the held-out loss, {counts['test']} for the scores; "
        f"{results['model']['parameters'] / 1e6:.2f} M parameters"
    )
    if results["beside_reference"]:
        _print_checks(results["beside_reference"], console)
    _print_training(results, console)
    _print_scores(results, console)
    _print_bias(results["bias_by_distance"]["encoder"], console)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    console.print(f"\n{results['seconds']:.0f} s on {results['device']}; {versions}", style="dim")


def _table(console: Console, title: str, *first: str, numbers: tuple[str, ...]) -> Table:
    """Prints a title; returns a table with left-aligned and right-aligned columns."""
    console.print(f"\n[bold]{title}")
    table = Table(box=None)
    for name in first:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _print_checks(checks: dict[str, Any], console: Console) -> None:
    table = _table(
        console,
        "1. Trained beside the reference: the gradients of the relative position tables",
        "impl",
        "table",
        numbers=(
            "largest\ndifference",
            "largest error\nof impl",
            "largest error of\nthe reference",
            "steps within\nthe parity rule",
            "largest entry\nafter training",
            "trainings\ndiffer by",
        ),
    )
    for impl, check in checks.items():
        for name, steps in check["table_gradients"].items():
            largest = (max(steps[key]) for key in ("difference", "error", "reference_error"))
            after = check["tables_after"][name]
            table.add_row(
                impl,
                name.removesuffix("_table"),
                *(f"{value:.1e}" for value in largest),
                f"{sum(steps['within_parity_rule']):.0f} of {check['steps']}",
                f"{after['largest_entry']:.3f}",
                f"{after['largest_difference']:.1e}",
            )
    console.print(table)
    console.print(
        "Of the gradients: relative to their norm, errors against float64 at the same weights. Of "
        "the tables after\ntraining: entries, as they are."
    )
    for impl, check in checks.items():
        ours, other = check["losses"]["impl"], check["losses"]["reference"]
        gap = max(abs(a - b) for a, b in zip(ours, other, strict=True))
        console.print(
            f"Loss {ours[0]:.5f} to {ours[-1]:.5f} with impl={impl!r}, {other[0]:.5f} to "
            f"{other[-1]:.5f} with the reference, {gap:.1e} apart at most; a step takes "
            f"{check['step_seconds']['impl']:.2f} s and {check['step_seconds']['reference']:.2f} s"
        )


def _print_training(results: dict[str, Any], console: Console) -> None:
    settings, records = results["settings"], results["training"]
    table = _table(
        console,
        f"2. The long training, {settings['steps']} steps with impl='auto'",
        numbers=("step", "seconds", "training loss", "held-out loss"),
    )
    for record in records:
        train = f"{record['train']:.3f}" if "train" in record else ""
        table.add_row(
            f"{record['step']:.0f}", f"{record['seconds']:.0f}", train, f"{record['valid']:.3f}"
        )
    console.print(table)
    console.print(
        "Nats a token. The training loss is the mean since the row above, the held-out loss that "
        f"of {results['pairs']['valid']} pairs."
    )


def _print_scores(results: dict[str, Any], console: Console) -> None:
    total = results["pairs"]["test"]
    table = _table(
        console,
        f"3. {total} messages that were not trained on, by sacrebleu",
        "translation",
        numbers=("BLEU", "chrF", "as in the catalog"),
    )
    for name, scores in results["scores"].items():
        exact = f"{scores['exact']} ({scores['exact'] / total:.0%})"
        table.add_row(name, f"{scores['bleu']:.1f}", f"{scores['chrf']:.1f}", exact)
    console.print(table)
    console.print(
        f"Greedy decoding of all in {results['translation_seconds']:.0f} s. "
        f"{'; '.join(results['scores']['model']['signatures'])}",
        style="dim",
    )
    console.print("\nThe first of them, in the order of a hash, not chosen:")
    for sample in results["samples"]:
        console.print(f"  [bold]{escape(sample['english'])}")
        console.print(f"    catalog: {escape(sample['german'])}")
        console.print(f"    model:   {escape(sample['model'])}")


def _print_bias(heads: list[list[float]], console: Console) -> None:
    middle = len(heads[0]) // 2
    shown = (-8, -3, -2, -1, 0, 1, 2, 3, 8)
    table = _table(
        console,
        "4. What the encoder's table has learned: bias at a distance of so many tokens",
        "head",
        numbers=(*(f"{distance:+d}" if distance else "0" for distance in shown), "most at"),
    )
    for index, values in enumerate(_centered(heads)):
        nearest = range(-SHOWN_DISTANCE, SHOWN_DISTANCE + 1)
        best = max(nearest, key=lambda distance: (values[middle + distance], -abs(distance)))
        cells = (f"{values[middle + distance]:+.2f}" for distance in shown)
        table.add_row(str(index + 1), *cells, f"{best:+d}" if best else "0")
    console.print(table)
    console.print(
        f"Less each head's mean over distances up to {SHOWN_DISTANCE}, which no softmax can see. "
        "Negative: the key stands before the query."
    )


def _centered(heads: list[list[float]], causal: bool = False) -> list[list[float]]:
    """Biases by distance, less their mean over the distances that are shown."""
    middle = len(heads[0]) // 2
    seen = slice(middle - SHOWN_DISTANCE, middle + 1 + (0 if causal else SHOWN_DISTANCE))
    means = (sum(values[seen]) / len(values[seen]) for values in heads)
    return [[v - mean for v in values] for values, mean in zip(heads, means, strict=True)]


def draw(results: dict[str, Any], target: Path) -> list[Path]:
    """Writes TARGET.png, the trainings, and TARGET_tables.png, the biases learned."""
    # The first of them: torch's own is there for the table.
    check = next(iter(results["beside_reference"].values()), None)
    columns = 1 if check is None else 3
    figure = _figure(4.7 * columns, 4.2)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    if check is not None:
        _draw_losses(axes[0], check)
        _draw_errors(axes[1], check)
    _draw_training(axes[-1], results)
    for place in axes:
        _tidy(place)
        place.legend(frameon=False, fontsize=8.5)
    paths = [target.with_name(f"{target.name}{suffix}.png") for suffix in ("", "_tables")]
    figure.savefig(paths[0])
    biases = results["bias_by_distance"]
    columns = len(biases["encoder"])
    figure = _figure(0.6 + 1.7 * columns, 4.6)
    rows = figure.subplots(2, columns, squeeze=False, sharex="row", sharey="row")
    for axes, (stack, heads), color in zip(rows, biases.items(), (OURS, OTHER), strict=True):
        _draw_bias(axes, stack, heads, color)
    figure.suptitle(
        "Relative position biases learned: bias of a key by its distance from the query, less the "
        "head's mean",
        fontsize=11,
    )
    figure.supxlabel("key position - query position, tokens", fontsize=10)
    figure.savefig(paths[1])
    return paths


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's matplotlib is set up for
    return figure


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e9ecef", linewidth=0.8)


def _draw_losses(axes: Any, check: dict[str, Any]) -> None:
    ours, other = check["losses"]["impl"], check["losses"]["reference"]
    steps = range(1, check["steps"] + 1)
    axes.plot(steps, other, color=OTHER, linewidth=4, alpha=0.45, label="impl='reference'")
    axes.plot(steps, ours, color=OURS, linewidth=1.3, label=f"impl={check['impl']!r}")
    axes.set_title("Two trainings from the same weights", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats a token")


def _draw_errors(axes: Any, check: dict[str, Any]) -> None:
    for (name, steps), line in zip(check["table_gradients"].items(), ("-", ":"), strict=True):
        stack = name.removesuffix("_table")
        for key, who, color in (
            ("reference_error", "reference", OTHER),
            ("error", check["impl"], OURS),
        ):
            axes.plot(
                range(1, check["steps"] + 1), steps[key], line, color=color, linewidth=1.3,
                label=f"{who}, {stack} table",
            )  # fmt: skip
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 10, high * 4)  # room for the legend; the noise is not the message
    axes.set_title("Gradients of the tables: error against float64", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("relative to the gradient's norm")


def _draw_training(axes: Any, results: dict[str, Any]) -> None:
    records = results["training"]
    trained = records[1:]
    axes.plot(
        [record["step"] for record in records], [record["valid"] for record in records], ".-",
        color=OURS, label="held-out",
    )  # fmt: skip
    axes.plot(
        [record["step"] for record in trained], [record["train"] for record in trained], ".-",
        color=MUTED, label="training",
    )  # fmt: skip
    bleu, chrf = (results["scores"]["model"][name] for name in ("bleu", "chrf"))
    axes.set_title(f"The long training: BLEU {bleu:.1f}, chrF {chrf:.1f} in the end", fontsize=10)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")


def _draw_bias(axes: Any, stack: str, heads: list[list[float]], color: str) -> None:
    """One stack's biases, a panel for each head."""
    causal = stack == "decoder"
    middle = len(heads[0]) // 2
    distances = range(-SHOWN_DISTANCE, 1 if causal else SHOWN_DISTANCE + 1)
    for index, (place, values) in enumerate(zip(axes, _centered(heads, causal), strict=True)):
        shown = [values[middle + distance] for distance in distances]
        place.plot(distances, shown, drawstyle="steps-mid", linewidth=1.4, color=color)
        place.axhline(0, color="#adb5bd", linewidth=0.8)
        place.set_title(f"{stack}, head {index + 1}", fontsize=9)
        place.tick_params(labelsize=8)
        _tidy(place)
    axes[0].set_ylabel("bias")
