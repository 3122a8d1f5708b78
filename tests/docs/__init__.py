"""Every code block of README and docs, and the examples, are run."""
