"""Pictures and conversations to the model's inputs: the HD transform, the prompt, the processor."""

from phi3v.processing.processor import Phi3VImageProcessor, Phi3VProcessor

__all__ = ["Phi3VImageProcessor", "Phi3VProcessor"]
