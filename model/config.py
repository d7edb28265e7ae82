"""The `[model]` table: one depth dial, and every dimension it derives can be set by hand."""

from pydantic import Field, model_validator

from armillary.table import Table

HEAD_DIM = 64


class ModelConfig(Table):
    """Dimensions of the image encoder, the projector and the decoder. A 0 means: derived from `depth`."""

    depth: int = Field(12, ge=1, description="decoder layers; the dial from which the other dimensions follow")
    hidden_size: int = Field(0, ge=0, description="decoder width; 0: 64 x depth")
    num_heads: int = Field(0, ge=0, description="query heads; 0: hidden_size / 64")
    num_query_groups: int = Field(
        0,
        ge=0,
        description="key-value heads (grouped-query attention); 0: num_heads / 2, or num_heads where that is odd",
    )
    ffn_hidden_size: int = Field(0, ge=0, description="SwiGLU width; 0: 8/3 x hidden_size, rounded up to 32")
    vocab_size: int = Field(0, ge=0, description="rows of the embedding; 0: data.vocab_size rounded up to 64")
    tied_embeddings: bool = Field(False, description="the output layer's matrix is the embedding's")
    num_experts: int = Field(0, ge=0, description="experts of a decoder layer, each a SwiGLU; 0: one, without router")
    experts_per_token: int = Field(2, ge=1, description="experts that a router sends each token to")
    capacity_factor: float = Field(
        0.0, ge=0, description="tokens that an expert takes at most / its even share of them; 0: all sent to it"
    )
    balance_loss: float = Field(0.01, ge=0, description="weight of the loss that makes experts' shares even")
    router_z_loss: float = Field(0.001, ge=0, description="weight of the loss that keeps a router's logits small")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary position embedding")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of every RMSNorm")
    image_size: int = Field(64, ge=1, description="images are resized to this many pixels a side")
    patch_size: int = Field(16, ge=1, description="pixels a side of one patch")
    patch_merge: int = Field(1, ge=1, description="patches a side of the square that shares one decoder position")
    image_mean: float = Field(0.5, description="subtracted from pixels in [0, 1]")
    image_std: float = Field(0.5, gt=0, description="pixels are divided by this after image_mean is subtracted")
    vision_layers: int = Field(0, ge=0, description="image encoder layers; 0: depth / 2, at least 1")
    vision_hidden_size: int = Field(0, ge=0, description="image encoder width; 0: hidden_size")
    vision_num_heads: int = Field(0, ge=0, description="image encoder heads; 0: vision_hidden_size / 64")
    vision_ffn_hidden_size: int = Field(0, ge=0, description="image encoder SwiGLU width; 0: 8/3 x its width")
    init_std: float = Field(
        0.02, gt=0, description="standard deviation of initial weights; outputs into the residual / sqrt(2 layers)"
    )

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, given):
        if not isinstance(given, dict):
            return given
        dims = dict(given)

        def derive(key: str, value: int) -> int:
            if not dims.get(key):
                dims[key] = value
            return dims[key] if isinstance(dims[key], int) else 1

        depth = dims.get("depth", cls.model_fields["depth"].default)
        depth = depth if isinstance(depth, int) else 1
        hidden = derive("hidden_size", HEAD_DIM * depth)
        heads = derive("num_heads", max(1, hidden // HEAD_DIM))
        derive("num_query_groups", heads // 2 if heads % 2 == 0 else heads)
        derive("ffn_hidden_size", _swiglu_width(hidden))
        derive("vision_layers", max(1, depth // 2))
        vision = derive("vision_hidden_size", hidden)
        derive("vision_num_heads", max(1, vision // HEAD_DIM))
        derive("vision_ffn_hidden_size", _swiglu_width(vision))
        return dims

    @model_validator(mode="after")
    def _check(self):
        for width, heads, prefix in (
            (self.hidden_size, self.num_heads, ""),
            (self.vision_hidden_size, self.vision_num_heads, "vision_"),
        ):
            if width % heads:
                raise ValueError(f"{prefix}hidden_size={width} is not divisible by {prefix}num_heads={heads}")
        if self.head_dim % 2:
            raise ValueError(f"the head dimension {self.head_dim} (hidden_size / num_heads) must be even for RoPE")
        if self.num_heads % self.num_query_groups:
            raise ValueError(f"num_heads={self.num_heads} is not divisible by num_query_groups={self.num_query_groups}")
        if self.num_experts and self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token={self.experts_per_token} is more than num_experts={self.num_experts}")
        if self.image_size % (self.patch_size * self.patch_merge):
            raise ValueError(
                f"image_size={self.image_size} is not divisible by patch_size={self.patch_size} x "
                f"patch_merge={self.patch_merge}"
            )
        return self

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def image_positions(self) -> int:
        """Positions of one image in the decoder."""
        return self.num_patches // self.patch_merge**2

    @property
    def patch_dim(self) -> int:
        return 3 * self.patch_size**2


def _swiglu_width(hidden: int) -> int:
    """8/3 x hidden keeps SwiGLU at the parameters of a 4x MLP (Shazeer 2020, section 2)."""
    return -(-8 * hidden // 3 // 32) * 32
