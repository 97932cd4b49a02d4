"""The loop of greedy decoding, sampling and contrastive decoding: every row a token a step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastattn.generation.choose import Choose
from fastattn.generation.config import Contrast
from fastattn.generation.graph import GraphedStep, can_capture
from fastattn.generation.plan import Plan
from fastattn.generation.result import Generated, Records
from fastattn.generation.rows import Rows
from fastattn.generation.watch import Watch
from fastattn.models.protocol import GenerativeModel, Session


def decode_in_step(
    plan: Plan,
    models: Sequence[GenerativeModel],
    rows: Rows,
    watch: Watch,
    contrast: Contrast | None = None,
) -> Generated:
    """Decodes until all rows have ended, or have max_new tokens.

    Nothing here waits for the device but `watch`, every `check_every` steps. Rows that ended go
    on with padding until then, which `Rows` does not keep.

    Args:
        models: the model, and for contrastive decoding the small one behind it.
        contrast: settings of that.
    """
    records = Records(plan)
    choose = Choose(plan, rows, records, contrast)
    started = [plan.start(model) for model in models]
    logits: tuple[Tensor, ...] = tuple(first for first, _ in started)
    sessions: list[Session] = [session for _, session in started]
    graph = GraphedStep(models, sessions, rows, choose) if can_capture(sessions) else None
    choose(logits, 0)
    for step in range(1, plan.max_new):
        if step % plan.check_every == 0 and watch.look():
            break
        if graph is not None:
            graph.step(step)
            continue
        logits = tuple(
            model.step(rows.tokens, session)
            for model, session in zip(models, sessions, strict=True)
        )
        choose(logits, step)
    watch.look()
    return records.result(plan, rows)
