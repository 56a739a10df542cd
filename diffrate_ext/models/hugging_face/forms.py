"""What transformers' models and layers call their parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Pool = Literal["class", "class and patches", "patches", "attention", "none"]
"""What a model's answer is made of: the class token, a mean over patches (or both, one after the other), attention
pooling. None: its output are the tokens alone."""


@dataclass(frozen=True)
class LayerForm:
    """What a layer calls its parts; all layers have a ``mlp``. An empty name: it has no such part."""

    norm1: str = "norm1"
    attention: str = "attention"
    scale1: str = ""
    norm2: str = "norm2"
    scale2: str = ""
    drop: str = ""

    @property
    def parts(self) -> list[str]:
        names = (self.norm1, self.attention, self.scale1, self.norm2, self.scale2, self.drop, "mlp")
        return [name for name in names if name]


_SCALED = LayerForm(scale1="layer_scale1", scale2="layer_scale2")
_CLIP_LAYER = LayerForm(norm1="layer_norm1", attention="self_attn", norm2="layer_norm2")
LAYERS: Mapping[str, LayerForm] = {
    "ViTLayer": LayerForm(norm1="layernorm_before", norm2="layernorm_after", drop="dropout"),
    "Dinov2Layer": _SCALED,
    "Dinov2WithRegistersLayer": _SCALED,
    "DINOv3ViTLayer": _SCALED,
    "CLIPEncoderLayer": _CLIP_LAYER,
    "SiglipEncoderLayer": _CLIP_LAYER,
}


@dataclass(frozen=True)
class ModelForm:
    """Where a model has its parts, as paths from it."""

    layers: str
    patches: str
    """The convolution that makes patches of pixels."""
    base: str = ""
    """The model without its head; empty: it is that itself."""
    head: str = ""
    """A linear layer on what was pooled."""
    pool: Pool = "class"
    has_class_token: bool = True
    makes_mask: bool = False
    """Whether, under torch.export, the model makes an attention mask for the layers that masks nothing."""

    @property
    def host(self) -> str:
        """The module that runs the layers."""
        return self.layers.rpartition(".")[0]

    def inside(self, base: str, head: str, pool: Pool = "class") -> ModelForm:
        """The same for a model that has this one under a name."""
        return replace(
            self, layers=f"{base}.{self.layers}", patches=f"{base}.{self.patches}", base=base, head=head, pool=pool
        )


_VIT = ModelForm("layers", "embeddings.patch_embeddings.projection")
_DINO = ModelForm("encoder.layer", "embeddings.patch_embeddings.projection", makes_mask=True)
_CLIP = ModelForm("encoder.layers", "embeddings.patch_embedding")
_SIGLIP = ModelForm("encoder.layers", "embeddings.patch_embedding", pool="attention", has_class_token=False)
MODELS: Mapping[str, ModelForm] = {
    "ViTModel": _VIT,
    "ViTForImageClassification": _VIT.inside("vit", "classifier"),
    "Dinov2Model": _DINO,
    "Dinov2ForImageClassification": _DINO.inside("dinov2", "classifier", "class and patches"),
    "Dinov2WithRegistersModel": _DINO,
    "Dinov2WithRegistersForImageClassification": _DINO.inside(
        "dinov2_with_registers", "classifier", "class and patches"
    ),
    "DINOv3ViTModel": ModelForm("model.layer", "embeddings.patch_embeddings"),
    "CLIPVisionModel": _CLIP,
    "CLIPVisionModelWithProjection": _CLIP.inside("vision_model", "visual_projection"),
    "CLIPForImageClassification": _CLIP.inside("vision_model", "classifier", "patches"),
    "SiglipVisionModel": _SIGLIP,
    "SiglipForImageClassification": _SIGLIP.inside("vision_model", "classifier", "patches"),
}
