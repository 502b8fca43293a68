"""One Python function per verb: what the command line calls and the package exports."""
