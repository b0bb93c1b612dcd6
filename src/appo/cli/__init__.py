"""Words of a command line in, an exit code out. One module a command; none does any work of its own."""
