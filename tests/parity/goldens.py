"""Inputs and outputs of the published Phi-3-Vision code: where they are and how they are read.

A subset is committed under tests/goldens. All of them lie in ../shared beside the checkout, with
the published tokenizer and configurations; a case that is in neither place is skipped, by name.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from phi3v.model import Phi3VConfig, Phi3VForCausalLM

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "tests" / "goldens"
SHARED = (ROOT / "../shared").resolve()
REFERENCE = SHARED / "reference"
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="needs ../shared/reference beside the checkout"
)
CASES = {
    variant: json.loads((COMMITTED / "models" / variant / "cases.json").read_text())
    for variant in ("mha", "gqa", "rope64", "e2e")
}
RULES = {"orig3": "positions", "orig35": "keys"}  # which code made a case -> its rope_length

# The goldens come from a CPU with AVX2. Others round cosines and bicubic sums differently, by one
# unit in the last place; a test then falls back to a tolerance that it states.
IS_SAME_CPU = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def golden(name: str) -> Path:
    """A golden file, the committed one if there is one; skips the test where there is none."""
    for folder in (COMMITTED, SHARED / "goldens"):
        if (folder / name).is_file():
            return folder / name
    pytest.skip("needs ../shared/goldens beside the checkout")


def records(name: str) -> Any:
    """A JSON file of goldens."""
    return json.loads(golden(name).read_text(encoding="utf-8"))


def picture(name: str) -> Image.Image:
    """One of the pictures that were given to the published processor."""
    suffix = "tif" if name.startswith("cmyk") else "png"
    return Image.open(golden(f"processor/images/{name}.{suffix}"))


class Case:
    """One run of the published model: arguments, expected arrays, expected sums."""

    def __init__(self, variant: str, name: str) -> None:
        self.variant, self.facts = variant, CASES[variant][name]
        self.arrays = np.load(golden(f"models/{variant}/cases/{name}.npz"))

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The arguments of the published forward call, made anew each time."""
        names = [name for name in self.arrays.files if name.startswith("in.")]
        inputs = {name[3:]: torch.from_numpy(self.arrays[name]) for name in names}
        inputs.pop("embed_rows", None)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].float()
        return inputs

    @property
    def positions(self) -> np.ndarray:
        """The sequence positions that the hidden states are recorded at."""
        if "out.positions" in self.arrays.files:
            return self.arrays["out.positions"]
        return np.arange(self.arrays["out.last_hidden_state"].shape[1])

    def model(self) -> Phi3VForCausalLM:
        overrides = self.facts.get("config_override", {})
        return load_model(self.variant, RULES[self.facts["code"]], json.dumps(overrides))

    def difference(self, name: str, ours: torch.Tensor, positions: np.ndarray) -> np.ndarray:
        """Absolute differences of an output at the positions, padding left out."""
        found = ours.detach().float().numpy()[:, positions]
        difference = np.abs(found - self.arrays[name])
        mask = self.inputs.get("attention_mask")
        return difference if mask is None else difference[mask.numpy()[:, positions] == 1]


@cache
def load_model(variant: str, rope_length: str, overrides: str = "{}") -> Phi3VForCausalLM:
    """A variant's model in float32, read as a user would; its folder keeps the tower apart.

    `overrides` is JSON. Tests share the model, so they leave no gradient and no mode behind.
    """
    settings = records(f"models/{variant}/config.json") | json.loads(overrides)
    tower = records(f"models/{variant}/clip_config.json")
    config = Phi3VConfig.from_dict(settings | {"vision_config": tower, "rope_length": rope_length})
    folder = golden(f"models/{variant}/model.safetensors").parent
    model, report = Phi3VForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()
