"""Later methods of training, each in a file of its own."""
