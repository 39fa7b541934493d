"""phi3v: full-parameter fine-tuning of Phi-3-Vision.

Importing it registers the model, its configuration and its processors with transformers' Auto
classes, so that a phi3_v folder opens without remote code.
"""

import gc
import sys

# torch and transformers make a million objects that stay. To look through them for garbage, while
# they are made or once after, takes a quarter of the import. What a caller has made before is not
# frozen.
_collects, _is_first = gc.isenabled(), "torch" not in sys.modules
gc.disable()
try:
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoProcessor

    from phi3v.model import Phi3VConfig, Phi3VForCausalLM
    from phi3v.processing import Phi3VImageProcessor, Phi3VProcessor
finally:
    if _is_first:
        gc.freeze()
    if _collects:
        gc.enable()


def register() -> None:
    """Register again, which changes nothing: what vLLM calls for its plugin after the import."""
    AutoConfig.register(Phi3VConfig.model_type, Phi3VConfig, exist_ok=True)
    AutoModelForCausalLM.register(Phi3VConfig, Phi3VForCausalLM, exist_ok=True)
    AutoProcessor.register(Phi3VConfig, Phi3VProcessor, exist_ok=True)
    AutoImageProcessor.register(
        Phi3VConfig, slow_image_processor_class=Phi3VImageProcessor, exist_ok=True
    )


register()
