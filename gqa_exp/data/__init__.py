"""Text in, token batches out: tokenizer, corpus and its span corruption, tasks, batching, and the embedded text."""
