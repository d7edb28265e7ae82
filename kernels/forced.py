"""Which operations are forced to their references: ARMILLARY_KERNELS is `reference` for all, `reference:norm,rope` for
some. Imports no PyTorch, so that a wrong value is refused at once."""

from armillary.errors import JobError

OPERATIONS = ("adamw", "attention", "cross_entropy", "norm", "rope", "swiglu")
VARIABLE = "ARMILLARY_KERNELS"


def forced(value: str) -> frozenset[str]:
    """The operations that a value of ARMILLARY_KERNELS forces to their references; JobError if it means nothing."""
    head, _, names = value.partition(":")
    chosen = frozenset(names.split(",")) if names else frozenset(OPERATIONS if head == "reference" else ())
    if (value and head != "reference") or not chosen <= set(OPERATIONS):
        raise JobError(
            f"{VARIABLE}={value} means nothing", "the environment",
            f"set it to reference, or to reference:NAME,NAME of {', '.join(OPERATIONS)}",
        )  # fmt: skip
    return chosen
