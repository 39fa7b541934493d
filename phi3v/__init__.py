"""phi3v: full-parameter fine-tuning of Phi-3-Vision.

Importing it registers the model, its configuration and its processor with transformers' Auto
classes, so that a phi3_v folder opens without remote code.
"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.processing import Phi3VProcessor

AutoConfig.register(Phi3VConfig.model_type, Phi3VConfig, exist_ok=True)
AutoModelForCausalLM.register(Phi3VConfig, Phi3VForCausalLM, exist_ok=True)
AutoProcessor.register(Phi3VConfig, Phi3VProcessor, exist_ok=True)
