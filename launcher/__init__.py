"""The command line, the job file, the Ray driver and its workers, and the run directory."""
