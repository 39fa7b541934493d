"""Pictures and a prompt through the processor and a model with the published vocabulary."""

import numpy as np
import pytest
import torch

from phi3v.processing.canvas import hd_canvas
from phi3v.samples.tiny import CLIP_MEAN, CLIP_STD
from phi3v.views import ViewSettings, pixel_values
from tests.parity.goldens import CASES, Case, picture

NEAR = 5e-5  # measured: hidden states 1.4e-5, logits 7.9e-6


@pytest.mark.parametrize("name", CASES["e2e"])
def test_the_answer_to_a_picture_is_the_published(name: str) -> None:
    case = Case("e2e", name)
    crops = case.facts["num_crops"]
    canvases = [hd_canvas(picture(image), crops, 336) for image in case.facts["images"]]
    pixels = pixel_values(canvases, crops + 1, ViewSettings(336, CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        out = case.model()(**case.inputs, pixel_values=pixels, output_hidden_states=True)
    assert case.difference("out.inputs_embeds", out.hidden_states[0], case.positions).max() < NEAR
    last = case.difference("out.last_hidden_state", out.hidden_states[-1], case.positions)
    assert last.max() < NEAR
    logits = out.logits[0, -1].numpy()
    assert np.abs(logits[:4096] - case.arrays["out.last_logits_first4096"]).max() < NEAR
    best = np.argsort(-logits)[:5]
    assert best.tolist() == case.arrays["out.last_top5_ids"].tolist()
    assert np.abs(logits[best] - case.arrays["out.last_top5_logits"]).max() < NEAR
    assert abs(out.loss.item() - case.arrays["out.loss"]) < 5e-6  # measured: 0
