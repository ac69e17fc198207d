"""Values as bytes and bytes as values: tensors, messages, errors, frames."""
