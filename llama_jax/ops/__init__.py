"""The operations of the model: pure functions without numeric defaults."""
