"""The optimizer's side of training: who sums gradients over ranks, clips them, and updates sharded state."""
