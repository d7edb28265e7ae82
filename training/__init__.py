"""The step loop, parallel layout, optimizer engine, checkpoints and metrics."""
