"""What a Trainer runs, and what follows a pruning: the callback, fine-tuning with the mask held, adapters."""
