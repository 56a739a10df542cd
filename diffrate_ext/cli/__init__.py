"""The command line: one file for each larger command."""
