"""DeepSpeed ZeRO-1 over Megatron-core's model: gradients in, one global clip, one AdamW step."""

import os
import tempfile
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from armillary.kernels.adamw import AdamW
from armillary.model.coordinates import Placement, placements
from armillary.model.multimodal import MultimodalModel
from armillary.training.checkpoint.manifest import MOMENTS
from armillary.training.config import OptimizerConfig


class ParallelGroups:
    """Megatron-core's process groups under the names that DeepSpeed's `mpu` argument asks for.

    DeepSpeed is shown one model-parallel group, tensor x pipeline: it sums gradient norms over it.
    """

    def get_model_parallel_group(self):
        return parallel_state.get_model_parallel_group()

    def get_model_parallel_world_size(self):
        return dist.get_world_size(self.get_model_parallel_group())

    def get_model_parallel_rank(self):
        return dist.get_rank(self.get_model_parallel_group())

    def get_data_parallel_group(self):
        return parallel_state.get_data_parallel_group()

    def get_data_parallel_world_size(self):
        return parallel_state.get_data_parallel_world_size()

    def get_data_parallel_rank(self):
        return parallel_state.get_data_parallel_rank()

    def get_tensor_model_parallel_group(self):
        return parallel_state.get_tensor_model_parallel_group()

    def get_tensor_model_parallel_world_size(self):
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_tensor_model_parallel_rank(self):
        return parallel_state.get_tensor_model_parallel_rank()

    def get_tensor_model_parallel_src_rank(self):
        return parallel_state.get_tensor_model_parallel_src_rank()

    def get_pipeline_model_parallel_group(self):
        return parallel_state.get_pipeline_model_parallel_group()

    def get_pipeline_model_parallel_world_size(self):
        return parallel_state.get_pipeline_model_parallel_world_size()

    def get_pipeline_model_parallel_rank(self):
        return parallel_state.get_pipeline_model_parallel_rank()


class Engine:
    """The optimizer side of training, fp32 state split over data-parallel ranks.

    Gradients are *averaged* over data-parallel ranks: scale each rank's loss by their number for a sum.
    """

    def __init__(self, model: MultimodalModel, config: OptimizerConfig, bf16: bool):
        deepspeed = _deepspeed()
        self._model = model
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = AdamW(groups, config.learning_rate, (config.beta1, config.beta2), config.eps)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            mpu=ParallelGroups(),
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,  # Megatron-core's schedule owns the micro-batches
                "gradient_accumulation_steps": 1,
                "gradient_clipping": config.clip_grad,
                "zero_optimization": {"stage": 1, "overlap_comm": False},
                "zero_allow_untested_optimizer": True,
                "communication_data_type": "fp32",
                "bf16": {"enabled": bf16},
                "steps_per_print": 10**9,
            },
        )

    def step(self, learning_rate: float) -> float:
        """Reduce, clip and apply the gradients that lie in the parameters; the global norm before clipping."""
        self._sum_sequence_parallel_gradients()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.allreduce_gradients()
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def state(self) -> Iterator[tuple[Placement, dict[str, torch.Tensor]]]:
        """Each parameter's fp32 weight and Adam moments, whole over data-parallel ranks.

        Collective over data-parallel ranks: all must go through it together.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link_optimizer_state()
        for parameter, place in placements(self._model):
            state = {"weight": safe_get_full_fp32_param(parameter)}
            state |= {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
            yield place, state

    @torch.no_grad()
    def load_state(self, states: dict[str, dict[str, torch.Tensor]], step: int) -> None:
        """Put back what `state` gave, by global name, in this layout's local shapes; `step` steps are done."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        # The accessors need Adam's state to exist: a step with zero gradients and zero rate makes it. DeepSpeed
        # readies its buffers in hooks of a backward pass, so the gradients come from one.
        with torch.enable_grad():
            sum((parameter * 0.0).sum() for parameter in self._model.parameters()).backward()
        self.step(learning_rate=0.0)
        self._link_optimizer_state()
        for parameter, place in placements(self._model):
            state = states[place.name]
            parameter.copy_(state["weight"])  # the accessor sets the fp32 copy only
            safe_set_full_fp32_param(parameter, state["weight"])
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[moment], moment)
        for entry in self._engine.optimizer.optimizer.state.values():
            entry["step"] = torch.tensor(float(step))

    def _link_optimizer_state(self) -> None:
        """Let DeepSpeed's accessors see Adam's state of all parameter groups.

        DeepSpeed 0.19.8 links it after the *first group's* first step, when the other groups have none yet.
        """
        zero = self._engine.optimizer
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()

    def _sum_sequence_parallel_gradients(self) -> None:
        """Weights used on a part of the positions only (norms under sequence parallelism) need the sum over parts."""
        if parallel_state.get_tensor_model_parallel_world_size() == 1:
            return
        for parameter in self._model.parameters():
            if getattr(parameter, "sequence_parallel", False):
                dist.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())


def _deepspeed():
    """DeepSpeed, kept from compiling C++ and from talking when it is imported and initialised."""
    # A folder of this process alone, made only if something is compiled after all: a shared one can hold stale locks.
    private = os.path.join(tempfile.gettempdir(), f"armillary-extensions-{os.getuid()}-{os.getpid()}")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", private)
    import logging

    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a build of a minute that can hang on a lock
    deepspeed.init_distributed(dist.get_backend(), dist_init_required=False, auto_mpi_discovery=False)
    return deepspeed
