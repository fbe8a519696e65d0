"""From a trained network to one that runs elsewhere: integers, their kernels, ONNX."""
