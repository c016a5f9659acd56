"""The command line: options, one engine call, printing."""
