"""DeepSpeed ZeRO (Rajbhandari et al. 2020) over Megatron-core's model: stages 1 to 3, with offload to the host."""

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from armillary.kernels.adamw import AdamW
from armillary.model.coordinates import Block, blocks, placements
from armillary.model.multimodal import MultimodalModel
from armillary.training.checkpoint.manifest import MOMENTS
from armillary.training.config import OptimizerConfig
from armillary.training.engines import canonical
from armillary.training.engines.canonical import CanonicalSums
from armillary.training.engines.shared import clip_scale, counted_here, decayed, sum_shared
from armillary.training.layout import Layout


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
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_world_size(self):
        return dist.get_world_size(self.get_data_parallel_group())

    def get_data_parallel_rank(self):
        return dist.get_rank(self.get_data_parallel_group())

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


class AskingAdamW(AdamW):
    """AdamW that takes no step where `refuses` says so: DeepSpeed finds the norm and takes the step in one call."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.refuses: Callable[[], bool] = lambda: False

    def step(self, closure=None):
        return None if self.refuses() else super().step(closure)


class ZeroEngine:
    """See the module. Gradients are averaged over data- and context-parallel ranks."""

    live = False

    def __init__(
        self,
        stages: Sequence[MultimodalModel],
        config: OptimizerConfig,
        bf16: bool,
        layout: Layout,
        sums: CanonicalSums | None,
    ):
        """sums: what adds the stages' gradients up, in deterministic mode."""
        deepspeed = _deepspeed()
        self._sums, self._data_ranks, self._clip_grad = sums, layout.data, config.clip_grad
        self._stages, self._stage = stages, layout.zero
        self.replicas = layout.data * layout.context if sums is None else 1
        # A pipeline's backward passes are its schedule's, which DeepSpeed knows nothing of: it is given the sums.
        self._native = layout.pipeline == 1 and layout.zero > 1
        module = stages[0] if len(stages) == 1 else torch.nn.ModuleList(stages)
        for parameter in module.parameters():
            parameter.ds_pipe_replicated = getattr(parameter, "copy_of_embedding", False)
        if self._native and sums is None:
            self._sum_in_backward()
        if layout.zero == 3:
            for stage in stages:  # used in its forward pass, but not by the module that has it
                deepspeed.zero.register_external_parameter(stage, stage.output_weight)
        groups = [
            {"params": [p for p in module.parameters() if decayed(p) is yes], "weight_decay": decay}
            for yes, decay in ((True, config.weight_decay), (False, 0.0))
        ]
        betas = (config.beta1, config.beta2)
        self._optimizer = AskingAdamW(groups, config.learning_rate, betas, config.eps, exact=sums is not None)
        zero = {"stage": layout.zero, "overlap_comm": False}
        if layout.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=self._optimizer,
            mpu=ParallelGroups(),
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "managed_gradient_accumulation": not self._native
                or sums is not None,  # step() says when it ends, not a count
                "gradient_clipping": config.clip_grad if sums is None else 0.0,
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "communication_data_type": "fp32",
                "bf16": {"enabled": bf16},
                "data_types": {"grad_accum_dtype": "fp32"},
                "steps_per_print": 10**9,
            },
        )

    @property
    def model(self) -> torch.nn.Module:
        """What a forward pass without a pipeline calls."""
        return self._engine if self._native else self._stages[0]

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Gradients of one micro-batch, which is the step's last or not."""
        if self._native:
            self._engine.backward(loss)
        else:
            loss.backward()

    def step(self, learning_rate: float, accept: Callable[[float], bool] = lambda norm: True) -> float:
        """See Engine."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if not self._native:
            if self._sums is None:
                sum_shared(self._stages, _gradient, experts=True)
            self._engine.allreduce_gradients()
        norm = None if self._sums is None else self._set_canonical()
        zero = self._engine.optimizer  # which has this step's norm before its engine has
        self._optimizer.refuses = lambda: not accept(float(zero._global_grad_norm) if norm is None else norm)
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm()) if norm is None else norm
        if self._stage < 3 and not math.isfinite(norm):
            zero.averaged_gradients.clear()  # offloaded ones DeepSpeed 0.19.8 would add the next step's to
        return norm

    def _set_canonical(self) -> float:
        """Put the deterministic sums, clipped, in the place of the zeros that DeepSpeed has reduced; their norm."""
        from deepspeed.utils import safe_set_full_grad

        group = ParallelGroups().get_data_parallel_group()
        ranks, chunks = dist.get_world_size(group), {}
        totals = {parameter: self._sums.pop(parameter) for parameter, _ in placements(self._stages)}
        for parameter, total in totals.items():
            flat = torch.nn.functional.pad(total.view(-1), (0, -total.numel() % ranks))
            chunks[parameter] = canonical.reduce_scatter(flat, self._data_ranks, group)
        sum_shared(self._stages, chunks.__getitem__, experts=True)  # after the tree, whose shape it would change
        own = [chunk for parameter, chunk in chunks.items() if counted_here(parameter, False)]
        norm = canonical.exact_norm(own, next(iter(totals)).device)
        scale = clip_scale(norm, self._clip_grad)
        for parameter, chunk in chunks.items():
            whole = chunk.new_empty(ranks * len(chunk))
            dist.all_gather_into_tensor(whole, chunk.mul_(scale) if scale < 1 else chunk, group=group)
            parameter.grad = None
            safe_set_full_grad(parameter, whole[: totals[parameter].numel()].view_as(totals[parameter]))
        return norm

    def state(self) -> Iterator[tuple[str, Block]]:
        """See Engine. Whole tensors are gathered, which data-parallel ranks give in turns."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link_optimizer_state()
        for number, (parameter, place) in enumerate(placements(self._stages)):
            state = {"weight": safe_get_full_fp32_param(parameter)}
            state |= {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
            if number % place.turns == place.turn:
                for part, tensor in state.items():
                    yield from ((part, block) for block in blocks(place, tensor.reshape(-1)))

    @torch.no_grad()
    def load_state(self, states: dict[str, dict[str, torch.Tensor]], updates: int) -> None:
        """See Engine."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        zero = self._engine.optimizer  # whose accessors set what there is
        masters = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        for master in masters:
            zeros = {moment: torch.zeros_like(master) for moment in MOMENTS}
            zero.optimizer.state[master] = zeros | {"step": torch.tensor(float(updates))}
        self._link_optimizer_state()
        for parameter, place in placements(self._stages):
            state = states[place.name]
            if self._stage == 3:
                self._load_part(parameter, state)
                continue
            parameter.copy_(state["weight"])  # the accessor sets the fp32 copy only
            safe_set_full_fp32_param(parameter, state["weight"])
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[moment], moment)

    def _load_part(self, parameter: torch.nn.Parameter, state: dict[str, torch.Tensor]) -> None:
        """ZeRO-3's part of one parameter: the accessors of whole ones fail where it does not divide by the ranks."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        ranks, rank = ParallelGroups().get_data_parallel_world_size(), ParallelGroups().get_data_parallel_rank()

        def part(whole: torch.Tensor) -> torch.Tensor:
            flat = torch.nn.functional.pad(whole.reshape(-1), (0, -whole.numel() % ranks))
            return flat.chunk(ranks)[rank]

        parameter.ds_tensor.copy_(part(state["weight"]))
        safe_set_local_fp32_param(parameter, part(state["weight"]))
        for moment in MOMENTS:
            safe_set_local_optimizer_state(parameter, part(state[moment]), moment)

    def _link_optimizer_state(self) -> None:
        """Let DeepSpeed's accessors see Adam's state of all parameter groups.

        DeepSpeed 0.19.8 links it after the *first group's* first step, when the other groups have none yet.
        """
        zero = self._engine.optimizer
        if self._stage < 3:
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _sum_in_backward(self) -> None:
        """`sum_shared` for ZeRO-2 and -3, which reduce a gradient as soon as it is there."""
        group = parallel_state.get_tensor_model_parallel_group()

        def summed(gradient):
            total = gradient.float() if gradient.dtype != torch.float32 else gradient.clone()
            dist.all_reduce(total, group=group)
            return total.to(gradient.dtype)

        for parameter in (parameter for stage in self._stages for parameter in stage.parameters()):
            if getattr(parameter, "sequence_parallel", False):
                parameter.register_hook(summed)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The sum over micro-batches: in fp32, which for bf16 is beside the parameter."""
    return parameter.grad if parameter.grad is not None else parameter.grad_accum


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
