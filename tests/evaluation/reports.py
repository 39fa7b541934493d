"""A report of everything a run may leave, and one of little; every text in it is hostile."""

import numpy as np

from phi3v.evaluation.report import Example, Report, Saved


def step(number: int, **changes) -> dict:
    line = {
        "step": number,
        "epoch": number / 10,
        "loss": 8.0 / number,
        "grad_norm": 1.0,
        "lr": {"language": 1e-3 / number, "vision": 1e-3 / number},
        "tokens_per_second": 5000.0 + number,
        "step_seconds": 1.5,
        "data_wait_seconds": 0.01,
        "packing": 0.97,
        "balance": 0.9,
        "mfu": None,
        "memory_gb": 3.0,
    }
    return line | changes


def rate(value: float | None, low: float | None, high: float | None, n: int = 256) -> dict:
    return {"value": value, "low": low, "high": high, "n": n}


def evaluation(number: int, value: float, **metrics: dict) -> dict:
    blind = rate(value / 2, value / 2 - 0.1, value / 2 + 0.1)
    scores = {"exact_match": rate(value, value - 0.1, value + 0.1), "blind_exact_match": blind}
    return {"step": number, "loss": 2.0 - value, "metrics": scores | metrics}


SUMMARY = {
    "metrics": {
        "category_accuracy": rate(0.9219, 0.8867, 0.9531),
        "price_mape": rate(0.0812, 0.0641, 0.1011, 255),
        "title_exact_match_unseen": rate(None, None, None, 0),
        "blind_category_accuracy": rate(0.125, 0.0859, 0.168, 250),
        "constant_category_accuracy": rate(0.0938, 0.0611, 0.1362),
    },
    "totals": {"tokens": 8123456, "flops": 4.40899e11, "step_seconds": 28.2988},
    "paths": {"report": "runs/<x>"},
    "is_finished": True,
    "evaluation_loss": 1.23456,
}
PICTURE = np.full((300, 400, 3), 128, dtype=np.uint8)
EXAMPLES = (
    Example(
        PICTURE,
        "<s><|user|>\n<|image|><s>\nWhat is it?<|end|>\n<|assistant|>\n",
        "A bag & a <b>belt</b>",
        "A <script>x</script>",
        "A tie",
        False,
        {"title_similarity": 0.125, "price_mae": 1234.5, "price_mape": None},
        "row-<7>",
    ),
    Example(
        None,
        "<s><|user|>\n<|image|><s>\nWhat is it?<|end|>\n<|assistant|>\n",
        "A tie",
        "A tie",
        None,
        True,
    ),
)
DATA = {
    "folder": "shards/<one>",
    "splits": {
        "train": {
            "samples": 2700,
            "tokens": 187001,
            "images": 2711,
            "histogram": [[64, 9], [80, 1]],
        },
        "validation": {"samples": 300, "tokens": 20801, "histogram": None},
    },
    "rejected": {"count": 12, "by_reason": {"image cannot be read": 9, "too many tokens": 3}},
}
FULL = Report(
    title="products & more",
    steps=[step(n, grad_norms={"vision": 1.0, "head": 2.0}, mfu=0.4) for n in range(1, 30)],
    summary=SUMMARY,
    epochs=8.04,
    evaluations=[evaluation(10, 0.25), evaluation(20, 0.5)],
    examples=EXAMPLES,
    data=[DATA],
    checkpoints=[
        Saved(10, "2026-11-21 20:00:00", 50_123_456_789),
        Saved(20, "2026-11-21 21:00:00", 50_123_456_789, ("latest", "best")),
    ],
    faults=[
        {"step": 7, "reason": "the loss is not finite", "loss": None},
        {"back_to": 5, "left_out": [{}, {}]},
    ],
    facts={"model": "models/<tiny>"},
    files={"config.yaml": "run: {out: <x>}"},
)
BARE = Report(title="products & more", summary=SUMMARY, examples=EXAMPLES, facts=FULL.facts)
