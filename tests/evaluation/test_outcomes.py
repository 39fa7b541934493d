"""A rank's share: who gets which rows, what is asked together, what is done when time is short."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phi3v.data import Dataset
from phi3v.evaluation import losses
from phi3v.evaluation.losses import cut_packs
from phi3v.evaluation.models import open_model
from phi3v.evaluation.outcomes import cut, deal, say_teacher_forced, within
from phi3v.views import pixel_values

LENGTHS = st.lists(st.integers(1, 5000), max_size=60)


@given(LENGTHS, st.integers(1, 7))
def test_rows_are_dealt_so_that_no_rank_has_much_more_than_another(
    lengths: list[int], ranks: int
) -> None:
    """Each row goes to one rank; their sums differ by one row at most."""
    tokens = np.array(lengths, dtype=np.int64)
    shares = [deal(tokens, rank, ranks) for rank in range(ranks)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(lengths)))
    sums = [tokens[share].sum() for share in shares]
    assert max(sums) - min(sums) <= max(lengths, default=0)
    for share in shares:
        assert (np.diff(tokens[share]) <= 0).all(), "longest first"


def test_who_gets_the_longest_row_of_a_round_gets_the_shortest_of_the_next() -> None:
    lengths = np.array([9, 8, 7, 6, 5, 4])
    assert [deal(lengths, rank, 3).tolist() for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]


@given(LENGTHS, st.integers(1, 9), st.booleans())
def test_batches_hold_each_row_once_and_long_ones_alone(
    lengths: list[int], batch_rows: int, is_mixed: bool
) -> None:
    tokens = np.sort(np.array(lengths, dtype=np.int64))[::-1]
    batches = cut(tokens, batch_rows, 4000, is_mixed)
    assert sorted(int(row) for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= (batch_rows if tokens[batch].max() <= 4000 else 1)


def test_without_a_time_limit_rows_of_a_length_go_together() -> None:
    tokens = np.arange(100, 0, -1)
    batches = cut(tokens, 10, 1000, is_mixed=False)
    assert [tokens[batch].tolist() for batch in batches[:2]] == [
        list(range(100, 90, -1)),
        list(range(90, 80, -1)),
    ]


def test_with_a_time_limit_the_rows_that_are_answered_are_a_fair_sample() -> None:
    """Whenever it ends, the mean length is that of all rows; long rows that go alone included.

    The bound is 4 standard errors of a sample of half of the rows.
    """
    tokens = np.arange(2000, 0, -1)
    for limit in (5000, 1500):
        batches = cut(tokens, 10, limit, is_mixed=True)
        half = np.concatenate(batches[: len(batches) // 2])
        error = tokens.std() / np.sqrt(len(half)) * np.sqrt(1 - len(half) / len(tokens))
        assert abs(tokens[half].mean() - tokens.mean()) < 4 * error
        again = cut(tokens, 10, limit, is_mixed=True)
        assert all(map(np.array_equal, batches, again)), "the same rows at each evaluation"


def test_the_first_part_is_done_however_short_the_time() -> None:
    assert list(within(None, "abc")) == ["a", "b", "c"]
    assert list(within(100, "abc")) == ["a", "b", "c"]
    assert list(within(-1, "abc")) == list(within(0, "abc")) == ["a"]
    assert list(within(0, "")) == []


def test_packs_of_the_loss_hold_each_row_once_and_stay_within_their_budget(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Dataset(tiny_shards, "train")
    assert len(cut_packs(data, 8)) == 1 < len(cut_packs(data, None)), "8,192 tokens, 64 views"
    monkeypatch.setattr(losses, "PACK_TOKENS", 500)
    monkeypatch.setattr(losses, "PACK_VIEWS", 16)
    packs = cut_packs(data, None)
    assert sorted(row for pack in packs for row in pack) == list(range(len(data)))
    assert any(len(pack) > 1 for pack in packs)
    for pack in packs:
        assert data.tokens[pack].sum() <= 500
        assert data.views[pack].sum() <= 16
    monkeypatch.setattr(losses, "PACK_TOKENS", 1)
    assert len(cut_packs(data, None)) == len(data), "a row that is too large is a pack"


def test_a_teacher_forced_answer_is_the_likeliest_token_at_each_place_of_it(
    tiny_model: Path, mixed_shards: Path
) -> None:
    """One for each token of the answer, one for <|end|>, one behind it: by the published call."""
    generator = open_model(tiny_model, max_new_tokens=1)
    for sample in list(Dataset(mixed_shards, "train"))[:2]:  # with a picture, without
        stop = int(np.flatnonzero(sample.labels >= 0)[-1]) + 1
        assert sample.input_ids[stop - 1] == generator.tokenizer.convert_tokens_to_ids("<|end|>")
        canvases = [np.array(image.pixels) for image in sample.images]
        pictures = {
            "pixel_values": pixel_values(canvases, 17, generator.views),
            "image_sizes": torch.tensor([canvas.shape[:2] for canvas in canvases]),
        }
        ids = torch.from_numpy(sample.input_ids[:stop].astype(np.int64))[None]
        with torch.inference_mode():
            logits = generator.model(ids, **pictures if canvases else {}).logits
        said = logits[0].argmax(-1)[sample.meta["prompt_length"] - 1 :]
        assert len(said) == stop - sample.meta["prompt_length"] + 1
        expected = generator.tokenizer.decode(said, skip_special_tokens=True)
        assert say_teacher_forced(generator, sample) == expected != ""
