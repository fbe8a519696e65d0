"""What a network costs, and what happens inside it."""
