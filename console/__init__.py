"""What every command says and understands, without PyTorch: mistakes in one line, and parsers of command lines."""
