"""Sources -> Arrow shards -> shuffle -> pack -> batches, with one global cursor."""
