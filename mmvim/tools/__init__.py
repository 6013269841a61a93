"""What the command line does: one module a tool, each with `parser()` and `main(args)`."""
