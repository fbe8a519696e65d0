"""The products that quantized layers call, in several implementations of one interface."""
