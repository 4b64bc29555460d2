"""A small world that needs no network: fictional authors, a tokenizer, tiny models, and how to train them."""
