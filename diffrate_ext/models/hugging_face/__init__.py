"""Vision transformers of Hugging Face's transformers: ViT, DINOv2 (with registers), DINOv3, CLIP, SigLIP.

Their own forward passes run as they are, hooks, ``output_hidden_states`` and gradient checkpointing included. What
changes are the layers, which reduce their tokens between attention and MLP (DiffRate, section 3), attention, and heads
that pool over patches. Nothing here imports transformers, which takes seconds: who has such a model has imported it.
"""

from .adapter import HuggingFaceAdapter

__all__ = ["HuggingFaceAdapter"]
