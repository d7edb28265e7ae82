"""What is wrong with an operation's arguments, said before anything is launched."""

import torch


def require(right: bool, operation: str, argument: str, wanted: str) -> None:
    """ValueError, naming the operation and the argument, unless it is `right`."""
    if not right:
        raise ValueError(f"{operation}: {argument} must be {wanted}")


def require_like(operation: str, argument: str, tensor: torch.Tensor | None, shape: tuple, x: torch.Tensor) -> None:
    """`tensor`, if it is given, must have `shape`, and be on the device of x."""
    if tensor is not None:
        require(tuple(tensor.shape) == shape, operation, argument, f"of shape {list(shape)}, not {list(tensor.shape)}")
        require(tensor.device == x.device, operation, argument, f"on {x.device}, not on {tensor.device}")
