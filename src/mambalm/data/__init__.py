"""Text to tokens to batches: reading documents, holding some out, training a tokenizer, reading by position."""
