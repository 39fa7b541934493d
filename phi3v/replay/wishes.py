"""What is asked of a step, and the doing of it."""

from dataclasses import dataclass
from pathlib import Path

from phi3v.errors import Disagreement
from phi3v.printing import print
from phi3v.processing import Phi3VProcessor
from phi3v.replay.again import before
from phi3v.replay.bisect import describe, measure, step_loss
from phi3v.replay.check import Check
from phi3v.replay.listing import list_step
from phi3v.replay.page import write_step_page
from phi3v.replay.steps import TakenStep
from phi3v.training.ranks import Ranks
from phi3v.view.page import check_out
from phi3v.view.tokens import TokenText


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """None of them: the samples are listed."""

    page: Path | None = None
    """File of a page with the samples' pictures."""

    check: bool = False
    """Take the step again and compare."""

    bisect: bool = False
    """Find the samples that carry its loss."""

    def __post_init__(self) -> None:
        if self.page:
            check_out(self.page, "--page")


def fulfil(step: TakenStep, wishes: Wishes, ranks: Ranks) -> None:
    """Print or write what is wished; the first rank does. All ranks call if a step is taken again.

    Raises: Disagreement on the first rank, once all is printed, if the numbers are other ones.
    """
    is_again = wishes.check or wishes.bisect
    if ranks.is_first and (wishes.page or not is_again):
        text = TokenText(Phi3VProcessor.from_pretrained(step.cfg.model.path).tokenizer)
        if wishes.page:
            write_step_page(step, text, wishes.page)
            print(f"{wishes.page}: {wishes.page.stat().st_size / 1e3:,.0f} kB", flush=True)
        else:
            print(*list_step(step, text), sep="\n", flush=True)
    if is_again:
        _take_again(step, wishes, ranks)


def _take_again(step: TakenStep, wishes: Wishes, ranks: Ranks) -> None:
    def say(line: str) -> None:
        if ranks.is_first:
            print(line, flush=True)

    with before(step, ranks) as again:
        check = Check(again)
        for line in check.take(step.number - 1):
            say(line)
        if wishes.bisect:
            carriers = measure(again)
            say(check.compare_single(step.number, step_loss(step, carriers)))
            if ranks.is_first:
                print(*describe(step, carriers), sep="\n", flush=True)
        if wishes.check:
            for line in check.take(step.number):
                say(line)
        fault = check.fault()
    if ranks.is_first and fault:
        raise Disagreement(fault)
    say(check.verdict())
