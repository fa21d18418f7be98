"""Which lowering for which geometry."""
