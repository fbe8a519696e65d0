"""The start of a quantized network from a full-precision one."""
