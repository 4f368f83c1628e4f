"""The command line: flags, how a script begins and ends, where its files lie."""
