"""What the planner knows of the code that runs: the fitted constants, and how the implementation goes about a step."""

import tomllib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("constants.toml")


@dataclass(frozen=True)
class Constants:
    """Shares without a unit, fitted once by `python -m benchmarks.planner --fit` and kept in constants.toml."""

    gemm: float  # of a large product's rate, what a training step's products reach
    traffic: float  # of the memory traffic of a product of matrices, what is not hidden behind its arithmetic
    memory: float  # of the memory's bandwidth, what norms, activations and the optimizer reach
    flash2: float  # of the published rate, what FlashAttention-2 reaches in a step
    flash1: float  # the same of FlashAttention-1
    link: float  # of a link's bandwidth inside a node, what collectives reach: not fitted, NCCL's tests on NVLink
    network: float  # the same between nodes
    overlapped: float  # of communication beside computation, what is seen all the same
    jitter: float  # standard deviation of a rank's time over its mean
    fragmentation: float  # memory that the allocator cannot use, over what is allocated


@cache
def constants() -> Constants:
    """The fitted constants."""
    return Constants(**tomllib.loads(FILE.read_text()))


@dataclass(frozen=True)
class Software:
    """How an implementation computes a step. The defaults are this project's; benchmarks/planner describes others,
    whose published figures the planner is held against. Traffic is what is read and written outside of products."""

    mlp_matrices: int = 3  # SwiGLU; 2: a plain two-layer MLP
    images: bool = True  # there is an image encoder
    attention: str = "flash2"  # "flash1", or "unfused": scores are written out
    norm_traffic: float = 9.0  # of norms and residuals, in hidden sizes of a position and layer's forward pass
    activation_traffic: float = 3.0  # of the MLP's activation, in its widths
    rope_traffic: float = 2.0  # in widths of queries and keys
    logit_bytes: float = 8.0  # of the loss, for each logit, forward and backward
    tensor_collectives: int = 2  # all-reduces of a layer's forward pass; 1: attention and MLP side by side
    tensor_overlap: bool = False  # tensor-parallel communication is hidden behind products
    backward_overlap: bool = True  # that of the gradients of inputs is, behind those of weights
    data_overlap: bool = False  # gradients are reduced during the backward pass, weights gathered in the forward pass
    gradient_overlap: bool = False  # the first of these alone, in Megatron-core's buffers
    gradient_bytes: int = 4  # of what is reduced
    gather_bytes: int = 0  # of a weight that is gathered; 0: as it is computed with
    shared_optimizer: bool = True  # optimizer state is divided over data-parallel ranks
    scattered_sends: bool = False  # tensor-parallel ranks send shares to the next stage, even if each holds all
    window: int = 0  # positions that attention looks back; 0: all
    fp8: bool = False  # the decoder's products
    # Memory, bytes.
    weight_bytes: int = 2  # of the weights in use
    kept_gradient_bytes: int = 4
    state_bytes: int = 12  # of master weight and two moments
    selective: str = "norms"  # what selective recomputation does; "attention" (Korthikanti), "products" (torchtitan)
    joint_qkv: bool = True  # values are kept as a view of the product's whole output, queries and keys with them
    gathered_keys: bool = True  # context-parallel ranks keep keys and values of the whole row; False: of their own part
    kept_activations: float = 0.0  # more tensors kept for the backward pass, in MLP widths of a position and layer
    kept_gathered: bool = False  # sequence-parallel inputs of products are kept whole, not gathered again
    whole_logits: float = 0.0  # bytes of each logit, if all are held at once; 0: they go through in chunks
    bucket_bytes: float = 3e9  # of gradients and weights on their way, at most


ARMILLARY = Software(gradient_overlap=True)
# Where there is no Triton, the references of our kernels run: each operation of a norm, the rotation, SwiGLU and the
# loss goes through memory by itself.
REFERENCES = replace(ARMILLARY, norm_traffic=30, activation_traffic=5, rope_traffic=12, logit_bytes=40)
