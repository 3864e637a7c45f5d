"""The tools on finished runs: each file has a `main(arguments)` and prints what it found."""
