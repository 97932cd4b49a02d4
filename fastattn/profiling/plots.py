"""Pictures of a profile, from its values alone: one panel each, or all on a page.

plot(Profile.load("llama.json"), "llama.png")
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastattn.profiling.results import OUTSIDE, REST, Case, Phase, Profile, Row, Shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colors, which are told apart by people who see few of them.
COLORS = {"fastattn": "#0072B2", "transformers": "#999999", "transformers+fastattn": "#56B4E9"}
PARTS = {"weights": "#0072B2", "cache": "#E69F00", "activations": "#009E73"}
_SHARES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
_MARKS = "os^Dv*"
_PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}  # behind a text
LISTED = 6
"""Operators with a color of their own."""

Draw = Callable[["Axes", Profile], None]


def panels(profile: Profile) -> dict[str, Draw]:
    """What is drawn of a profile, by title: nothing that it has no figures for."""
    encodes = profile.kind == "encoder"
    found: dict[str, Draw] = {}
    if not any(row.prefill for row in profile.rows):
        return found
    found["Forward pass" if encodes else "Time to first token"] = _draw_first
    if any(row.decode for row in profile.rows):
        found["Time per output token"] = _draw_per_token
    found["Texts per second" if encodes else "Tokens per second"] = _draw_throughput
    found["Utilization"] = _draw_utilization
    found["Memory by part"] = _draw_memory
    if any(row.step_ms for row in profile.rows):
        found["Each step"] = _draw_steps
    for phase in ("forward", "prefill", "decode"):
        if any(shares.phase == phase for row in profile.rows for shares in row.shares):
            found[f"Time by operator, {phase}"] = _shares_drawer(phase)
    return found


def make_figure(draw: Draw, profile: Profile, title: str) -> Figure:
    """One panel as a figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, _height(profile, title)), layout="constrained")
    axes = figure.add_subplot()
    draw(axes, profile)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    return figure


def _height(profile: Profile, title: str) -> float:
    """Inches: bars that lie need room each."""
    if title.startswith(("Utilization", "Memory")):
        bars = sum(row.prefill is not None for row in profile.rows)
        return max(3.2, 1.5 + 0.42 * bars)
    if title.startswith("Time by operator"):
        return 2.4 + 0.5 * len(profile.providers)
    return 3.8


def plot(profile: Profile, path: str | os.PathLike[str]) -> None:
    """Writes all panels to one picture, in the format of the file's suffix.

    Raises:
        ValueError: no row has figures.
    """
    from matplotlib.figure import Figure

    drawn = panels(profile)
    if not drawn:
        raise ValueError("profile must have a row with figures to be drawn, got none")
    columns = 2
    rows = (len(drawn) + 1) // columns
    items = list(drawn.items())
    heights = [
        max(_height(profile, title) for title, _ in items[row * columns : (row + 1) * columns])
        for row in range(rows)
    ]
    figure = Figure(figsize=(13, sum(heights) + 0.7), layout="constrained")
    grid = figure.add_gridspec(rows, columns, height_ratios=heights)
    for index, (title, draw) in enumerate(items):
        axes = figure.add_subplot(grid[index // columns, index % columns])
        draw(axes, profile)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    figure.suptitle(f"{profile.model}, {profile.dtype}, {profile.device}", fontsize=13)
    figure.savefig(path, dpi=110)


# ---- over cases


def _swept(profile: Profile) -> str | None:
    """The axis of a picture with lines: the batch, or else the prompt, if it has several values."""
    cases = profile.cases
    if len({case.padding for case in cases}) > 1 or len({case.new_tokens for case in cases}) > 1:
        return None
    for axis in ("batch", "prompt"):
        if len({getattr(case, axis) for case in cases}) > 1:
            return axis
    return None


def short(case: Case, cases: tuple[Case, ...]) -> str:
    """What distinguishes a case from the others."""
    parts = []
    for name, form in (("batch", "batch {}"), ("prompt", "prompt {}"), ("new_tokens", "{} new"),
                       ("padding", "{:.0%} padding")):  # fmt: skip
        if len({getattr(one, name) for one in cases}) > 1:
            parts.append(form.format(getattr(case, name)))
    return ", ".join(parts) or str(case)


Value = Callable[[Row], "float | None"]


def _draw_over_cases(
    axes: Axes, profile: Profile, value: Value, label: str, marks: tuple[Value, ...] = ()
) -> None:
    """Lines over the swept axis, or bars a case; `marks` are short lines above a bar."""
    axis = _swept(profile)
    if axis is None:
        _draw_bars(axes, profile, value, marks)
    else:
        _draw_lines(axes, profile, value, axis)
        axes.set_xlabel("requests in the batch" if axis == "batch" else "tokens of a prompt")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 1.18)  # room for the legend
    axes.legend(loc="upper left", ncol=2, frameon=False, fontsize=8)


def _draw_bars(axes: Axes, profile: Profile, value: Value, marks: tuple[Value, ...]) -> None:
    providers, cases = profile.providers, profile.cases
    width = 0.8 / len(providers)
    styles = (("p95", "-", 0.36), ("p99", ":", 0.48))
    for index, provider in enumerate(providers):
        named = False
        for place, case in enumerate(cases):
            row = profile.row(provider, case)
            height = None if row is None else value(row)
            if row is None or height is None:
                continue
            x = place + (index - (len(providers) - 1) / 2) * width
            bar = axes.bar(
                x, height, width * 0.94, color=COLORS[provider],
                label=None if named else provider,
            )  # fmt: skip
            named = True
            axes.bar_label(
                bar, [_number(height)], fontsize=8, label_type="center" if marks else "edge",
                color=_on(COLORS[provider]) if marks else "black",
            )  # fmt: skip
            for mark, (_, style, half) in zip(marks, styles, strict=False):
                at = mark(row) or 0.0
                axes.plot(
                    [x - width * half, x + width * half], [at, at], style, color="black", lw=1
                )
    for _, (name, style, _) in zip(marks, styles, strict=False):
        axes.plot([], [], style, color="black", lw=1, label=name)
    axes.set_xticks(range(len(cases)), [short(case, cases).replace(", ", "\n") for case in cases])
    axes.set_xlim(-0.6, len(cases) - 0.4)


def _draw_lines(axes: Axes, profile: Profile, value: Value, axis: str) -> None:
    other = "prompt" if axis == "batch" else "batch"
    groups = sorted({getattr(case, other) for case in profile.cases})
    for provider in profile.providers:
        for index, group in enumerate(groups):
            points = [
                (getattr(row.case, axis), height)
                for row in profile.rows
                if row.provider == provider and getattr(row.case, other) == group
                and (height := value(row)) is not None
            ]  # fmt: skip
            if not points:
                continue
            label = provider if len(groups) == 1 else f"{provider}, {other} {group}"
            axes.plot(
                *zip(*sorted(points), strict=True), color=COLORS[provider], label=label,
                marker=_MARKS[index % len(_MARKS)], ls="-" if index == 0 else "--", ms=5,
            )  # fmt: skip
    ticks = sorted({getattr(case, axis) for case in profile.cases})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _on(color: str) -> str:
    """Black or white, whichever is read more easily on a color."""
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _draw_first(axes: Axes, profile: Profile) -> None:
    def first(row: Row) -> float | None:
        return None if row.prefill is None else row.prefill.timing.p50_ms

    _draw_over_cases(axes, profile, first, "ms")


def _draw_per_token(axes: Axes, profile: Profile) -> None:
    def of(name: str) -> Value:
        return lambda row: getattr(row.decode.timing, name) if row.decode else None

    _draw_over_cases(axes, profile, of("p50_ms"), "ms", (of("p95_ms"), of("p99_ms")))


def _draw_throughput(axes: Axes, profile: Profile) -> None:
    if profile.kind == "encoder":
        _draw_over_cases(axes, profile, lambda row: row.texts_per_s, "texts/s")
        return
    _draw_over_cases(axes, profile, lambda row: row.tokens_per_s, "new tokens/s, all requests")


# ---- one case


def _lying(profile: Profile) -> list[tuple[str, Row]]:
    """Rows with figures and their labels, in the order of bars from the bottom."""
    several = len(profile.cases) > 1
    labels = []
    for case in profile.cases:
        for provider in profile.providers:
            row = profile.row(provider, case)
            if row is not None and row.prefill is not None:
                where = f"\n{short(case, profile.cases)}" if several else ""
                labels.append((provider + where, row))
    return labels[::-1]


def _draw_utilization(axes: Axes, profile: Profile) -> None:
    labels = _lying(profile)
    encodes = profile.kind == "encoder"
    kinds: list[tuple[str, str, Callable[[Row], Phase | None], str]] = [
        ("forward FLOPs" if encodes else "prefill FLOPs", "#E69F00", lambda row: row.prefill, "mfu")
    ]
    if not encodes:
        kinds.append(("decode bandwidth", "#0072B2", lambda row: row.decode, "mbu"))
    height = 0.8 / len(kinds)
    for index, (name, color, phase, field) in enumerate(kinds):
        found = [phase(row) for _, row in labels]
        values = [0.0 if one is None else getattr(one, field) for one in found]
        places = [place + ((len(kinds) - 1) / 2 - index) * height for place in range(len(labels))]
        bars = axes.barh(places, values, height * 0.92, color=color, label=name)
        axes.bar_label(
            bars, [f"{value:.0f}%" for value in values], fontsize=8, padding=2, bbox=_PLAIN
        )
    axes.axvline(100, color="black", lw=1, ls=":")
    axes.set_yticks(range(len(labels)), [name for name, _ in labels], fontsize=8)
    axes.set_xlim(0, max(112, axes.get_xlim()[1] * 1.08))
    axes.set_xlabel("% of the ceiling measured in the same run")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncol=2, frameon=False, fontsize=8)


def _draw_memory(axes: Axes, profile: Profile) -> None:
    labels = [(name, row) for name, row in _lying(profile) if row.memory]
    left = [0.0] * len(labels)
    for part, color in PARTS.items():
        sizes = [getattr(row.memory, part) / 2**20 for _, row in labels]
        axes.barh(range(len(labels)), sizes, 0.7, left=left, color=color, label=part)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    for place, total in enumerate(left):
        axes.annotate(
            f"{_number(total)}", (total, place), (3, 0), textcoords="offset points", va="center",
            fontsize=8,
        )  # fmt: skip
    axes.set_yticks(range(len(labels)), [name for name, _ in labels], fontsize=8)
    axes.set_xlim(0, max(left, default=1.0) * 1.12)
    axes.set_xlabel("MiB")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncol=3, frameon=False, fontsize=8)


def shown_case(profile: Profile) -> Case:
    """The case of pictures that show only one: the largest that has figures."""
    found = [row.case for row in profile.rows if row.prefill is not None]
    return max(found, key=lambda case: (case.batch * case.prompt, case.padding))


def _draw_steps(axes: Axes, profile: Profile) -> None:
    case = shown_case(profile)
    for provider in profile.providers:
        row = profile.row(provider, case)
        if row is not None and row.step_ms:
            steps = range(2, len(row.step_ms) + 2)
            axes.plot(steps, row.step_ms, color=COLORS[provider], label=provider, lw=1.2)
    axes.set(xlabel=f"output token ({case})", ylabel="ms, median of the runs")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.2)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", ncol=2, frameon=False, fontsize=8)


def _shares_drawer(phase: str) -> Draw:
    def draw(axes: Axes, profile: Profile) -> None:
        case = shown_case(profile)
        found: list[tuple[str, Shares]] = []
        for provider in profile.providers[::-1]:
            row = profile.row(provider, case)
            found += [(provider, one) for one in (row.shares if row else ()) if one.phase == phase]
        _draw_shares(axes, found)
        axes.set_xlabel(f"% of the time, {case}")

    return draw


def _draw_shares(axes: Axes, found: list[tuple[str, Shares]]) -> None:
    """A bar a provider; an operator has the same color in all of them."""
    weight: dict[str, float] = {}
    for _, shares in found:
        for share in shares.operators:
            weight[share.name] = max(weight.get(share.name, 0.0), share.percent)
    for name in (OUTSIDE, REST):
        weight.pop(name, None)
    named = sorted(weight, key=lambda name: -weight[name])[:LISTED]
    colors: dict[str, Any] = dict(zip(named, _SHARES, strict=False))
    colors |= {"other operators": "#bbbbbb", OUTSIDE: "#e8e8e8"}
    for place, (_, shares) in enumerate(found):
        sums = dict.fromkeys(colors, 0.0)
        for share in shares.operators:
            sums[share.name if share.name in colors else "other operators"] += share.percent
        left = 0.0
        for name, size in sums.items():
            bar = axes.barh(place, size, 0.65, left=left, color=colors[name])
            if size >= 7:
                axes.bar_label(
                    bar, [f"{size:.0f}%"], label_type="center", fontsize=8,
                    color=_on(colors[name]),
                )  # fmt: skip
            left += size
    axes.set_yticks(range(len(found)), [provider for provider, _ in found], fontsize=8)
    axes.set_xlim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [_patch(color) for color in colors.values()]
    axes.legend(
        handles, [name.removeprefix("aten::") for name in colors], loc="upper center",
        bbox_to_anchor=(0.45, -0.28), ncol=3, frameon=False, fontsize=8,
    )  # fmt: skip


def _patch(color: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=color)
