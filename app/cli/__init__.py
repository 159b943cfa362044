"""The command line: what an operator types, and the processes that serve.

Owns words, options, questions and how results look on a terminal or as JSON. Must never decide anything itself: each
command opens the services, calls one of them and prints what it says. Secrets never come as arguments, where every
process of the machine could read them: they come from a file, standard input or a prompt without echo.

Exit code 0 means done, 1 refused or failed (one sentence on standard error, no traceback), 2 used wrongly.

Decision: everything heavy is imported inside the command that needs it, so that `--help` and a typing error answer at
once; the price is imports in unusual places.
"""
