"""Operations of the model, one file each. They run wherever PyTorch runs."""
