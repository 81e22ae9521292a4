"""What training takes beside a model: optimizers, and memory."""
