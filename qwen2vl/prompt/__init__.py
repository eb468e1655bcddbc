"""From chat messages to the model's inputs: ChatML, the tokenizer and the processor that joins them with media."""
