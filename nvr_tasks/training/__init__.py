"""Contrastive fine-tuning on top of sentence-transformers: batches, the loop, checkpoints in storage."""
