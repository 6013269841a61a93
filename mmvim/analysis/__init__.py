"""Looking into trained models: pictures of what a backbone computes, and reports on checkpoint files."""
