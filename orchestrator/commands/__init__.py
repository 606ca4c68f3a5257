"""What the command line does, one module a command, apart from parsing and printing."""
