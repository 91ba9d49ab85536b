"""The command line: parse, build settings, call. One file per group of commands, heavy imports inside the commands."""
