"""What a checkpoint predicts, token by token."""
