"""Memory and time of a layout on given machines, before anything runs there."""
