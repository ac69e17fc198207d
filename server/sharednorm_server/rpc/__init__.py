"""The gRPC edge: methods, messages, tensors, and how calls run."""
