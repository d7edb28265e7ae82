"""The planner beside published measurements: `make bench-planner`."""
