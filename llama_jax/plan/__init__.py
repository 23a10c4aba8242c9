"""What a program will cost on a machine, found out by compiling it for one that is not there."""
