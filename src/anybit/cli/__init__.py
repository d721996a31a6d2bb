"""The command line: one file a command, all text through `output.py`."""
