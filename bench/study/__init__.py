"""The study: does ALPS hold on a real language model, and what does it cost (`python -m bench.study`)."""
