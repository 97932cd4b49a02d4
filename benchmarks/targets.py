"""Which targets were met: said from rows that were timed, and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]

OURS = "fastattn"
FLASH = "SDPA FLASH"  # torch's FlashAttention-2


# Of decoding: the part of the copy's rate for caches that are larger than this.
COPY_SHARE = 0.85
LARGE_CACHE_BYTES = 100e6
# Of sampling: times as long as one pass over the logits, for so many rows of so many tokens.
TIMES_AMAX = 1.3
AMAX_BATCH, AMAX_VOCAB_SIZE = 64, 128256
AMAX, SORT_CHAIN, FLASHINFER = "logits.amax", "torch sort chain", "FlashInfer"


def evaluate(rows: Iterable[Row]) -> list[Row]:
    """The targets of training, each with what was measured for it.

    Returns:
        For each target: "target", in words; "required", how many times faster than the peer;
        "measured", by shape, how many times it was; "peers", by shape, who the peer was; "met",
        true only if every shape that was measured meets it, and none where fastattn itself failed;
        None if nothing was measured; "missing", by shape, why there is no figure, also of one peer.
    """
    training = [row for row in rows if row["stage"] == "backward" and "case" in row]
    found = []
    for causal in (False, True):
        mask = "causal" if causal else "bidirectional"
        target = f"bf16 D128 {mask}, forward + backward: ahead of torch's FlashAttention-2"
        own = _select(training, _is_plain_d128(causal))
        found.append(_judge(target, own, own, [FLASH], 1.0, strictly=True))
    table, dense = (_select(training, _has_bias(name)) for name in ("T5 bias", "dense bias"))
    peers = sorted({row["provider"] for row in training if row["provider"].startswith("SDPA")})
    for what, other in (
        ("that is made from the table", table),
        ("that is trained itself, without a table", dense),
    ):
        target = f"T5 bias, N=2048: 2x SDPA with a dense bias {what}"
        found.append(_judge(target, table, other, peers, 2.0))
    return found


def _is_plain_d128(causal: bool) -> Callable[[Row], bool]:
    def chosen(case: Row) -> bool:
        alone = case["num_heads"] == case["num_heads_kv"] and case["feature"] == "plain"
        return alone and (case["head_dim"], case["causal"]) == (128, causal)

    return chosen


def _has_bias(feature: str) -> Callable[[Row], bool]:
    return lambda case: (case["feature"], case["seqlen"]) == (feature, 2048)


def _select(rows: Iterable[Row], chosen: Callable[[Row], bool]) -> dict[int, dict[str, Row]]:
    """Rows in bfloat16 by sequence length and provider."""
    found: dict[int, dict[str, Row]] = {}
    for row in rows:
        if row["case"]["dtype"] == "bfloat16" and chosen(row["case"]):
            found.setdefault(row["case"]["seqlen"], {})[row["provider"]] = row
    return found


def _judge(
    target: str,
    ours: dict[int, dict[str, Row]],
    theirs: dict[int, dict[str, Row]],
    peers: Sequence[str],
    required: float,
    *,
    strictly: bool = False,
) -> Row:
    measured: dict[str, float] = {}
    names: dict[str, str] = {}
    missing: dict[str, str] = {}
    failed = False
    for seqlen in sorted(ours):
        shape, own = f"N={seqlen}", ours[seqlen].get(OURS, {})
        timed = {
            name: theirs[seqlen][name]["ms"]
            for name in peers
            if "ms" in theirs.get(seqlen, {}).get(name, {})
        }
        if "ms" not in own:
            failed = failed or "error" in own
            missing[shape] = "fastattn failed" if "error" in own else "fastattn has no time"
        elif not timed:
            missing[shape] = "no peer has a time"
        else:
            for name in peers:
                row = theirs[seqlen].get(name, {})
                if reason := row.get("error") or row.get("skipped"):
                    missing[f"{shape}, {name}"] = reason
            names[shape] = min(timed, key=lambda name: timed[name])
            measured[shape] = timed[names[shape]] / own["ms"]
    enough = [x > required if strictly else x >= required for x in measured.values()]
    return {
        "target": target,
        "required": required,
        "met": False if failed else all(enough) if enough else None,
        "measured": measured,
        "peers": names,
        "missing": missing,
    }


def evaluate_decoding(rows: Iterable[Row]) -> list[Row]:
    """The targets of decoding, in the form of `evaluate`, by case.

    One query row and caches in 16 bits. Nothing that SDPA reads is paged: there its time is that of
    the contiguous cache of the same size.
    """
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["stage"] == "decode" and "case" in row:
            cases.setdefault(row["case"]["label"], {})[row["provider"]] = row
    matrix = {label: own for label, own in cases.items() if _in_matrix(own)}
    large = {label: own for label, own in matrix.items() if _case(own)["bytes"] > LARGE_CACHE_BYTES}
    targets = [_judge_bandwidth(large)]
    for paged in (False, True):
        own = {name: x for name, x in matrix.items() if bool(_case(x)["block_size"]) == paged}
        targets.append(_judge_peers(own, matrix, "paged" if paged else "contiguous"))
    return targets


def _case(rows: dict[str, Row]) -> Row:
    return next(iter(rows.values()))["case"]


def _in_matrix(rows: dict[str, Row]) -> bool:
    case = _case(rows)
    return case["seqlen_q"] == 1 and not case["stored"]


def _judge_bandwidth(cases: dict[str, dict[str, Row]]) -> Row:
    measured: dict[str, float] = {}
    missing: dict[str, str] = {}
    for label, rows in cases.items():
        own = rows.get(OURS, {})
        if "percent_of_copy" in own:
            measured[label] = own["percent_of_copy"] / 100
        else:
            missing[label] = _reason(rows, "the copy was not measured")
    failed = any("error" in rows.get(OURS, {}) for rows in cases.values())
    target = "decoding from a cache of over 100 MB: 85% of the copy's rate"
    enough = [share >= COPY_SHARE for share in measured.values()]
    return {
        "target": target,
        "required": COPY_SHARE,
        "met": False if failed else all(enough) if enough else None,
        "measured": measured,
        "peers": dict.fromkeys(measured, "copy"),
        "missing": missing,
    }


def _judge_peers(
    cases: dict[str, dict[str, Row]], matrix: dict[str, dict[str, Row]], layout: str
) -> Row:
    def peers_of(rows: dict[str, Row]) -> dict[str, Row]:
        peers = {name: row for name, row in rows.items() if not name.startswith(OURS)}
        if layout == "paged":
            size = (_case(rows)["batch"], _case(rows)["length"])
            for other in matrix.values():
                case = _case(other)
                if (case["batch"], case["length"]) == size and not case["block_size"]:
                    peers |= {name: x for name, x in other.items() if name.startswith("SDPA")}
        return peers

    target = f"decoding, {layout}: never slower than SDPA, FlashInfer or flash-attn"
    return _judge_cases(target, cases, peers_of, 1.0)


def _judge_cases(
    target: str,
    cases: dict[str, dict[str, Row]],
    peers_of: Callable[[dict[str, Row]], dict[str, Row]],
    required: float,
    *,
    strictly: bool = False,
) -> Row:
    """A target on each case, beside the fastest of its peers."""
    measured: dict[str, float] = {}
    names: dict[str, str] = {}
    missing: dict[str, str] = {}
    for label, rows in cases.items():
        own = rows.get(OURS, {})
        timed = {name: row["ms"] for name, row in peers_of(rows).items() if "ms" in row}
        if "ms" not in own:
            missing[label] = _reason(rows, "fastattn has no time")
        elif not timed:
            missing[label] = "no peer has a time"
        else:
            names[label] = min(timed, key=lambda name: timed[name])
            measured[label] = timed[names[label]] / own["ms"]
    failed = any("error" in rows.get(OURS, {}) for rows in cases.values())
    level = [x > required if strictly else x >= required for x in measured.values()]
    return {
        "target": target,
        "required": required,
        "met": False if failed else all(level) if level else None,
        "measured": measured,
        "peers": names,
        "missing": missing,
    }


def evaluate_sampling(rows: Iterable[Row]) -> list[Row]:
    """The targets of sampling, in the form of `evaluate`, by case.

    The pass over the logits is the bound where a row is read once: not of flat logits, most of
    whose vocabulary is drawn from. A peer that cannot draw a case has no figure there.
    """
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["stage"] == "sampling" and "case" in row:
            cases.setdefault(row["case"]["label"], {})[row["provider"]] = row

    def named(*names: str) -> Callable[[dict[str, Row]], dict[str, Row]]:
        return lambda own: {name: row for name, row in own.items() if name.startswith(names)}

    large = {label: own for label, own in cases.items() if _is_bound_by_amax(_case(own))}
    amax = f"sampling, B >= {AMAX_BATCH}, V = {AMAX_VOCAB_SIZE}: within {TIMES_AMAX}x of {AMAX}(-1)"
    return [
        _judge_cases(amax, large, named(AMAX), 1 / TIMES_AMAX),
        *(
            _judge_cases(
                f"sampling: ahead of {who} at every B", cases, named(name), 1.0, strictly=True
            )
            for who, name in (("FlashInfer", FLASHINFER), ("the sort-based chain", SORT_CHAIN))
        ),
    ]


def _is_bound_by_amax(case: Row) -> bool:
    large = case["batch"] >= AMAX_BATCH and case["vocab_size"] == AMAX_VOCAB_SIZE
    return large and case["family"] == "peaked"


def _reason(rows: dict[str, Row], otherwise: str) -> str:
    """Why fastattn has no figure for a case."""
    if "inputs" in rows:
        return rows["inputs"].get("skipped") or rows["inputs"]["error"]
    return "fastattn failed" if "error" in rows.get(OURS, {}) else otherwise
