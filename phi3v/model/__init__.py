"""Phi-3-Vision on transformers' layers: configuration, vision, rotary, attention, model."""

from phi3v.model.configuration import Phi3VConfig
from phi3v.model.phi3v import LAYERS, Phi3VForCausalLM

__all__ = ["LAYERS", "Phi3VConfig", "Phi3VForCausalLM"]
