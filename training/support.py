"""What goes with what: the rules by which a layout is refused, and from which its documentation's table is made."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from armillary.model.config import ModelConfig
from armillary.training.layout import Layout


class Setting(NamedTuple):
    """All that the rules look at."""

    layout: Layout
    model: ModelConfig
    seq_length: int
    global_batch: int
    bf16: bool = False
    deterministic: bool = False
    compile: bool = False


class Feature(NamedTuple):
    """Something that a job may ask for: its key, and whether it does."""

    key: str
    label: str
    used: Callable[[Setting], bool]


FEATURES = {
    "tensor": Feature(
        "parallel.tensor", "tensor alone", lambda s: s.layout.tensor > 1 and not s.layout.sequence_parallel
    ),
    "sequence": Feature("parallel.sequence_parallel", "tensor and sequence", lambda s: s.layout.sequence_parallel),
    "pipeline": Feature("parallel.pipeline", "pipeline", lambda s: s.layout.pipeline > 1),
    "virtual": Feature("parallel.virtual", "virtual stages", lambda s: s.layout.virtual > 1),
    "uneven": Feature(
        "parallel.first_stage_layers", "uneven stages",
        lambda s: bool(s.layout.first_stage_layers or s.layout.last_stage_layers),
    ),
    "context": Feature("parallel.context", "context", lambda s: s.layout.context > 1),
    "expert": Feature("parallel.expert", "expert", lambda s: s.layout.expert > 1),
    "megatron": Feature("parallel.engine", "Megatron-core", lambda s: s.layout.engine == "megatron"),
    "zero1": Feature(
        "parallel.engine", "DeepSpeed ZeRO-1",
        lambda s: s.layout.engine == "deepspeed" and s.layout.zero == 1 and not s.layout.offload,
    ),
    "zero2": Feature("parallel.zero", "ZeRO-2", lambda s: s.layout.zero == 2),
    "zero3": Feature("parallel.zero", "ZeRO-3", lambda s: s.layout.zero == 3),
    "offload": Feature("parallel.offload", "offload", lambda s: s.layout.offload),
    "recompute": Feature("parallel.recompute", "recompute", lambda s: s.layout.recompute != "none"),
    "experts": Feature("model.num_experts", "experts", lambda s: s.model.num_experts > 0),
    "capacity": Feature("model.capacity_factor", "capacity", lambda s: s.model.capacity_factor > 0),
    "tied": Feature("model.tied_embeddings", "tied", lambda s: s.model.tied_embeddings),
    "tied_stages": Feature(
        "model.tied_embeddings", "tied over stages", lambda s: s.model.tied_embeddings and s.layout.pipeline > 1
    ),
    "bf16": Feature("training.precision", "bf16", lambda s: s.bf16),
    "deterministic": Feature("training.deterministic", "deterministic", lambda s: s.deterministic),
    "compile": Feature("training.compile", "compile", lambda s: s.compile),
}  # fmt: skip


class Rule(NamedTuple):
    """Why two features do not go together, or why the first needs the second, and what to do instead."""

    first: str
    second: str
    why: str
    instead: str


ZERO1 = "parallel.zero=1, which shares the largest part, the optimizer's state"
DEEPSPEED = 'parallel.engine="deepspeed"'
MEGATRON = 'parallel.engine="megatron"'

NEEDS = (
    Rule("virtual", "pipeline", "it divides the stages of a pipeline", "set parallel.pipeline above 1"),
    Rule("uneven", "pipeline", "it divides layers among the stages of a pipeline", "set parallel.pipeline above 1"),
    Rule("expert", "experts", "the model has no experts to share", "set model.num_experts"),
    Rule("capacity", "experts", "it is the room that an expert has", "set model.num_experts"),
    Rule("tied_stages", "tied", "it is the embedding that two stages have", "set model.tied_embeddings"),
    Rule("tied_stages", "pipeline", "it is the embedding that two stages have", "set parallel.pipeline above 1"),
    Rule("expert", "megatron", "experts' gradients are reduced over fewer ranks than others", MEGATRON),
)

# Of each of these a job has one at most.
ALTERNATIVES = (("megatron", "zero1"), ("zero1", "zero2", "zero3"), ("zero1", "offload"), ("tensor", "sequence"))

REFUSED = (
    Rule("zero2", "pipeline", "ZeRO-2 reduces gradients as each backward pass ends, and a pipeline has many", ZERO1),
    Rule("zero3", "pipeline", "ZeRO-3 gathers weights for one pass at a time, and a pipeline has many", ZERO1),
    Rule("zero2", "megatron", "Megatron-core's buffers are of ZeRO-1", DEEPSPEED),
    Rule("zero3", "megatron", "Megatron-core's buffers are of ZeRO-1", DEEPSPEED),
    Rule("offload", "megatron", "Megatron-core's buffers stay where the weights are", DEEPSPEED),
    Rule(
        "experts", "tensor", "a token would go to its experts once for each tensor-parallel rank",
        "parallel.sequence_parallel=true",
    ),
    Rule("zero1", "bf16", "it would add micro-batches' gradients up in bf16, and not in fp32", MEGATRON),
    Rule(
        "deterministic", "expert", "what an expert is sent in one go changes with the ranks that share it",
        "parallel.expert=1, or training.deterministic=false",
    ),
    Rule(
        "deterministic", "tied_stages", "stages add up their own gradients of the embedding, one process adds both",
        "model.tied_embeddings=false, or parallel.pipeline=1",
    ),
    Rule(
        "deterministic", "offload", "gradients go to the host in the order in which they come",
        "parallel.offload=false, or training.deterministic=false",
    ),
    Rule(
        "compile", "deterministic", "what is compiled depends on the sizes that a rank has met so far",
        "training.compile=false, or training.deterministic=false",
    ),
)  # fmt: skip


def together(first: str, second: str) -> list[Rule] | None:
    """The rules by which two features do not go together; None where they are alternatives."""
    if any({first, second} <= set(names) for names in ALTERNATIVES):
        return None
    used, reasons = {first, second}, []
    while more := [rule for rule in NEEDS if rule.first in used and rule.second not in used]:
        used |= {rule.second for rule in more}
        reasons += more
    found = [rule for rule in REFUSED if {rule.first, rule.second} <= used]
    clash = {name for names in ALTERNATIVES for name in names if len(used & set(names)) > 1}
    return found + [rule for rule in reasons if found or rule.second in clash]


def matrix() -> str:
    """Which features go together: the table of docs/layouts.md, in Markdown, and the rules behind it."""
    names, numbers = list(FEATURES), {rule: number for number, rule in enumerate((*REFUSED, *NEEDS), 1)}
    lines = ["| | " + " | ".join(FEATURES[name].label for name in names[:-1]) + " |", "|---" * len(names) + "|"]
    for row, name in enumerate(names[1:], 1):
        cells = []
        for other in names[:row]:
            rules = together(name, other)
            cells.append("" if rules is None else ", ".join(str(numbers[rule]) for rule in rules) or "yes")
        lines.append(f"| **{FEATURES[name].label}** | " + " | ".join(cells + [""] * (len(names) - 1 - row)) + " |")
    lines.append("")
    for rule, number in numbers.items():
        lines.append(f"{number}. {_refused(rule) if rule in REFUSED else _needed(rule)}")
    return "\n".join(lines) + "\n"


def _needed(rule: Rule) -> str:
    return f"{FEATURES[rule.first].label} needs {FEATURES[rule.second].label}: {rule.why}; {rule.instead}"


def _refused(rule: Rule) -> str:
    labels = f"{FEATURES[rule.first].label} does not go with {FEATURES[rule.second].label}"
    return f"{labels}: {rule.why}; instead: {rule.instead}"


def problems(setting: Setting) -> list[tuple[str, str]]:
    """Why this layout cannot run this model and batch: (key, reason with what to do instead) pairs, or none."""
    used = {name for name, feature in FEATURES.items() if feature.used(setting)}
    found = [
        (FEATURES[rule.first].key, _needed(rule))
        for rule in NEEDS if rule.first in used and rule.second not in used
    ]  # fmt: skip
    found += [
        (FEATURES[rule.first].key, _refused(rule)) for rule in REFUSED if {rule.first, rule.second} <= used
    ]  # fmt: skip
    return [*found, *_model_sizes(setting), *_batch_sizes(setting)]


def _model_sizes(setting: Setting) -> Iterator[tuple[str, str]]:
    """What of the model the layout does not divide."""
    layout, model = setting.layout, setting.model
    shared = {
        "model.num_heads": model.num_heads,
        "model.num_query_groups": model.num_query_groups,
        "model.hidden_size": model.hidden_size,
        "model.vocab_size": model.vocab_size,
        "model.vision_num_heads": model.vision_num_heads,
        "model.vision_ffn_hidden_size": model.vision_ffn_hidden_size,
    }
    if not model.num_experts:  # experts are whole
        shared["model.ffn_hidden_size"] = model.ffn_hidden_size
    step = 8 if setting.bf16 else 4  # rows of 16 bytes
    widths = {"model.hidden_size": model.hidden_size, "model.ffn_hidden_size": model.ffn_hidden_size}
    if model.num_experts and (odd := [f"{key}={size}" for key, size in widths.items() if size % step]):
        yield "model.num_experts", f"experts' sizes are multiples of {step} in this precision, not {', '.join(odd)}"
    if layout.sequence_parallel and layout.tensor == 1:
        yield (
            "parallel.sequence_parallel",
            "it splits positions over tensor-parallel ranks; set parallel.tensor above 1",
        )
    if undivided := [f"{key}={size}" for key, size in shared.items() if size % layout.tensor]:
        fitting = _divisors(math.gcd(*shared.values()))
        yield "parallel.tensor", f"tensor={layout.tensor} does not divide {', '.join(undivided)}; {fitting} would"
    try:
        layout.stage_layers(model.depth)
    except ValueError as error:
        if layout.virtual == 1 and not (layout.first_stage_layers or layout.last_stage_layers):
            fitting = _divisors(model.depth)
            reason = f"pipeline={layout.pipeline} does not divide model.depth={model.depth}; {fitting} would"
            yield "parallel.pipeline", reason
        else:
            key = "parallel.virtual" if layout.virtual > 1 else "parallel.first_stage_layers"
            yield key, f"of model.depth={model.depth} layers, {error}"
    if layout.expert > 1 and model.num_experts % layout.expert:
        fitting = _divisors(model.num_experts)
        yield (
            "parallel.expert",
            f"expert={layout.expert} does not divide num_experts={model.num_experts}; {fitting} would",
        )
    ranks = layout.data * layout.context * layout.tensor
    if ranks % layout.expert:
        yield "parallel.expert", f"expert={layout.expert} does not divide data x context x tensor = {ranks}"


def _batch_sizes(setting: Setting) -> Iterator[tuple[str, str]]:
    """What of a step's rows and positions it does not."""
    layout = setting.layout
    rows = layout.data * layout.micro_batch
    if setting.global_batch % rows:
        yield (
            "training.global_batch",
            f"data x micro_batch = {layout.data} x {layout.micro_batch} = {rows} does not divide "
            f"training.global_batch={setting.global_batch}",
        )
        return
    micro_batches = setting.global_batch // rows
    if layout.virtual > 1 and micro_batches % layout.pipeline:
        yield (
            "parallel.virtual",
            f"virtual stages take micro-batches in groups of pipeline={layout.pipeline}, which does not divide the "
            f"{micro_batches} of a step; change training.global_batch or micro_batch",
        )
    positions = layout.micro_batch * setting.seq_length
    parts = (2 * layout.context if layout.context > 1 else 1) * (layout.tensor if layout.sequence_parallel else 1)
    if positions % parts:
        key = "parallel.context" if layout.context > 1 else "parallel.sequence_parallel"
        yield (
            key,
            f"micro_batch x seq_length = {positions} positions do not divide into {parts} parts; set data.seq_length",
        )
    total = micro_batches * layout.data
    parts = total & -total
    if setting.deterministic and parts % layout.data:
        yield (
            "parallel.data",
            f"a step's {total} micro-batches are added up in {parts} parts, of which data={layout.data} ranks cannot "
            f"have as many each; {_divisors(parts)} could",
        )


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
