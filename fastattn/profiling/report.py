"""A profile as one HTML file: tables and pictures within it, no script, and nothing to fetch."""

from __future__ import annotations

import html
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

from fastattn.profiling.memory import format_bytes
from fastattn.profiling.plots import make_figure, panels, short
from fastattn.profiling.results import Case, Phase, Profile, Row, Shares

# What the page may load: its own style and pictures.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 3rem; max-width: 76rem; background: #fff;
  color: #1d2430; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.55rem; margin: 0 0 .2rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p { margin: .3rem 0; } .quiet { color: #5b6675; }
.cards { display: grid; gap: .75rem; margin: 1.25rem 0;
  grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); }
.card { border: 1px solid #dfe4ea; border-radius: .5rem; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.35rem; font-weight: 650; line-height: 1.3; }
.plots { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
figure { margin: 0; border: 1px solid #dfe4ea; border-radius: .5rem; padding: .4rem; }
figure svg { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
.wide > table { min-width: 100%; }
th, td { padding: .32rem .65rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #e9edf1; }
th { font-weight: 600; border-bottom-color: #b9c2cd; vertical-align: bottom; }
th small { display: block; font-weight: 400; color: #5b6675; }
th.t, td.t { text-align: left; } td.code { font-family: ui-monospace, monospace; font-size: .8rem;
  max-width: 26rem; overflow: hidden; text-overflow: ellipsis; }
.bad { color: #b3261e; white-space: normal; } .good { color: #1a7f37; }
details { border-top: 1px solid #e9edf1; padding: .5rem 0; }
summary { cursor: pointer; font-weight: 600; }
.pair { display: grid; gap: 1.5rem; align-items: start; margin-top: .5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.25rem; font-size: .9rem; }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { padding: 1rem .8rem 2rem; } td.code { max-width: 9.5rem; }
  th, td { padding: .3rem .45rem; } }
"""


def write_html(profile: Profile, path: str | os.PathLike[str]) -> None:
    """Writes the report; needs matplotlib. It opens without a network, and has no script.

    Args:
        path: of the file, which is written over.
    """
    Path(path).write_text(render_html(profile), encoding="utf-8")


def render_html(profile: Profile) -> str:
    """The report as text."""
    title = f"{profile.model}: profile"
    encodes = profile.kind == "encoder"
    parts = [
        f"<h1>{_text(profile.model)}</h1>",
        f'<p class="quiet">{_text(_subtitle(profile))}</p>',
        _cards(profile),
        "<h2>Latency and throughput</h2>",
        _latency_of_encoder(profile) if encodes else _latency(profile),
        "<h2>Utilization and memory</h2>",
        _utilization(profile),
        "<h2>Pictures</h2>",
        f'<div class="plots">{_pictures(profile)}</div>' if panels(profile) else "<p>None.</p>",
        "<h2>Where the time goes</h2>",
        *(_shares(row, profile) for row in profile.rows if row.shares),
        "<h2>How it was measured</h2>",
        _method(profile),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<title>{_text(title)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _subtitle(profile: Profile) -> str:
    versions = profile.environment
    return (
        f"{profile.kind}, {profile.parameters / 1e6:,.1f} M parameters in {profile.dtype}, on "
        f"{profile.device}, {versions.get('date', '')}"
    )


# ---- tables

Cell = str | tuple[str, str]  # text, or class and text


def _table(heads: Sequence[str], rows: Sequence[Sequence[Cell]], texts: int = 2) -> str:
    """The first `texts` columns are text. A head may have a second line behind a "|"."""

    def head(index: int, name: str) -> str:
        first, _, second = name.partition("|")
        small = f"<small>{_text(second)}</small>" if second else ""
        return f"<th{_class('t' if index < texts else '')}>{_text(first)}{small}</th>"

    def cell(index: int, value: Cell) -> str:
        kind, shown = value if isinstance(value, tuple) else ("", value)
        kind = f"{'t' if index < texts else ''} {kind}".strip()
        return f"<td{_class(kind)}>{_text(shown)}</td>"

    lines = ["".join(cell(i, value) for i, value in enumerate(row)) for row in rows]
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    top = "".join(head(i, name) for i, name in enumerate(heads))
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _percent(phase: Phase | None, name: str) -> str:
    return "" if phase is None else f"{getattr(phase, name):.1f}%"


def _verdict(row: Row) -> Cell:
    if row.error is not None:
        return "bad", row.error
    if row.parity is None:
        return "", "the measure" if row.provider == "transformers" else "not compared"
    if not row.parity.passed:
        return "bad", row.parity.text
    same = row.parity.same_tokens
    shown = "passed" if same is None else f"passed, {same:.1%} of tokens equal"
    return "good", shown


def _spread(phase: Phase) -> str:
    return f"{_ms(phase.timing.p20_ms)} to {_ms(phase.timing.p80_ms)}"


def _where(row: Row, cases: tuple[Case, ...]) -> tuple[str, str]:
    return short(row.case, cases), row.provider


def _latency(profile: Profile) -> str:
    heads = ["case", "provider", "first token|ms", "its spread|p20 to p80", "per token|p50, ms",
             "|p95", "|p99", "request|tokens/s", "total|tokens/s", "parity"]  # fmt: skip
    rows: list[list[Cell]] = []
    for row in profile.rows:
        cells: list[Cell] = [*_where(row, profile.cases)]
        if row.prefill is None:
            cells += [""] * 7
        else:
            timing = row.decode.timing if row.decode else None
            cells += [
                _ms(row.prefill.timing.p50_ms), _spread(row.prefill),
                *("" if timing is None else _ms(getattr(timing, f"p{p}_ms")) for p in (50, 95, 99)),
                _rate(row.tokens_per_s_request), _rate(row.tokens_per_s),
            ]  # fmt: skip
        rows.append([*cells, _verdict(row)])
    return _table(heads, rows)


def _latency_of_encoder(profile: Profile) -> str:
    heads = ["case", "provider", "forward|p50, ms", "its spread|p20 to p80", "|p95", "|p99",
             "texts/s", "tokens/s|padding not counted", "parity"]  # fmt: skip
    rows: list[list[Cell]] = []
    for row in profile.rows:
        cells: list[Cell] = [*_where(row, profile.cases)]
        if row.prefill is None:
            cells += [""] * 6
        else:
            timing = row.prefill.timing
            cells += [
                _ms(timing.p50_ms), _spread(row.prefill), _ms(timing.p95_ms), _ms(timing.p99_ms),
                _rate(row.texts_per_s), _rate(row.tokens_per_s),
            ]  # fmt: skip
        rows.append([*cells, _verdict(row)])
    return _table(heads, rows)


def _utilization(profile: Profile) -> str:
    encodes = profile.kind == "encoder"
    heads = ["case", "provider"]
    for name in ("forward",) if encodes else ("prefill", "decode"):
        heads += [f"{name}|tokens/s", "|FLOPs", "|bandwidth"]
    rows: list[list[Cell]] = []
    for row in profile.rows:
        cells: list[Cell] = [*_where(row, profile.cases)]
        for phase in (row.prefill,) if encodes else (row.prefill, row.decode):
            cells.append("" if phase is None else _rate(phase.tokens_per_s))
            cells += [_percent(phase, "mfu"), _percent(phase, "mbu")]
        memory = row.memory
        sizes = () if memory is None else (memory.weights, memory.cache, memory.activations)
        cells += [format_bytes(size) for size in sizes] or [""] * 3
        cells.append("" if memory is None else f"{format_bytes(memory.peak)} {memory.source}")
        rows.append(cells)
    return _table([*heads, "weights", "cache", "activations", "peak"], rows)


def _shares(row: Row, profile: Profile) -> str:
    opened = " open" if row is profile.rows[0] else ""
    tables = []
    for shares in row.shares:
        for what in ("operators", "kernels"):
            tables.append(f"<div>{_share_table(shares, what)}</div>")
    name = f"{row.provider}, {row.case}"
    return (
        f"<details{opened}><summary>{_text(name)}</summary>"
        f'<div class="pair">{"".join(tables)}</div></details>'
    )


def _share_table(shares: Shares, what: str) -> str:
    heads = [f"{shares.phase}, by {what[:-1]}", "calls", "ms", "share"]
    rows: list[list[Cell]] = [
        [("code", one.name), str(one.calls or ""), _ms(one.ms), f"{one.percent:.1f}%"]
        for one in getattr(shares, what)
    ]
    return _table(heads, rows, texts=1)


# ---- the rest


def _cards(profile: Profile) -> str:
    """The first case in a few large numbers: ours beside the stock model."""
    case = profile.cases[0]
    ours, stock = profile.row("fastattn", case), profile.row("transformers", case)
    main = ours or profile.rows[0]
    if main.prefill is None:
        return ""
    cards = []

    def card(value: str, name: str, better: float | None = None) -> None:
        beside = "" if better is None else f" · {better:.2f}× transformers"
        cards.append(
            f'<div class="card"><b>{_text(value)}</b><span class="quiet">'
            f"{_text(name + beside)}</span></div>"
        )

    def ratio(theirs: float | None, own: float | None) -> float | None:
        return theirs / own if theirs and own and main is ours else None

    first = main.prefill.timing.p50_ms
    theirs = stock.prefill.timing.p50_ms if stock and stock.prefill else None
    name = "a forward pass" if profile.kind == "encoder" else "to the first token"
    card(f"{_ms(first)} ms", name, ratio(theirs, first))
    if main.decode is not None:
        per_token = main.decode.timing.p50_ms
        theirs = stock.decode.timing.p50_ms if stock and stock.decode else None
        card(f"{_ms(per_token)} ms", "per output token", ratio(theirs, per_token))
        card(f"{main.decode.mbu:.0f}%", "of the copy's bandwidth, decoding")
    if profile.kind == "encoder":
        card(f"{_rate(main.texts_per_s)}", "texts/s")
    card(f"{main.prefill.mfu:.0f}%", "of the matrix product's FLOPs, "
         + ("forward" if profile.kind == "encoder" else "prefill"))  # fmt: skip
    label = f"{main.provider}, {case}"
    return f'<p class="quiet">{_text(label)}</p><div class="cards">{"".join(cards)}</div>'


def _pictures(profile: Profile) -> str:
    figures = []
    for number, (title, draw) in enumerate(panels(profile).items()):
        svg = _svg(profile, title, draw, number)
        figures.append(f'<figure role="img" aria-label="{_text(title)}">{svg}</figure>')
    return "\n".join(figures)


def _svg(profile: Profile, title: str, draw: object, number: int) -> str:
    """A figure as an element of the page, whose names do not meet those of other figures."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure = make_figure(draw, profile, title)  # type: ignore[arg-type]
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for attribute in ('id="', 'href="#', "url(#"):
        svg = svg.replace(attribute, f"{attribute}p{number}-")
    return svg


def _method(profile: Profile) -> str:
    ceilings = profile.ceilings
    facts = {
        "ceilings, this run": f"{ceilings.copy_gb_per_s:.1f} GB/s of a copy of "
        f"{ceilings.copy_mib:.0f} MiB (read and written), {ceilings.matmul_tflops * 1e3:.1f} "
        f"GFLOP/s of a {ceilings.dtype} product of {ceilings.matmul_size}²",
        "bandwidth": "weights and live cache that a pass must read, over the median time, as a "
        "share of the copy's rate; reads alone can be faster than a copy",
        "FLOPs": "of matrix products that a pass needs, over the median time, as a share of the "
        f"product's rate; counted by {profile.counted}",
        "times": f"medians over {profile.repeats} runs after a warm-up, all providers in turns; "
        "greedy decoding, the same loop for all",
        "parity": "error of logits or hidden states against float64 at most twice that of the "
        "stock model, plus one rounding unit; else there are no figures",
        "memory": "of the allocator on CUDA; on a CPU the peak is the whole process's RSS, and "
        "activations are what torch's allocator held at once",
        "shares": "by torch.profiler, which slows a run down: for where time goes, not how much",
        **{name: str(value) for name, value in profile.environment.items()},
    }
    if profile.notes:
        facts["notes"] = "; ".join(profile.notes)
    items = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts.items())
    return f"<dl>{items}</dl>"
