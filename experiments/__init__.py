"""One script a system, and tools that work on any finished run. Not part of the installed packages."""
