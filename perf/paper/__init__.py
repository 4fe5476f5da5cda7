"""The TokenWeave paper's figures on the GPUs at hand, beside what the paper published."""
